"""INT4 with a real scale for each group: two's complement integers, 11-bit significands.

Integers are in [-8, 7]; the scale that a group's largest magnitude stands for is ``amax / 7``,
rounded to the significand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats.base import WeightFormat
from moeaccel.formats.scales import split_scales

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
        return split_scales(self, amax / self.high)


FORMATS = (
    Int4(name="int4_g32", code=1, group=32),
    Int4(name="int4_g128", code=2, group=128),
    Int4(name="int4_g64", code=4, group=64),
)
