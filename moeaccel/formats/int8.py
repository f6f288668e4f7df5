"""INT8 with a real scale for each group: two's complement integers, 11-bit significands.

Integers are in [-127, 127], so that negation loses nothing; the scale that a group's largest
magnitude stands for is ``amax / 127``, rounded to the significand. A row's scales lie within two
powers of two of its largest, or are rounded to fewer bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats.base import WeightFormat
from moeaccel.formats.scales import split_scales

__all__ = ["OPTIONAL"]


@dataclass(frozen=True, kw_only=True)
class Int8(WeightFormat):
    """A format of 8-bit integers with a real scale."""

    weight_bits: int = 8
    real_scale: bool = True
    low: int = -127
    high: int = 127
    max_shift: int = 2

    def group_scale(
        self, amax: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return split_scales(self, amax / self.high)


OPTIONAL = (
    Int8(name="int8_g32", code=7, group=32),
)
