"""Commands, layer descriptors and completions: 64-byte little-endian structures in device memory,
described once.

The tables below generate the hardware's field checks, the driver's encoders and the documentation.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from moeaccel.errors import CommandError

ENTRY_BYTES = 64
"""Bytes of a submission, a completion and a layer descriptor."""

RING_LOG2_MAX = 8
"""log2 of the entries that a ring may have at most."""


GRID_EXPONENTS = range(-100, 61)
"""Exponents that an output grid may have."""


class Opcode(enum.IntEnum):
    """What a submission asks for."""

    NOP = 0
    """Complete at once."""
    EXPERTS = 1
    """y = sum over k of weights[t, k] * expert[ids[t, k]](x[t]), routed by the host."""
    GEMM = 2
    """y = x W^T with the rows of one linear layer."""
    FENCE = 3
    """Complete when every earlier command has completed."""


class Status(enum.IntEnum):
    """Completion codes."""

    OK = 0
    BAD_OPCODE = 1
    """Unknown opcode; detail is the opcode."""
    BAD_FIELD = 2
    """A submission field out of range, or an array behind an address (x, ids, weights, y,
    workspace, used or not) that runs beyond the address space; detail is the index of its 32-bit
    word."""
    BAD_LAYER = 3
    """A layer descriptor field out of range, or images that run beyond the address space; detail is
    the index of its 32-bit word."""
    WINDOW = 4
    """A burst outside the memory window was suppressed; address is its first byte. Of one stream of
    a command (ids; weights; images; x; rows of zeros; partial sums read; rows and partial sums
    written) the first such burst is named, of several that of the one that came first."""
    BUS_ERROR = 5
    """Memory answered with an error; address is the first byte of the burst (writes: 0), chosen as
    for WINDOW; of both, what came first."""
    NONFINITE = 6
    """NaN or infinity in what was computed with; detail is the token, address says what it is of
    (NonFinite): x before routing weights, then the lowest token."""
    OVERFLOW = 7
    """Weighted outputs beyond the grid; detail is their number, at most COUNT_MAX."""
    ABORTED = 8
    """Ended by ABORT or soft reset."""
    WATCHDOG = 9
    """No progress for WATCHDOG cycles."""


class NonFinite(enum.IntEnum):
    """What is not finite: the address of a completion with NONFINITE."""

    X = 0
    """The token's x."""
    ROUTING_WEIGHT = 1
    """A weight of one of its pairs; weights of skipped ids are not looked at."""


class LayerKind(enum.IntEnum):
    """What a layer's images hold."""

    EXPERTS = 0
    """Gated experts: gate/up section, then down section."""
    LINEAR = 1
    """One matrix: only a down section, applied to x (GEMM)."""


class Activation(enum.IntEnum):
    """Activation of a gated expert."""

    SILU = 0


@dataclass(frozen=True)
class Field:
    """One field: ``bits`` from bit ``offset`` of the structure; ``signed`` two's complement."""

    name: str
    offset: int
    bits: int
    text: str
    signed: bool = False

    @property
    def word(self) -> int:
        """Index of the 32-bit word it starts in: what a completion's detail names."""
        return self.offset // 32


def _fields(
    *rows: tuple[str, int, int, int, str] | tuple[str, int, int, int, str, bool],
) -> tuple[Field, ...]:
    return tuple(
        Field(name, 32 * word + bit, bits, text, *rest)
        for name, word, bit, bits, text, *rest in rows
    )


SUBMISSION = _fields(
    ("opcode", 0, 0, 8, "What to do (Opcode)."),
    ("tag", 0, 16, 16, "Returned in the completion."),
    ("tokens", 1, 0, 32, "Tokens, 1 to max_tokens."),
    (
        "top_k",
        2,
        0,
        32,
        "Experts of a token, 1 to 16; tokens * top_k at most max_assignments. GEMM: 1.",
    ),
    ("layer_address", 4, 0, 64, "Layer descriptor; 64-byte aligned."),
    ("x_address", 6, 0, 64, "float32 (tokens, d_in), rows contiguous; 64-byte aligned."),
    (
        "ids_address",
        8,
        0,
        64,
        "int32 (tokens, top_k); negative or >= num_experts: skipped. 64-byte aligned.",
    ),
    ("weights_address", 10, 0, 64, "float32 (tokens, top_k); 64-byte aligned."),
    ("y_address", 12, 0, 64, "float32 (tokens, d_out), written; 64-byte aligned."),
    ("workspace_address", 14, 0, 64, "8 * tokens * d_out bytes for partial sums; 64-byte aligned."),
)

LAYER = _fields(
    ("kind", 0, 0, 8, "LayerKind."),
    ("format", 0, 8, 8, "Weight format code."),
    ("planes", 0, 16, 8, "Activation planes: 1 (a8) or 2 (a16)."),
    ("activation", 0, 24, 8, "Activation."),
    ("num_experts", 1, 0, 32, "Experts, 1 to max_experts. LINEAR: 1."),
    ("d_in", 2, 0, 32, "Elements of x; a multiple of 32, at most max_dim."),
    (
        "d_expert",
        3,
        0,
        32,
        "Elements of h; a multiple of 32, at most max_dim. LINEAR: equal to d_in.",
    ),
    ("d_out", 4, 0, 32, "Elements of y; a multiple of 32, at most max_dim."),
    (
        "grid_exponent",
        5,
        0,
        32,
        f"LSB of the output grid is 2**grid_exponent; {GRID_EXPONENTS[0]} to {GRID_EXPONENTS[-1]}.",
        True,
    ),
    ("stride", 6, 0, 32, "Bytes from one image to the next; a multiple of 64."),
    ("image_address", 8, 0, 64, "First word of expert 0, behind its header; 64-byte aligned."),
)

COMPLETION = _fields(
    ("tag", 0, 0, 16, "Of the submission."),
    ("status", 0, 16, 8, "Status."),
    (
        "phase",
        0,
        24,
        1,
        "Inverts on each pass around the ring, first 1; the rest may come later: see CQ_TAIL.",
    ),
    ("detail", 1, 0, 32, "What the status says."),
    ("address", 2, 0, 64, "What the status says."),
    ("cycles", 4, 0, 64, "Clock cycles from fetching the submission to writing this."),
    (
        "underflows",
        6,
        0,
        32,
        "Weighted outputs that were not zero and are zero on the grid; OK, NONFINITE, OVERFLOW.",
    ),
)

COUNT_MAX = (1 << 32) - 1
"""Where counts in a completion end: that many, or more."""


def encode(fields: tuple[Field, ...], values: Mapping[str, int]) -> bytes:
    """Return the 64 bytes of a structure; fields not named are 0.

    Raises
    ------
    CommandError
        Unknown field, or a value that does not fit it.
    """
    by_name = {field.name: field for field in fields}
    word = 0
    for name, value in values.items():
        field = by_name.get(name)
        if field is None:
            raise CommandError(f"field must be one of {', '.join(by_name)}, not {name!r}")
        low, high = (
            (-(1 << (field.bits - 1)), 1 << (field.bits - 1))
            if field.signed
            else (0, 1 << field.bits)
        )
        if not low <= value < high:
            raise CommandError(f"{name} must be from {low} to {high - 1}, not {value}")
        word |= (int(value) & ((1 << field.bits) - 1)) << field.offset
    return word.to_bytes(ENTRY_BYTES, "little")


def decode(fields: tuple[Field, ...], data: bytes) -> dict[str, int]:
    """Return the fields of a structure."""
    word = int.from_bytes(data[:ENTRY_BYTES], "little")
    out = {}
    for field in fields:
        value = word >> field.offset & ((1 << field.bits) - 1)
        out[field.name] = (
            value - (1 << field.bits) if field.signed and value >> (field.bits - 1) else value
        )
    return out
