"""INT4 with a real scale and a zero point for each group, as AWQ and GPTQ checkpoints have them.

A weight is ``(code - zero) * scale`` with codes and zero points from 0 to 15. Zero points are not
kept beside the integers ``code - zero``, from -15 to 15: they follow from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats.base import QuantisedMatrix, WeightFormat
from moeaccel.formats.scales import fit_rows, groups_of, split_scales

__all__ = ["OPTIONAL"]

_TOP = 15
"""Largest code, and zero point."""

_SPANS = (15.0, 15.5, 16.0)
"""Candidates of scales: a group's whole range becomes so many steps."""


@dataclass(frozen=True, kw_only=True)
class Int4Zero(WeightFormat):
    """A format of 4-bit codes with a real scale and a zero point."""

    weight_bits: int = 4
    real_scale: bool = True
    low: int = -_TOP
    high: int = _TOP
    max_shift: int = 5
    table: tuple[int, ...] | None = tuple(range(_TOP + 1))
    zero_point: bool = True

    def group_scale(
        self, amax: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return split_scales(self, amax / self.high)

    def nearest_groups(self, scaled: NDArray[np.floating]) -> NDArray[np.floating]:
        """Round whole groups to integers of one zero point each, in place; saturate."""
        np.rint(scaled, out=scaled)
        zero = np.clip(-scaled.min(axis=1, keepdims=True), 0, _TOP)
        return np.clip(scaled, -zero, _TOP - zero, out=scaled)

    def quantised(self, weights: NDArray[np.float32], quantiser: str,
                  moments: NDArray[np.floating] | None) -> QuantisedMatrix:
        """Return a float matrix, (n, K), in this format.

        ``"amax"`` spans each group's range, 0 with it, by 15 steps. ``"search"`` tries a few spans
        and takes, of each, the least-squares scale of its integers; the least error stays, each
        weight's times the mean square of its input if ``moments`` are there.

        Raises
        ------
        FormatError
            For moments of another shape, and weights that are not finite.
        """
        n, k = weights.shape
        grouped, each = groups_of(self, weights, quantiser, moments)
        low = np.minimum(grouped.min(axis=2), 0)
        span = np.maximum(grouped.max(axis=2), 0) - low
        best = np.full(span.shape, np.inf)
        scale, zero = np.zeros_like(span), np.zeros_like(span)
        for steps in _SPANS if quantiser == "search" else _SPANS[:1]:
            tried = span / steps
            at = np.clip(np.rint(-low * _inverse(tried)), 0, _TOP)
            integers = _rounded(grouped, tried, at)
            if quantiser == "search":
                power = (integers * integers * each).sum(axis=2)
                tried = np.maximum((grouped * integers * each).sum(axis=2) * _inverse(power), 0)
            error = ((grouped - integers * tried[:, :, None]) ** 2 * each).sum(axis=2)
            better = error < best
            best = np.where(better, error, best)
            scale, zero = np.where(better, tried, scale), np.where(better, at, zero)
        significand, shift, row_exponent, coarsened = fit_rows(self, *split_scales(self, scale))
        stored = np.ldexp(significand.astype(np.float64),
                          shift.astype(np.int32) + row_exponent[:, None])
        integers = _rounded(grouped, stored, zero).reshape(n, -1)[:, :k]
        return QuantisedMatrix(self, np.ascontiguousarray(integers.astype(np.int8)), significand,
                               shift, row_exponent, int(coarsened.sum()))


def _inverse(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 / values, 0 where that is 0."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


def _rounded(grouped: NDArray[np.float64], scale: NDArray[np.float64], zero: NDArray[np.float64]
             ) -> NDArray[np.float64]:
    """Return the integers of groups, (n, groups, group), with these scales and zero points."""
    integers = np.rint(grouped * _inverse(scale)[:, :, None])
    return np.clip(integers, -zero[:, :, None], _TOP - zero[:, :, None])


OPTIONAL = (
    Int4Zero(name="int4_g32_zp", code=5, group=32),
    Int4Zero(name="int4_g128_zp", code=6, group=128),
)
