"""NVFP4: FP4 E2M1 in groups of 16 with a real scale each.

A checkpoint's scale is FP8 E4M3 times one number for the matrix. Here it is what scales of other
formats are, a significand of 11 bits and a shift: E4M3 has 4 bits, so that all is exact where the
matrix's number has at most 7 significant bits, powers of two first of all; otherwise each scale is
rounded to 11 bits, and weights keep their codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats.base import WeightFormat
from moeaccel.formats.microscaling import E2M1_DOUBLED, nearest_e2m1
from moeaccel.formats.scales import split_scales

__all__ = ["OPTIONAL"]


@dataclass(frozen=True, kw_only=True)
class Nvfp4(WeightFormat):
    """A format of E2M1 numbers with a real scale."""

    weight_bits: int = 4
    real_scale: bool = True
    low: int = -12
    high: int = 12
    max_shift: int = 5
    table: tuple[int, ...] | None = (*E2M1_DOUBLED, *(-value for value in E2M1_DOUBLED))

    def group_scale(
        self, amax: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return split_scales(self, amax / self.high)

    def nearest(self, scaled: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.clip(nearest_e2m1(scaled), self.low, self.high, out=scaled)


OPTIONAL = (
    Nvfp4(name="nvfp4", code=8, group=16),
)
