"""Two bits a weight, a real scale for each group: where memory is what an array waits for.

``int2_g32`` has four levels without a zero, -3, -1, 1 and 3: its error is 0.33 of normally
distributed weights, that of -2, -1, 0 and 1 would be 0.37. Weights that are 0 come as groups with a
scale of 0. ``ternary_g256`` has -1, 0 and 1, as BitNet b1.58 has them, whose packing TL1 and GGUF's
TQ2_0 (a float16 scale for 256 weights, which this holds exactly) have two bits a weight, too. Five
weights in 8 bits would be 1.6 bits, but 32 of them are no whole bytes, and each multiplier would
need a division by 3.

A word has the weights of two steps, so that an array takes these formats no faster than 4-bit ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats.base import WeightFormat
from moeaccel.formats.scales import split_scales

__all__ = ["OPTIONAL"]


@dataclass(frozen=True, kw_only=True)
class TwoBits(WeightFormat):
    """A format of 2-bit codes with a real scale."""

    weight_bits: int = 2
    real_scale: bool = True

    def group_scale(
        self, amax: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return split_scales(self, amax / self.high)


@dataclass(frozen=True, kw_only=True)
class Int2(TwoBits):
    """Odd integers."""

    low: int = -3
    high: int = 3
    max_shift: int = 7
    table: tuple[int, ...] | None = (1, 3, -3, -1)

    def nearest(self, scaled: NDArray[np.floating]) -> NDArray[np.floating]:
        np.floor(np.multiply(scaled, 0.5, out=scaled), out=scaled)
        scaled += scaled
        scaled += 1
        return np.clip(scaled, self.low, self.high, out=scaled)


@dataclass(frozen=True, kw_only=True)
class Ternary(TwoBits):
    """-1, 0 and 1, in two's complement."""

    low: int = -1
    high: int = 1
    max_shift: int = 9


OPTIONAL = (
    Int2(name="int2_g32", code=9, group=32),
    Ternary(name="ternary_g256", code=10, group=256),
)
