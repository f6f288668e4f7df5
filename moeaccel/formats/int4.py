"""INT4 with a real scale for each group: two's complement integers, 11-bit significands.

A group's scale is ``amax / 7``, rounded to the significand, and integers are in [-8, 7].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats.base import SIGNIFICAND_BITS, WeightFormat

__all__ = ["FORMATS"]


@dataclass(frozen=True, kw_only=True)
class Int4(WeightFormat):
    """A format of 4-bit integers with a real scale."""

    weight_bits: int = 4
    real_scale: bool = True
    low: int = -8
    high: int = 7
    max_shift: int = 6

    def group_scale(
        self, amax: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        fraction, exponent = np.frexp(amax / self.high)
        significand = np.rint(fraction * (1 << SIGNIFICAND_BITS)).astype(np.int64)
        carry = significand >> SIGNIFICAND_BITS
        return significand >> carry, exponent.astype(np.int64) - SIGNIFICAND_BITS + carry

    def nearest(self, scaled: NDArray[np.float64]) -> NDArray[np.int8]:
        return np.clip(np.rint(scaled), self.low, self.high).astype(np.int8)


FORMATS = (
    Int4(name="int4_g32", code=1, group=32),
    Int4(name="int4_g128", code=2, group=128),
    Int4(name="int4_g64", code=4, group=64),
)
