"""Experts and linear layers: what an image holds, before packing and by its size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats import (
    BLOCK,
    QuantisedMatrix,
    WeightFormat,
    check_dims,
    quantise,
    weight_format,
    whole_blocks,
)
from moeaccel.image.sections import Section, stored_bytes

__all__ = ["ALIGNMENT", "HEADER_BYTES", "Expert", "ExpertShape", "LinearShape",
           "interleave_gate_up"]

HEADER_BYTES = 64
ALIGNMENT = 4096
"""Images start on a page, so that their bursts are whole."""


@dataclass(frozen=True)
class ExpertShape:
    """Shape of an expert: the two sections of its image; bytes and words are those of a part.

    Any dimensions: the sections are of whole blocks, filled up with zeros.
    """

    format: WeightFormat
    d_model: int
    d_expert: int
    row_multipliers: int
    channels: int = 1

    def __post_init__(self) -> None:
        check_dims(d_model=self.d_model, d_expert=self.d_expert)

    @property
    def gate_up(self) -> Section:
        """Rows g0, u0, g1, u1, ... of d_model inputs."""
        return Section(
            self.format, 2 * whole_blocks(self.d_expert), whole_blocks(self.d_model),
            self.row_multipliers, self.channels)

    @property
    def down(self) -> Section:
        """d_model rows of d_expert inputs."""
        return Section(
            self.format, whole_blocks(self.d_model), whole_blocks(self.d_expert),
            self.row_multipliers, self.channels)

    @property
    def header_bytes(self) -> int:
        """Bytes before the first word."""
        return max(HEADER_BYTES, BLOCK * self.row_multipliers)

    @property
    def image_bytes(self) -> int:
        """Bytes of the image, or of each part."""
        return self.header_bytes + (self.gate_up.words + self.down.words) * self.gate_up.word_bytes

    @property
    def stride(self) -> int:
        """Bytes from one expert's image to the next."""
        return -(-self.image_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights, scales and row exponents without padding, in all parts."""
        return (stored_bytes(self.format, 2 * self.d_expert, self.d_model)
                + stored_bytes(self.format, self.d_model, self.d_expert))


@dataclass(frozen=True)
class LinearShape:
    """Shape of a linear layer's image: one section, ``d_out`` rows of ``d_in`` inputs each, both
    filled up with zeros to whole blocks."""

    format: WeightFormat
    d_out: int
    d_in: int
    row_multipliers: int
    channels: int = 1

    def __post_init__(self) -> None:
        check_dims(d_out=self.d_out, d_in=self.d_in)

    @property
    def section(self) -> Section:
        """The only section."""
        return Section(self.format, whole_blocks(self.d_out), whole_blocks(self.d_in),
                       self.row_multipliers, self.channels)

    @property
    def header_bytes(self) -> int:
        """Bytes before the first word."""
        return max(HEADER_BYTES, BLOCK * self.row_multipliers)

    @property
    def image_bytes(self) -> int:
        """Bytes of the image, or of each part."""
        return self.header_bytes + self.section.words * self.section.word_bytes

    @property
    def stride(self) -> int:
        """Bytes that the image occupies, a multiple of a page."""
        return -(-self.image_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights, scales and row exponents without padding, in all parts."""
        return stored_bytes(self.format, self.d_out, self.d_in)



def interleave_gate_up(gate_up: NDArray[np.floating]) -> NDArray[np.floating]:
    """Reorder ``[gate; up]`` rows, (2 I, H), to g0, u0, g1, u1, ..."""
    half = gate_up.shape[0] // 2
    return np.stack([gate_up[:half], gate_up[half:]], axis=1).reshape(gate_up.shape)


@dataclass(frozen=True)
class Expert:
    """One quantised expert: what an image holds, before packing."""

    gate_up: QuantisedMatrix
    down: QuantisedMatrix

    @classmethod
    def quantise(
        cls, gate_up: NDArray[np.floating], down: NDArray[np.floating], name: str | WeightFormat
    ) -> Expert:
        """Quantise float weights: ``gate_up`` (2 I, H) as ``[gate; up]``, ``down`` (H, I)."""
        fmt = weight_format(name)
        return cls(quantise(interleave_gate_up(gate_up), fmt), quantise(down, fmt))

    def filled(self) -> Expert:
        """Return what device memory holds: zeros behind rows and columns, up to whole blocks."""
        d_model, d_expert = (whole_blocks(dim) for dim in self.down.integers.shape)
        return Expert(
            self.gate_up.filled(2 * d_expert, d_model), self.down.filled(d_model, d_expert))
