"""INT4 with a real scale and a minimum for each group, as GGUF's Q4_1 has them.

A weight is ``code * scale + minimum`` with codes from 0 to 15. The sum over a group is ``scale *
sum(code x) + minimum * sum(x)``: both are integers, and the second sum is the same for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats.base import QuantisedMatrix, WeightFormat
from moeaccel.formats.scales import fit_minima, fit_rows, groups_of, minimum_exponents, split_scales

__all__ = ["OPTIONAL"]

_TOP = 15
"""Largest code."""

_CLIPPED = (0.0, 0.5, 1.0)
"""Candidates: a group's range becomes so many steps more than there are, half at either end."""


@dataclass(frozen=True, kw_only=True)
class Int4Minimum(WeightFormat):
    """A format of 4-bit codes with a real scale and a minimum."""

    weight_bits: int = 4
    real_scale: bool = True
    low: int = 0
    high: int = _TOP
    max_shift: int = 4
    table: tuple[int, ...] | None = tuple(range(_TOP + 1))
    minimum: bool = True

    def group_scale(
        self, amax: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return split_scales(self, amax / self.high)

    def quantised(self, weights: NDArray[np.float32], quantiser: str,
                  moments: NDArray[np.floating] | None) -> QuantisedMatrix:
        """Return a float matrix, (n, K), in this format.

        ``"amax"`` spans each group's range by 15 steps. ``"search"`` tries a few spans and takes,
        of each, the least-squares line through its codes; the least error stays, each weight's
        times the mean square of its input if ``moments`` are there.

        Raises
        ------
        FormatError
            For moments of another shape, and weights that are not finite.
        """
        n, k = weights.shape
        grouped, each = groups_of(self, weights, quantiser, moments)
        bottom = grouped.min(axis=2)
        span = grouped.max(axis=2) - bottom
        best = np.full(span.shape, np.inf)
        scale, minimum = np.zeros_like(span), np.zeros_like(span)
        for clipped in _CLIPPED if quantiser == "search" else _CLIPPED[:1]:
            tried = span / (_TOP + clipped)
            low = bottom + clipped / 2 * tried
            if quantiser == "search":
                tried, low = _line(_codes(grouped, tried, low), grouped, each, tried, low)
            codes = _codes(grouped, tried, low)
            error = ((grouped - codes * tried[:, :, None] - low[:, :, None]) ** 2 * each).sum(
                axis=2)
            better = error < best
            best = np.where(better, error, best)
            scale, minimum = np.where(better, tried, scale), np.where(better, low, minimum)
        significand, shift, row_exponent, coarsened = fit_rows(
            self, *split_scales(self, scale), minimum_exponents(minimum))
        stored = np.ldexp(significand.astype(np.float64),
                          shift.astype(np.int32) + row_exponent[:, None])
        fitted, _ = fit_minima(minimum, row_exponent)
        codes = _codes(grouped, stored, np.ldexp(fitted.astype(np.float64),
                                                 row_exponent[:, None].astype(np.int32)))
        return QuantisedMatrix(
            self, np.ascontiguousarray(codes.reshape(n, -1)[:, :k].astype(np.int8)), significand,
            shift, row_exponent, int(coarsened.sum()), minimum=fitted)


def _codes(grouped: NDArray[np.float64], scale: NDArray[np.float64], low: NDArray[np.float64]
           ) -> NDArray[np.float64]:
    """Return the codes of groups, (n, groups, group), with these scales and minima."""
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.clip(np.rint((grouped - low[:, :, None]) * inverse[:, :, None]), 0, _TOP)


def _line(codes: NDArray[np.float64], grouped: NDArray[np.float64], each: NDArray[np.float64],
          scale: NDArray[np.float64], low: NDArray[np.float64]
          ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scale and minimum of least squared error; as they were where no slope is above 0."""
    total = np.maximum(each.sum(axis=2), np.finfo(np.float64).tiny)
    middle = (codes * each).sum(axis=2) / total
    mean = (grouped * each).sum(axis=2) / total
    off = codes - middle[:, :, None]
    power = (off * off * each).sum(axis=2)
    slope = np.divide((off * (grouped - mean[:, :, None]) * each).sum(axis=2), power,
                      out=np.zeros_like(power), where=power > 0)
    good = slope > 0
    return np.where(good, slope, scale), np.where(good, mean - slope * middle, low)


OPTIONAL = (
    Int4Minimum(name="int4_g32_min", code=11, group=32),
)
