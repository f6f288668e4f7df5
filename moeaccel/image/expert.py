"""Experts and linear layers: what an image holds before packing, and the sizes of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import activation
from moeaccel.errors import FormatError, about
from moeaccel.formats import (
    QuantisedMatrix,
    WeightFormat,
    check_dims,
    prune as pruned,
    quantise,
    weight_format,
    whole_blocks,
)
from moeaccel.image.sections import Section, stored_bytes

__all__ = ["ALIGNMENT", "HEADER_BYTES", "Expert", "ExpertShape", "ImageShape", "LinearShape",
           "gate_limit_bits", "interleave_gate_up", "limit_bits"]

HEADER_BYTES = 64
ALIGNMENT = 4096
"""Images start on a page, so that their bursts are whole."""


class ImageShape(ABC):
    """What an image holds, as sizes; bytes and words are those of a part."""

    @property
    @abstractmethod
    def sections(self) -> tuple[Section, ...]:
        """The sections, in the order in which they lie and are computed."""

    @property
    def header_bytes(self) -> int:
        """Bytes before the first word."""
        return max(HEADER_BYTES, self.sections[0].word_bytes)

    @property
    def image_bytes(self) -> int:
        """Bytes of the image, or of each part."""
        return self.header_bytes + sum(s.words * s.word_bytes for s in self.sections)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the image occupies on each channel: whole pages."""
        return -(-self.image_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class ExpertShape(ImageShape):
    """Shape of an expert: the two sections of its image.

    Any dimensions: the sections are of whole blocks, filled up with zeros.

    Parameters
    ----------
    format : :class:`WeightFormat`
        Of gate and up; of down, too, without a ``down_format``.
    d_model, d_expert : :class:`int`
    row_multipliers, channels : :class:`int`
        Of the device that will read it.
    down_format : :class:`WeightFormat`, optional
        Of down where it differs; one that does not becomes None, so that equal shapes are equal.
    activation : :class:`str`
        One of :data:`moeaccel.activations.ACTIVATIONS`.
    gated : :class:`bool`
        h = activation(gate) * up; else there are no up rows, and h = activation(gate).
    limit : :class:`float`, optional
        Of the rows before the activation: gate is at most that, up at most that far from 0.
    gate_limit : :class:`float`, optional
        Of the gate, where it is not ``limit``.
    second_up : :class:`bool`
        Gated, with second up rows: h = activation(gate) * up * second up (OpenMoE).
    gate_up_biased, down_biased : :class:`bool`
        Whether the rows of either have biases.

    Raises
    ------
    FormatError
        For a dimension below 1, an activation that there is not, a limit that is no positive
        bfloat16 number, and second up rows without gate rows.
    """

    format: WeightFormat
    d_model: int
    d_expert: int
    row_multipliers: int
    channels: int = 1
    _: KW_ONLY
    down_format: WeightFormat | None = None
    activation: str = "silu"
    gated: bool = True
    limit: float | None = None
    gate_limit: float | None = None
    second_up: bool = False
    gate_up_biased: bool = False
    down_biased: bool = False

    def __post_init__(self) -> None:
        check_dims(d_model=self.d_model, d_expert=self.d_expert)
        activation(self.activation)
        limit_bits(self.limit)
        gate_limit_bits(self.gate_limit)
        if self.second_up and not self.gated:
            raise FormatError("second_up must be False where experts are not gated, not True")
        if self.down_format == self.format:
            object.__setattr__(self, "down_format", None)

    @property
    def gate_up(self) -> Section:
        """Rows of d_model inputs, in the order of :func:`interleave_gate_up`."""
        return Section(
            self.format, self.rows_of_h * whole_blocks(self.d_expert), whole_blocks(self.d_model),
            self.row_multipliers, self.channels, self.gate_up_biased)

    @property
    def rows_of_h(self) -> int:
        """Rows for each element of h."""
        return 4 if self.second_up else 2 if self.gated else 1

    @property
    def down(self) -> Section:
        """d_model rows of d_expert inputs."""
        return Section(
            self.down_format or self.format, whole_blocks(self.d_model),
            whole_blocks(self.d_expert), self.row_multipliers, self.channels, self.down_biased)

    @property
    def sections(self) -> tuple[Section, ...]:
        """Gate and up, then down."""
        return self.gate_up, self.down

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights, scales, row exponents and biases without padding, in all parts."""
        rows = self.rows_of_h - self.second_up  # of four there are three
        return (stored_bytes(self.format, rows * self.d_expert, self.d_model,
                             biased=self.gate_up_biased)
                + stored_bytes(self.down.format, self.d_model, self.d_expert,
                               biased=self.down_biased))


@dataclass(frozen=True)
class LinearShape(ImageShape):
    """Shape of a linear layer's image: one section, ``d_out`` rows of ``d_in`` inputs each, both
    filled up with zeros to whole blocks."""

    format: WeightFormat
    d_out: int
    d_in: int
    row_multipliers: int
    channels: int = 1
    biased: bool = False

    def __post_init__(self) -> None:
        check_dims(d_out=self.d_out, d_in=self.d_in)

    @property
    def section(self) -> Section:
        """The only section."""
        return Section(self.format, whole_blocks(self.d_out), whole_blocks(self.d_in),
                       self.row_multipliers, self.channels, self.biased)

    @property
    def sections(self) -> tuple[Section, ...]:
        """The only one."""
        return (self.section,)

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights, scales, row exponents and biases without padding, in all parts."""
        return stored_bytes(self.format, self.d_out, self.d_in, biased=self.biased)


def limit_bits(limit: float | None) -> int:
    """Return a limit as an expert table entry has it: the bits of a bfloat16, 0 for none.

    Raises
    ------
    FormatError
        If it is not a positive bfloat16 number.
    """
    if limit is None:
        return 0
    number = isinstance(limit, int | float | np.number)
    bits = int(np.float32(limit).view(np.uint32)) if number else 0
    if not 0x80 <= bits >> 16 <= 0x7F7F or bits & 0xFFFF or float(np.float32(limit)) != limit:
        raise FormatError(
            f"limit must be a positive number with at most 8 significant bits, such as 7.0, "
            f"not {limit!r}")
    return bits >> 16


def gate_limit_bits(limit: float | None) -> int:
    """Return a limit of the gate as an expert table entry has it: a float32, 0 for none.

    Raises
    ------
    FormatError
        If it is not a positive number of 17 significant bits.
    """
    if limit is None:
        return 0
    number = isinstance(limit, int | float | np.number)
    bits = int(np.float32(limit).view(np.uint32)) if number else 0
    if not 1 << 23 <= bits <= 0x7F7FFF80 or bits & 0x7F or float(np.float32(limit)) != limit:
        raise FormatError("gate_limit must be a positive number with at most 17 significant bits, "
                          f"such as 7.0, not {limit!r}")
    return bits


def interleave_gate_up(gate_up: NDArray[np.floating], parts: int = 2) -> NDArray[np.floating]:
    """Reorder rows, or their biases, (rows,) or (rows, H), to that of images.

    That of 2 ``parts``, ``[gate; up]``, is g0, u0, g1, u1, ...; of 3, ``[gate; up; second up]``,
    g0, u0, 0, v0, g1, u1, 0, v1, ...; of 1, gate alone, it is the same.
    """
    split = list(gate_up.reshape(parts, -1, *gate_up.shape[1:]))
    if parts == 3:
        split.insert(2, np.zeros_like(split[0]))
    return np.stack(split, axis=1).reshape(-1, *gate_up.shape[1:])


@dataclass(frozen=True)
class Expert:
    """One quantised expert: what an image holds, before packing, and how rows become h.

    Parameters
    ----------
    gate_up : :class:`QuantisedMatrix`
        (2 d_expert, d_model), rows in the order of :func:`interleave_gate_up`; (4 d_expert,
        d_model) with second up rows; (d_expert, d_model), not gated.
    down : :class:`QuantisedMatrix`
        (d_model, d_expert); its format may be another one.
    activation, limit, gate_limit
        As in :class:`ExpertShape`.
    """

    gate_up: QuantisedMatrix
    down: QuantisedMatrix
    activation: str = "silu"
    limit: float | None = None
    gate_limit: float | None = None

    @property
    def rows_of_h(self) -> int:
        """Rows for each element of h."""
        return self.gate_up.integers.shape[0] // self.down.integers.shape[1]

    @property
    def gated(self) -> bool:
        """Whether there are up rows."""
        return self.rows_of_h > 1

    @classmethod
    def quantise(
        cls, gate_up: NDArray[np.floating], down: NDArray[np.floating], name: str | WeightFormat,
        *, down_format: str | WeightFormat | None = None, activation: str = "silu",
        limit: float | None = None, gate_limit: float | None = None, quantiser: str = "search",
        moments: tuple[NDArray[np.floating] | None, NDArray[np.floating] | None] = (None, None),
        prune: str | None = None, channels: int = 1,
        gate_up_bias: NDArray[np.floating] | None = None,
        down_bias: NDArray[np.floating] | None = None,
    ) -> Expert:
        """Quantise float weights: ``gate_up`` (2 I, H) as ``[gate; up]``, (I, H), or (3 I, H) as
        ``[gate; up; second up]``, ``down`` (H, I); biases, one a row, become bfloat16.

        ``quantiser`` and ``moments``, those of x and of h, as in :func:`moeaccel.formats.quantise`.
        ``prune`` makes the patterns of N:M formats (:func:`moeaccel.formats.prune`) for a device of
        so many ``channels``; without it weights must have them.
        """
        fmt = weight_format(name)
        other = fmt if down_format is None else weight_format(down_format)
        parts = len(gate_up) // down.shape[1]
        rows = interleave_gate_up(gate_up, parts)
        if gate_up_bias is not None and gate_up_bias.shape == gate_up.shape[:1]:
            gate_up_bias = interleave_gate_up(gate_up_bias, parts)
        if prune is not None:
            rows = pruned(rows, fmt, prune, together=len(rows) // down.shape[1],
                          channels=channels)
            down = pruned(down, other, prune, channels=channels)
        with about("gate_up", FormatError):
            first = quantise(rows, fmt, quantiser=quantiser, moments=moments[0]).with_bias(
                gate_up_bias)
        with about("down", FormatError):
            second = quantise(down, other, quantiser=quantiser, moments=moments[1]).with_bias(
                down_bias)
        return cls(first, second, activation, limit, gate_limit)

    def parts(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what rows give, (n, rows), in the order of floats: gate, up, second up."""
        every = self.rows_of_h
        found = [rows[:, first::every] for first in range(every)]
        if every == 4:
            del found[2]
        return np.concatenate(found, axis=1)

    def floats(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the weights as :meth:`quantise` takes them: gate, then up rows, and down."""
        rows = self.parts(self.gate_up.dequantise().T).T
        return (np.ascontiguousarray(rows, np.float32),
                self.down.dequantise().astype(np.float32))

    def shape(self, row_multipliers: int, channels: int = 1) -> ExpertShape:
        """Return its shape for a device with such arrays."""
        d_model, d_expert = self.down.integers.shape
        return ExpertShape(
            self.gate_up.format, d_model, d_expert, row_multipliers, channels,
            down_format=self.down.format, activation=self.activation, gated=self.gated,
            limit=self.limit, gate_limit=self.gate_limit, second_up=self.rows_of_h == 4,
            gate_up_biased=self.gate_up.bias is not None,
            down_biased=self.down.bias is not None)

    def filled(self) -> Expert:
        """Return what device memory holds: zeros behind rows and columns, up to whole blocks."""
        d_model, d_expert = (whole_blocks(dim) for dim in self.down.integers.shape)
        return replace(self, gate_up=self.gate_up.filled(self.rows_of_h * d_expert, d_model),
                       down=self.down.filled(d_model, d_expert))
