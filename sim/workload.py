"""Lay out a command in device memory, byte by byte, for benches that have no driver.

A :class:`Layout` hands out addresses and collects what has to be written there; whoever owns the
memory (a bus model, a co-simulation) takes the pieces. It is deliberately not the driver: a bench
that shares no code with :mod:`moeaccel.host` finds what both would get wrong together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from moeaccel.arithmetic import to_bfloat16
from moeaccel.config import AcceleratorConfig
from moeaccel.formats import QuantisedMatrix
from moeaccel.golden.experts import DEFAULT_GRID_EXPONENT
from moeaccel.image import (
    ALIGNMENT,
    Expert,
    ExpertShape,
    LinearShape,
    build_image,
    build_linear_image,
    expert_table,
)
from moeaccel.image.sections import Bytes
from moeaccel.interface.commands import LAYER, ElementType, encode
from moeaccel.interface.registers import REGISTERS

LINE = 64
"""Alignment of everything that a command names, and bytes of a ring entry."""


class Layout:
    """Addresses from `base` up, never given back.

    Parameters
    ----------
    config : AcceleratorConfig
    base, limit : int
        The range, both multiples of 4096; also what the memory window is to be.
    """

    def __init__(self, config: AcceleratorConfig, *, base: int = 0x1000,
                 limit: int = 0x100_0000) -> None:
        self.config = config
        self.base, self.limit = base, limit
        self._next = base
        self._pieces: list[tuple[int, bytes]] = []

    def reserve(self, count: int, *, alignment: int = LINE) -> int:
        """Return the address of `count` bytes of which nothing is known."""
        address = -(-self._next // alignment) * alignment
        self._next = address + -(-count // LINE) * LINE
        if self._next > self.limit:
            raise ValueError(f"Layout must end below {self.limit:#x}, not at {self._next:#x}")
        return address

    def place(self, data: bytes | npt.NDArray, *, alignment: int = LINE) -> int:
        """Return the address where the bytes, or an array's bytes in C order, will be."""
        raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        address = self.reserve(len(raw), alignment=alignment)
        self._pieces.append((address, raw))
        return address

    def take(self) -> list[tuple[int, bytes]]:
        """Return the (address, bytes) placed since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def place_experts(self, experts: Sequence[Expert], *, planes: int,
                      grid_exponent: int = DEFAULT_GRID_EXPONENT) -> dict[str, int]:
        """Place the images and the table of a layer and return the fields of its descriptor."""
        array = self.config.row_multipliers, self.config.channels
        return self._place_layer(
            [expert.shape(*array) for expert in experts],
            [partial(build_image, expert.gate_up, expert.down) for expert in experts],
            planes=planes, grid_exponent=grid_exponent)

    def place_linear(self, matrix: QuantisedMatrix, *, planes: int,
                     grid_exponent: int = DEFAULT_GRID_EXPONENT) -> dict[str, int]:
        """Place the image and the table of a linear layer and return the fields of its descriptor.
        """
        config = self.config
        d_out, d_in = matrix.integers.shape
        shape = LinearShape(
            matrix.format, d_out, d_in, config.row_multipliers, config.channels,
            matrix.bias is not None)
        return self._place_layer([shape], [partial(build_linear_image, matrix)], planes=planes,
                                 grid_exponent=grid_exponent)

    def _place_layer(self, shapes: Sequence[ExpertShape | LinearShape],
                     images: Sequence[Callable[..., Bytes]], *, planes: int,
                     grid_exponent: int) -> dict[str, int]:
        config, words = self.config, []
        for shape, image in zip(shapes, images, strict=True):
            address = self.reserve(shape.memory_bytes, alignment=ALIGNMENT)
            self._pieces += [
                (config.device_address(channel, address),
                 image(config.row_multipliers, channel=channel, channels=config.channels).tobytes())
                for channel in range(config.channels)]
            words.append(address + shape.header_bytes)
        sections = shapes[0].sections
        return {
            "planes": planes, "num_experts": len(shapes), "d_in": sections[0].k,
            "d_out": sections[-1].rows, "grid_exponent": grid_exponent,
            "table_address": self.place(expert_table(shapes, words))}

    def place_command(self, layer: dict[str, int], x: npt.NDArray[np.float32],
                      ids: npt.NDArray[np.integer] | None = None,
                      weights: npt.NDArray[np.float32] | None = None, *,
                      x_type: ElementType = ElementType.FLOAT32,
                      y_type: ElementType = ElementType.FLOAT32) -> dict[str, int]:
        """Place what a command needs and return the fields of its submission, but for the opcode.

        y and the workspace are placed as well, filled with ones: nothing may depend on what they
        hold. ``x`` holds bfloat16 numbers where it is stored as such.
        """
        tokens, d_out = x.shape[0], layer["d_out"]
        stored = to_bfloat16(x) if x_type is ElementType.BFLOAT16 else x.astype("<f4")
        fields = {
            "tokens": tokens, "top_k": 1 if ids is None else ids.shape[1],
            "layer_address": self.place(encode(LAYER, layer)),
            "x_type": x_type, "y_type": y_type, "x_address": self.place(stored),
        }
        if ids is not None and weights is not None:
            fields["ids_address"] = self.place(ids.astype("<i4"))
            fields["weights_address"] = self.place(weights.astype("<f4"))
        fields["y_address"] = self.place(b"\xff" * (y_type.bytes * tokens * d_out))
        fields["workspace_address"] = self.place(b"\xff" * (8 * tokens * d_out))
        return fields


def random_experts(draw: np.random.Generator, count: int, d_model: int, d_expert: int,
                   weight_format: str, *, spread: int = 0) -> list[Expert]:
    """Return experts with Gaussian weights whose outputs are about as large as their inputs.

    Parameters
    ----------
    draw : numpy.random.Generator
    count, d_model, d_expert, weight_format
        Of the layer.
    spread : int
        Blocks of 32 weights are made smaller by powers of two, down to ``2**-spread``, and some
        are zero, so that scales use their whole range.
    """
    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        values = draw.standard_normal((rows, columns)) * (2 / np.sqrt(columns))
        if spread:
            scale = np.exp2(-draw.integers(0, spread + 1, (rows, columns // 32)))
            scale *= draw.random(scale.shape) < 0.95
            values *= np.repeat(scale, 32, axis=1)
        return values.astype(np.float32)

    return [Expert.quantise(matrix(2 * d_expert, d_model), matrix(d_model, d_expert), weight_format)
            for _ in range(count)]


def register_writes(**values: int) -> list[tuple[int, int]]:
    """Return (address, value) of register writes by name, in order.

    A name without its ``_LO`` and ``_HI`` stands for both halves, low first.
    """
    writes = []
    for name, value in values.items():
        if name in REGISTERS:
            writes.append((REGISTERS[name].address, value))
        else:
            writes += [(REGISTERS[f"{name}_LO"].address, value & 0xFFFF_FFFF),
                       (REGISTERS[f"{name}_HI"].address, value >> 32)]
    return writes


def start_writes(layout: Layout, *, submissions: int, completions: int,
                 ring_log2: int) -> list[tuple[int, int]]:
    """Return the register writes that make a device ready after its reset."""
    return register_writes(
        WINDOW_BASE=layout.base, WINDOW_LIMIT=layout.limit,
        SQ_BASE=submissions, CQ_BASE=completions, RING_LOG2=ring_log2, SQ_TAIL=0, CQ_HEAD=0,
        IRQ_STATUS=3, IRQ_ENABLE=1, ENABLE=1)
