"""OCP Microscaling v1.0: MXINT8 and MXFP4, power-of-two scales for blocks of 32.

A block's scale is ``2**(floor(log2 amax) - emax)`` (OCP Microscaling Formats specification v1.0,
section 6.3), here with -127 as the least ``mxint8`` integer, so that negation loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats.base import BLOCK, WeightFormat

__all__ = ["E2M1_DOUBLED", "FORMATS", "nearest_e2m1"]

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the magnitudes of FP4 E2M1 by code: integers."""


def nearest_e2m1(scaled: NDArray[np.floating]) -> NDArray[np.floating]:
    """Round to doubled E2M1 numbers in place, as if they went on beyond 12."""
    # Codes are 1 apart up to 4, then 2 up to 8, then 4: in these units a tie between two codes
    # goes to the even one as a tie between two integers does.
    magnitude = np.abs(scaled)
    step = np.add(magnitude >= 4, 1, dtype=scaled.dtype)
    step += 2 * (magnitude >= 8)
    np.rint(np.divide(scaled, step, out=scaled), out=scaled)
    return np.multiply(scaled, step, out=scaled)


@dataclass(frozen=True, kw_only=True)
class Microscaled(WeightFormat):
    """A format of OCP Microscaling.

    Parameters
    ----------
    unit_exponent : :class:`int`
        An integer of the format is worth ``2**unit_exponent`` where the largest weight of its block
        has the leading bit 1.
    """

    unit_exponent: int

    def group_scale(
        self, amax: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        floor_log2 = np.frexp(amax)[1].astype(np.int64) - 1
        return np.ones(amax.shape, np.int64), floor_log2 + self.unit_exponent

    def nearest(self, scaled: NDArray[np.floating]) -> NDArray[np.floating]:
        if self.table is None:
            return super().nearest(scaled)
        return np.clip(nearest_e2m1(scaled), self.low, self.high, out=scaled)


FORMATS = (
    # Seven bits behind the leading one; an integer's unit is 2**-6 of it.
    Microscaled(name="mxint8", code=0, weight_bits=8, group=BLOCK, real_scale=False, low=-127,
                high=127, max_shift=13, unit_exponent=-6),
    # E2M1: emax 2, and integers are doubled. The high bit of a code is its sign.
    Microscaled(name="mxfp4", code=3, weight_bits=4, group=BLOCK, real_scale=False, low=-12,
                high=12, max_shift=15, unit_exponent=-3,
                table=(*E2M1_DOUBLED, *(-value for value in E2M1_DOUBLED))),
)
