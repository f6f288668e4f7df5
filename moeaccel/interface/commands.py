"""Commands, layer descriptors, expert tables and completions: 64-byte little-endian structures in
device memory, described once.

Each field carries its limits. From the tables below come the hardware's field checks, the golden
device's, the driver's encoders and messages, the C header and the documentation.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from moeaccel.config import BLOCK, TOP_K_MAX, AcceleratorConfig
from moeaccel.errors import CommandError
from moeaccel.router.choices import GROUPS_MAX, Gates, GroupScore, Renormalize, Score

ENTRY_BYTES = 64
"""Bytes of a submission, a completion, a layer descriptor and an entry of an expert table."""

MOE_ALIGNMENT = 256
"""Of the three descriptors of a MOE: they end within the address space."""

MOE_PLANES = 2
"""Experts of a router's matrix that are added up to logits."""

RING_LOG2_MAX = 8
"""log2 of the entries that a ring may have at most."""

GRID_EXPONENTS = range(-100, 61)
"""Exponents that an output grid may have."""

SECTIONS_MAX = 2
"""Most sections of an expert."""


class Opcode(enum.IntEnum):
    """What a submission asks for."""

    NOP = 0
    """Complete at once."""
    EXPERTS = 1
    """y[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t]), routed by the host."""
    GEMM = 2
    """y[t] = expert[0](x[t]): every token, weight 1, no ids. With one section, y = x W^T."""
    FENCE = 3
    """Complete when every earlier command has completed."""
    ROUTE = 4
    """ids[t], weights[t] = router(logits[t]), both written; layer_address names a router."""
    MOE = 5
    """A whole layer in one command: logits[t] = matrix of the router * x[t]; ids[t], weights[t] =
    router(logits[t]), both written; y[t] as EXPERTS. layer_address names three descriptors, one
    behind the other: of the router's matrix, of the router, of the experts."""
    MOE_ROUTE = 6
    """As MOE, without its experts: ids and weights are written, y is not."""
    PREFETCH = 7
    """Bring the leading beats of experts into the expert buffer, where they are not there already:
    of those that ids name, in the order of EXPERTS; each takes the slot that was filled or used
    longest ago."""
    FORGET = 8
    """Empty the expert buffer: what follows reads weights as they are in memory now."""


ROUTER_OPCODES = (Opcode.ROUTE, Opcode.MOE, Opcode.MOE_ROUTE)
"""What only a device with a router knows."""

BUFFER_OPCODES = (Opcode.PREFETCH, Opcode.FORGET)
"""What only a device with an expert buffer knows."""

OPCODES_ALONE = (Opcode.NOP, Opcode.FENCE, Opcode.FORGET)
"""Those that have no job, and of which no other field is looked at."""

MOE_OPCODES = (Opcode.MOE, Opcode.MOE_ROUTE)
"""Those of which layer_address names three descriptors."""


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
    """A layer descriptor field out of range, an expert table that runs beyond the address space, or
    experts with another d_in than their router's matrix; detail is the index of its 32-bit word,
    address that of the descriptor."""
    WINDOW = 4
    """A burst outside the memory window was suppressed; address is its first byte. Of one stream of
    a command (ids; weights; expert table; images; x; rows of zeros; partial sums read; rows and
    partial sums written) the first such burst is named, of several that of the one that came
    first."""
    BUS_ERROR = 5
    """Memory answered with an error; address is the first byte of the burst (writes: 0), chosen as
    for WINDOW; of both, what came first."""
    NONFINITE = 6
    """NaN or infinity in what was computed with; detail is the token, address says what it is of
    (NonFinite): x before routing weights, then the lowest token."""
    OVERFLOW = 7
    """Outputs beyond the grid; detail is their number, at most COUNT_MAX, address says of what
    (Overflow)."""
    ABORTED = 8
    """Ended by ABORT. A soft reset writes no completions: drivers say this of what it ended."""
    WATCHDOG = 9
    """No progress for WATCHDOG cycles."""
    BAD_EXPERT = 10
    """An entry of the expert table, of an expert with tokens, has a field out of range, words that
    are not those of its sections, or an image that runs beyond the address space; detail is the
    expert, address the index of the entry's 32-bit word, 16 more in the router's matrix of a MOE.
    Of several such experts the first; y is
    undefined. Entries are read up to 17 experts ahead: where one of those behind it cannot be read,
    that may be named instead."""
    BAD_ROUTER = 11
    """A router descriptor field out of range, groups that are not those of its experts, experts
    that are not those of its matrix, or a table that runs beyond the address space; detail is the
    index of its 32-bit word, address that of the descriptor."""


class NonFinite(enum.IntEnum):
    """What is not finite: the address of a completion with NONFINITE."""

    X = 0
    """The token's x."""
    ROUTING_WEIGHT = 1
    """A weight of one of its pairs; weights of skipped ids are not looked at."""
    LOGIT = 2
    """One of its logits."""


class Overflow(enum.IntEnum):
    """What does not fit: the address of a completion with OVERFLOW."""

    OUTPUT = 0
    """Weighted outputs, and nothing else."""
    LOGIT = 1
    """Logits, and perhaps outputs."""


class ElementType(enum.IntEnum):
    """How elements of x, or of y, lie in memory."""

    FLOAT32 = 0
    """4 bytes."""
    BFLOAT16 = 1
    """2 bytes: the upper half of a float32. Sums of y are rounded to it once, half to even."""

    @property
    def bytes(self) -> int:
        """Bytes of an element."""
        return 2 if self is ElementType.BFLOAT16 else 4


class Selection(enum.IntEnum):
    """What orders the experts of a token."""

    LOGIT = 0
    """The logit."""
    BIASED_SCORE = 1
    """The score plus the selection bias."""
    BIASED_LOGIT = 2
    """The logit plus the selection bias."""
    MIXER = 3
    """The logit; weights are those of sparsemixer, and what is in the table of keys is not looked
    at."""


class Operand(enum.IntEnum):
    """What the rows of a section are multiplied with."""

    X = 0
    """The token's x, d_in elements."""
    HIDDEN = 1
    """The token's h, d_expert elements, which sections before have made."""


class Sink(enum.IntEnum):
    """Where the results of a section go, and so how many rows it has."""

    ACTIVATION = 0
    """Pairs of rows, 2 * d_expert: h = activation(gate) * up."""
    COMBINE = 1
    """d_out rows: weighted, and added to the token's y."""
    ACTIVATION_ROWS = 2
    """Rows by themselves, d_expert: h = activation(row)."""
    ACTIVATION_PRODUCT = 3
    """Fours of rows, 4 * d_expert: h = activation(gate) * up * second up. The third is not looked
    at: the order is gate, up, zeros, second up."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a field may hold.

    Parameters
    ----------
    values : tuple of int or :class:`str`, optional
        One of these; a property of :class:`AcceleratorConfig`, by its name.
    low, high : :class:`int` or :class:`str`
        From ``low`` to ``high``, when there are no ``values``.
    multiple : :class:`int`
        And a multiple of that, a power of two.
    when : tuple of str and int, optional
        Only where another field of the structure has that value.
    """

    values: tuple[int, ...] | str | None = None
    low: int = 0
    high: int | str = (1 << 64) - 1
    multiple: int = 1
    when: tuple[str, int] | None = None

    def codes(self, config: AcceleratorConfig) -> tuple[int, ...] | None:
        """Return the values that a device of this configuration knows, if they are listed."""
        return getattr(config, self.values) if isinstance(self.values, str) else self.values

    def highest(self, config: AcceleratorConfig) -> int:
        """Return the largest value for a device of this configuration."""
        return getattr(config, self.high) if isinstance(self.high, str) else self.high

    def allows(self, value: int, config: AcceleratorConfig) -> bool:
        """Return whether a device of this configuration takes the value."""
        codes = self.codes(config)
        if codes is not None:
            return value in codes
        return self.low <= value <= self.highest(config) and value % self.multiple == 0

    def applies(self, structure: Mapping[str, int]) -> bool:
        """Return whether it is a limit of this structure."""
        return self.when is None or structure[self.when[0]] == self.when[1]

    def text(self, config: AcceleratorConfig | None = None) -> str:
        """Return it in words: with names, or with the numbers of a configuration."""
        if isinstance(self.values, str):
            codes = self.codes(config) if config else None
            what = f"one of {self.values}" if codes is None else _listed(codes)
        elif self.values is not None:
            what = _listed(self.values)
        else:
            high = self.highest(config) if config else self.high
            what = ("" if high == (1 << 64) - 1 else f"from {self.low} to {high}")
            if self.multiple > 1:
                what = " ".join(filter(None, (f"a multiple of {self.multiple}", what)))
        return what + (f" where {self.when[0]} is {self.when[1]}" if self.when else "")


def _listed(values: Iterable[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True)
class Field:
    """One field: ``bits`` from bit ``offset`` of the structure; ``signed`` two's complement.

    ``limits``: all that apply must hold; a field without any may hold anything.
    """

    name: str
    offset: int
    bits: int
    text: str
    limits: tuple[Limit, ...] = ()
    signed: bool = False

    @property
    def word(self) -> int:
        """Index of the 32-bit word it starts in: what a completion's detail names."""
        return self.offset // 32


def _field(name: str, word: int, bit: int, bits: int, text: str, *limits: Limit,
           signed: bool = False) -> Field:
    return Field(name, 32 * word + bit, bits, text, limits, signed)


def _address(name: str, word: int, text: str, *limits: Limit) -> Field:
    return _field(name, word, 0, 64, text, Limit(high="max_address", multiple=ENTRY_BYTES), *limits)


_ELEMENT_TYPE = Limit(values=tuple(ElementType))
_DIMENSION = Limit(low=BLOCK, high="max_dim", multiple=BLOCK)

SUBMISSION = (
    _field("opcode", 0, 0, 8, "What to do (Opcode)."),
    _field("tag", 0, 16, 16, "Returned in the completion."),
    _field("tokens", 1, 0, 32, "Tokens.", Limit(low=1, high="max_tokens")),
    _field("top_k", 2, 0, 32, "Experts of a token; tokens * top_k at most max_assignments.",
           Limit(low=1, high=TOP_K_MAX), Limit(values=(1,), when=("opcode", Opcode.GEMM))),
    _field("x_type", 3, 0, 8, "Elements of x (ElementType).", _ELEMENT_TYPE,
           Limit(values=(ElementType.FLOAT32,), when=("opcode", Opcode.ROUTE))),
    _field("y_type", 3, 8, 8, "Elements of y (ElementType).", _ELEMENT_TYPE),
    _address("layer_address", 4, "Layer descriptor; ROUTE: router descriptor; MOE: three of them.",
             *(Limit(high="max_address", multiple=MOE_ALIGNMENT, when=("opcode", opcode))
               for opcode in MOE_OPCODES)),
    _address("x_address", 6, "(tokens, d_in) of x_type, rows contiguous. ROUTE: logits, a "
             "multiple of 32 in each row, those of no expert not looked at."),
    _address("ids_address", 8,
             "int32 (tokens, top_k); negative or >= num_experts: skipped. GEMM: not read. PREFETCH "
             "reads nothing else but layer and entries. ROUTE, MOE: written, up to a multiple of "
             "64 bytes; -1: no expert."),
    _address("weights_address", 10,
             "float32 (tokens, top_k). GEMM: not read. ROUTE, MOE: written, as ids."),
    _address("y_address", 12, "(tokens, d_out) of y_type, written."),
    _address("workspace_address", 14,
             "8 * tokens * d_out bytes for partial sums; MOE: of the larger d_out; MOE_ROUTE "
             "leaves logits at its begin."),
)

LAYER = (
    _field("planes", 0, 0, 8, "Activation planes: 1 (a8) or 2 (a16).", Limit(values=(1, 2))),
    _field("num_experts", 1, 0, 32, "Experts.", Limit(low=1, high="max_experts")),
    _field("d_in", 2, 0, 32, "Elements of x.", _DIMENSION),
    _field("d_out", 3, 0, 32, "Elements of y.", _DIMENSION),
    _field("grid_exponent", 4, 0, 32, "LSB of the output grid is 2**grid_exponent.",
           Limit(low=GRID_EXPONENTS[0], high=GRID_EXPONENTS[-1]), signed=True),
    _address("table_address", 6, "Expert table: an entry of 64 bytes for each expert."),
)


def _section(index: int) -> tuple[Field, ...]:
    """Return the fields of a section in an entry: x to h to y, or x to y alone."""
    word = 4 + 3 * index
    last = SECTIONS_MAX - 1
    if index < last:
        here: tuple[str, int] | None = None
        follows = (
            Limit(values=(Sink.COMBINE,), when=("sections", 1)),
            Limit(values="activation_sinks", when=("sections", 2)))
    else:
        here = ("sections", 2)
        follows = (Limit(values=(Sink.COMBINE,), when=("sections", 2)),)
    operand = Operand.HIDDEN if index else Operand.X
    return (
        _field(f"format{index}", word, 0, 8, "Weight format code.",
               Limit(values="format_codes", when=here)),
        _field(f"operand{index}", word, 8, 8, "Operand.", Limit(values=(operand,), when=here)),
        _field(f"sink{index}", word, 16, 8, "Sink.", *follows),
        _field(f"bias{index}", word, 24, 8,
               "1: each row has a bias beside its exponent; 0: none has.",
               Limit(values="bias_codes", when=here)),
        _field(f"words{index}", word + 1, 0, 32, "Array words of the section (docs/images.md)."),
    )


EXPERT = (
    _field("sections", 0, 0, 8, "Sections of the image, in the order in which they are computed.",
           Limit(values=tuple(range(1, SECTIONS_MAX + 1)))),
    _field("activation", 0, 8, 8, "Activation code.",
           Limit(values="activation_codes", when=("sections", 2))),
    _field("flags", 0, 16, 16, "None is defined.", Limit(values=(0,))),
    _field("d_expert", 1, 0, 32, "Elements of h; experts of a layer may differ in it.",
           Limit(low=BLOCK, high="max_dim", multiple=BLOCK, when=("sections", 2))),
    _address("image_address", 2, "First word of the image, behind its header."),
    *(field for index in range(SECTIONS_MAX) for field in _section(index)),
    _field("limit", 10, 0, 16,
           "Most that gate rows may be, and how far from 0 up rows, at the activation: bfloat16; "
           "0, or a subnormal number: none.",
           Limit(low=0, high=0x7F7F, when=("sections", 2))),
    _field("gate_limit", 11, 0, 32,
           "Most that gate rows may be, where that is not the limit: float32 with at most 17 "
           "significant bits; 0, or a subnormal number: the limit.",
           Limit(low=0, high=0x7F7FFF80, multiple=1 << 7, when=("sections", 2))),
)

COMPLETION = (
    _field("tag", 0, 0, 16, "Of the submission."),
    _field("status", 0, 16, 8, "Status."),
    _field("phase", 0, 24, 1,
           "Inverts on each pass around the ring, first 1; the rest may come later: see CQ_TAIL."),
    _field("detail", 1, 0, 32, "What the status says."),
    _field("address", 2, 0, 64, "What the status says."),
    _field("cycles", 4, 0, 64, "Clock cycles from fetching the submission to writing this."),
    _field("underflows", 6, 0, 32,
           "Weighted outputs that were not zero and are zero on the grid; OK, NONFINITE, "
           "OVERFLOW."),
)

_MIXER = ("selection", Selection.MIXER)
_WITHOUT_MIXER = Limit(values=(0,), when=_MIXER)

ROUTER = (
    _field("score", 0, 0, 8, "Score code.", Limit(values="router_codes"),
           Limit(values=(Score.SIGMOID,), when=("gates", Gates.SUM))),
    _field("renormalize", 0, 8, 8, "Renormalisation code.",
           Limit(values=tuple(map(int, Renormalize))),
           Limit(values=(Renormalize.SOFTMAX_TOP_K,), when=("score", Score.IDENTITY)),
           Limit(values=(Renormalize.NONE,), when=_MIXER),
           Limit(values=tuple(r for r in Renormalize if r is not Renormalize.SOFTMAX_TOP_K),
                 when=("gates", Gates.SUM))),
    _field("group_score", 0, 16, 8, "Code of the groups' score.",
           Limit(values=tuple(map(int, GroupScore))),
           Limit(values=(GroupScore.MAX,), when=("score", Score.IDENTITY)),
           Limit(values=(GroupScore.MAX,), when=("selection", Selection.BIASED_LOGIT))),
    _field("selection", 0, 24, 8, "What orders the experts (Selection).",
           Limit(values="selection_codes"),
           Limit(values=(Selection.LOGIT, Selection.BIASED_LOGIT),
                 when=("score", Score.IDENTITY))),
    _field("num_experts", 1, 0, 32, "Experts.", Limit(low=1, high="max_experts")),
    _field("groups", 2, 0, 16, "Groups; 1: none.", Limit(low=1, high=GROUPS_MAX),
           Limit(values=(1,), when=_MIXER)),
    _field("group_size", 2, 16, 16, "Experts of a group; groups * group_size is num_experts.",
           Limit(low=1, high="max_experts"),
           Limit(low=2, high="max_experts", when=("group_score", GroupScore.TOP2_SUM))),
    _field("keep_groups", 3, 0, 16,
           "Groups that are kept, at most groups.",
           Limit(low=1, high="router_top_k")),
    _field("tables", 3, 16, 8, "1: there is a table; 0: nothing is added.", Limit(values=(0, 1))),
    _field("shared", 3, 24, 8,
           "Experts behind those routed to that every token goes to as well, the last of its "
           "top_k; gates says with what weight. The others are at most keep_groups * group_size "
           "and router_top_k.",
           Limit(low=0, high=TOP_K_MAX - 1),
           *(Limit(low=1, high=TOP_K_MAX - 1, when=("gates", gates)) for gates in Gates if gates)),
    _field("scale", 4, 0, 32, "What weights are multiplied with: float32, from 2**-20 to 2**20.",
           Limit(low=0x35800000, high=0x49800000)),
    _field("epsilon", 8, 0, 64, "In units of 2**-36, at most 1; sum_eps and clamp.",
           Limit(low=0, high=1 << 36),
           *(Limit(values=(0,), when=("renormalize", r)) for r in (
               Renormalize.NONE, Renormalize.SUM, Renormalize.SOFTMAX_TOP_K))),
    _address("table_address", 6,
             "8 bytes for each expert: what is added to its logit, int32 in units of 2**-20; its "
             "selection bias, int32 in units of 2**-22 (of 2**-20 where selection is 2), the least "
             "number: never chosen. Behind the table, or alone, with prior: residents, a bit for "
             "each expert from bit 0 on. Both are filled up to a multiple of 64 bytes."),
    _field("threshold", 10, 0, 32,
           "In units of 2**-16: the chosen with a score below that part of the first's are "
           "dropped; 0: none.", Limit(low=0, high="threshold_max"), _WITHOUT_MIXER),
    _field("top_p", 11, 0, 32,
           "In units of 2**-16: the chosen behind that share of the sum of their scores are "
           "dropped; 0: none.", Limit(low=0, high="top_p_max"), _WITHOUT_MIXER),
    _field("prior", 12, 0, 32, "What is added to the keys of residents, in their units; 0: there "
           "are none.", Limit(low=0, high="prior_max"), _WITHOUT_MIXER),
    _field("capacity", 13, 0, 32, "Tokens of the command that an expert takes; 0: all.",
           Limit(low=0, high="capacity_max"), _WITHOUT_MIXER,
           *(Limit(values=(0,), when=("gates", gates)) for gates in Gates if gates)),
    _field("mixer", 14, 0, 32,
           "Where selection is 3, and top_k 2: how far a logit may be below the largest to share "
           "in the sum, as a part of the larger of both, in units of 2**-20.",
           Limit(low=0, high=1 << 20)),
    _field("prior_keep", 15, 0, 8,
           "1: the expert of the largest logit is chosen in any case, and first.",
           Limit(low=0, high="prior_keep_max"), _WITHOUT_MIXER),
    _field("capacity_order", 15, 8, 8, "Code of who is first where there is a capacity.",
           Limit(low=0, high="capacity_order_max")),
    _field("gates", 15, 16, 8,
           "Code of what shared experts weigh; their logits, where there are some, are behind "
           "those of the experts, together at most as many as those may be.",
           Limit(low=0, high="gates_max"), _WITHOUT_MIXER),
)

MOE_BLOCK = (LAYER, ROUTER, LAYER)
"""What layer_address names in a MOE: the layer of the router's matrix, whose outputs are logits and
whose experts 0 and 1 are added up with weights of 1; the router; the experts. So three descriptors
are read in the time of one."""

STRUCTURES = {"submission": SUBMISSION, "layer descriptor": LAYER, "expert table entry": EXPERT,
              "completion": COMPLETION, "router descriptor": ROUTER}
"""All of them, by the names that people read."""

COUNT_MAX = (1 << 32) - 1
"""Where counts in a completion end: that many, or more."""


def opcodes(config: AcceleratorConfig) -> tuple[Opcode, ...]:
    """Return the opcodes that a device of this configuration knows."""
    return tuple(code for code in Opcode
                 if (config.router or code not in ROUTER_OPCODES)
                 and (config.buffer_slots or code not in BUFFER_OPCODES))


def field_of(structure: tuple[Field, ...], name: str) -> Field:
    """Return a structure's field by its name."""
    return next(field for field in structure if field.name == name)


def bad_field(
    structure: tuple[Field, ...], values: Mapping[str, int], config: AcceleratorConfig
) -> tuple[Field, Limit] | None:
    """Return the field that a device of this configuration refuses, in the lowest word, and why.

    What fields of several structures say together (arrays that end within the address space, words
    that are those of a section) is not looked at, but tokens * top_k is.
    """
    for field in sorted(structure, key=lambda f: f.word):
        for limit in field.limits:
            if limit.applies(values) and not limit.allows(values[field.name], config):
                return field, limit
        if field.name == "top_k" and values["tokens"] * values["top_k"] > config.max_assignments:
            return field, Limit(low=1, high=max(1, config.max_assignments // values["tokens"]))
    return None


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


def decoder(fields: tuple[Field, ...]) -> Callable[[bytes], list[int]]:
    """Return what gives the fields of one structure, in their order, in a fourth of the time of
    :func:`decode`; none is signed."""
    assert not any(field.signed for field in fields)
    parts = [(field.offset, (1 << field.bits) - 1) for field in fields]

    def decode_one(data: bytes) -> list[int]:
        word = int.from_bytes(data, "little")
        return [word >> offset & mask for offset, mask in parts]

    return decode_one
