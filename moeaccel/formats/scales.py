"""Scales as a format stores them: a significand and an exponent each, then a shift in their row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import FormatError
from moeaccel.formats.base import MINIMUM_SHIFT_MAX, SIGNIFICAND_BITS, WeightFormat

__all__ = ["fit_minima", "fit_rows", "groups_of", "minimum_exponents", "split_scales"]

Integers = NDArray[np.int64]

_NEVER = np.int64(-(1 << 14))
"""Exponent of a row in which there is nothing."""


def groups_of(fmt: WeightFormat, weights: NDArray[np.float32], quantiser: str,
              moments: NDArray[np.floating] | None
              ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a matrix's groups, (n, groups, group), and what an error in each weight counts, of a
    format that is quantised group by group.

    Raises
    ------
    FormatError
        For a quantiser other than ``"amax"`` and ``"search"``, moments of another shape, and
        weights that are not finite.
    """
    n, k = weights.shape
    if quantiser not in ("search", "amax"):
        raise FormatError(f"quantiser of {fmt.name} must be 'search', 'amax' or 'gptq', not "
                          f"{quantiser!r}")
    groups = -(-k // fmt.group)
    pad = (0, groups * fmt.group - k)
    importance = np.ones(k)
    if moments is not None and quantiser == "search":
        moments = np.asarray(moments, np.float64)
        if moments.shape not in ((k,), (k, k)) or not np.isfinite(moments).all():
            raise FormatError(f"moments must be finite, of the shape {(k,)} or {(k, k)}, not "
                              f"{moments.shape}")
        importance = moments if moments.ndim == 1 else moments.diagonal()
    if not np.isfinite(weights).all():
        raise FormatError("weights must be finite; the tensor holds NaN or infinity")
    # Behind a short group its last weight again: it changes no range, and weighs nothing.
    grouped = np.pad(weights.astype(np.float64), ((0, 0), pad), mode="edge").reshape(
        n, groups, fmt.group)
    each = np.pad(importance, pad).reshape(groups, fmt.group)
    return grouped, np.broadcast_to(each, grouped.shape)


def split_scales(fmt: WeightFormat, scales: NDArray[np.float64]) -> tuple[Integers, Integers]:
    """Return (significand, exponent) of the nearest scales that a format has, whatever the row.

    Parameters
    ----------
    fmt : :class:`WeightFormat`
    scales : float64 array
        Not negative; powers of two where the format has nothing else. 0 has a significand of 0.

    Returns
    -------
    pair of int64 arrays
        ``significand * 2**exponent``; significands are 1, or have SIGNIFICAND_BITS.
    """
    fraction, exponent = np.frexp(scales)
    exponent = exponent.astype(np.int64)
    if not fmt.real_scale:
        return (scales > 0).astype(np.int64), exponent - 1
    significand = np.rint(fraction * (1 << SIGNIFICAND_BITS)).astype(np.int64)
    carry = significand >> SIGNIFICAND_BITS
    return significand >> carry, exponent - SIGNIFICAND_BITS + carry


def fit_rows(
    fmt: WeightFormat, significand: Integers, exponent: Integers, least: Integers | None = None
) -> tuple[NDArray[np.int16], NDArray[np.int8], NDArray[np.int16], NDArray[np.bool_]]:
    """Give the scales of each row one range of shifts, which starts at its largest scale.

    A row's largest exponent gets ``max_shift``. What lies below the range is rounded to its least
    scale's unit in formats with real scales, which may make it 0, and becomes the least scale in
    the others.

    Parameters
    ----------
    fmt : :class:`WeightFormat`
    significand, exponent : int64 arrays, (n, groups)
        As :func:`split_scales` has them; a group of zeros has a significand of 0.
    least : int64 array, (n,), optional
        Least exponents of the rows, for what else they hold (:func:`minimum_exponents`).

    Returns
    -------
    significand : int16 array, (n, groups)
    shift : int8 array, (n, groups)
    row_exponent : int16 array, (n,)
    coarsened : bool array, (n, groups)
        Scales that are not what they were.
    """
    there = significand > 0
    row_exponent = np.where(there, exponent - fmt.max_shift, _NEVER).max(axis=1)
    if least is not None:
        row_exponent = np.maximum(row_exponent, least)
    row_exponent = np.where(row_exponent == _NEVER, 0, row_exponent)
    shift = np.where(there, exponent - row_exponent[:, None], 0)
    below = np.clip(-shift, 0, 30)
    if not below.any():  # mostly so
        stored = significand if fmt.real_scale else np.ones_like(significand)
        coarsened = np.zeros(shift.shape, bool)
    elif fmt.real_scale:
        stored = np.rint(significand / 2.0**below).astype(np.int64)
        coarsened = stored << below != significand
    else:
        stored = np.ones_like(significand)
        coarsened = below > 0
    return (stored.astype(np.int16), np.maximum(shift, 0).astype(np.int8),
            row_exponent.astype(np.int16), coarsened)


def minimum_exponents(minima: NDArray[np.float64]) -> Integers:
    """Return the least exponent of each row, (n,), with which its minima, (n, groups), are not
    too large."""
    largest = np.abs(minima).max(axis=1)
    exponent = np.frexp(largest)[1].astype(np.int64)
    # What rounding to the significand makes the next power of two has an exponent more.
    exponent += np.ldexp(largest, -exponent) >= 1 - 2.0 ** -(SIGNIFICAND_BITS + 1)
    return np.where(largest > 0, exponent - SIGNIFICAND_BITS - MINIMUM_SHIFT_MAX, _NEVER)


def fit_minima(minima: NDArray[np.float64], row_exponent: NDArray[np.int16]
               ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return minima, (n, groups), in units of their row's exponent, and which are not what they
    were: rounded to the significand's bits, or to that unit."""
    exact = np.ldexp(minima, -row_exponent[:, None].astype(np.int32))
    unit = np.maximum(np.frexp(exact)[1] - SIGNIFICAND_BITS, 0)
    stored = np.ldexp(np.rint(np.ldexp(exact, -unit)), unit)
    return stored.astype(np.int32), stored != exact
