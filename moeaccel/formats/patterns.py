"""N:M patterns along K: of QUAD consecutive weights at most N differ from 0, and only N are stored.

Two rows of a 4-bit format that share a multiplier share their pattern, too: what one of them has
where, so may the other. Which rows do follows from how they are dealt to channels
(:mod:`moeaccel.image.sections`): rows of gate and up in turn, otherwise rows r and r + channels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import FormatError
from moeaccel.formats.base import QUAD, WeightFormat
from moeaccel.formats.int4 import FORMATS as INT4
from moeaccel.formats.int8 import OPTIONAL as INT8
from moeaccel.formats.microscaling import FORMATS as MICROSCALED

__all__ = ["OPTIONAL", "PRUNINGS", "check_pattern", "compressed", "expanded", "places", "prune",
           "with_pattern"]

PRUNINGS = ("magnitude",)
"""Ways to make a pattern: the weights of largest magnitude stay, those of both rows together where
two share a pattern."""

_CODES = {2: 64, 1: 128}
"""What a pattern adds to a format's code, by the weights that stay."""


def with_pattern(fmt: WeightFormat, nonzeros: int) -> WeightFormat:
    """Return the format whose weights have an N:M pattern: ``int4_g32+2:4``."""
    return replace(fmt, name=f"{fmt.name}+{nonzeros}:{QUAD}", code=fmt.code + _CODES[nonzeros],
                   nonzeros=nonzeros)


OPTIONAL = tuple(with_pattern(fmt, nonzeros) for nonzeros in _CODES
                 for fmt in (*MICROSCALED, *INT4, *INT8))


def places(integers: NDArray[np.integer], fmt: WeightFormat) -> NDArray[np.uint8]:
    """Return which of each four weights are stored, (rows, K / QUAD, N), ascending.

    Parameters
    ----------
    integers : integer array, (n, K)
        Rows in the order of an array: of 4-bit formats rows 2 i and 2 i + 1, n is even, have one
        pattern, and a row of what is returned.
    fmt : :class:`WeightFormat`

    Raises
    ------
    FormatError
        If more differ from 0.
    """
    n, k = integers.shape
    there = integers.reshape(n, k // QUAD, QUAD) != 0
    if fmt.packed:
        there = there[0::2] | there[1::2]
    wrong = there.sum(axis=2) > fmt.nonzeros
    if wrong.any():
        row, group = (int(i) for i in np.argwhere(wrong)[0])
        rows = f"rows {2 * row} and {2 * row + 1} together" if fmt.packed else f"row {row}"
        raise FormatError(
            f"weights of {fmt.name} must have at most {fmt.nonzeros} of each {QUAD} columns that "
            f"are not 0, but {rows}, in the order in which a device has them, have more from column"
            f" {QUAD * group} on; prune='magnitude' makes a pattern")
    first = np.argsort(~there, axis=2, kind="stable")[:, :, : fmt.nonzeros]
    return np.sort(first, axis=2).astype(np.uint8)


def check_pattern(integers: NDArray[np.integer], fmt: WeightFormat) -> None:
    """Make sure that each row by itself has a format's pattern.

    Raises
    ------
    FormatError
        Naming the first row that has not, and the column.
    """
    if fmt.parts == 1:
        return
    n, k = integers.shape
    there = np.pad(integers != 0, ((0, 0), (0, -k % QUAD))).reshape(n, -1, QUAD)
    wrong = there.sum(axis=2) > fmt.nonzeros
    if wrong.any():
        row, group = (int(i) for i in np.argwhere(wrong)[0])
        raise FormatError(
            f"weights of {fmt.name} must have at most {fmt.nonzeros} of each {QUAD} columns that "
            f"are not 0, but row {row} has more from column {QUAD * group} on; prune='magnitude' "
            "makes a pattern")


def compressed(values: NDArray[np.uint8], at: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return what is stored of values, (n, K): those at ``places``, (n, K / QUAD, N)."""
    n, k = values.shape
    at = np.repeat(at, n // len(at), axis=0)
    return np.take_along_axis(values.reshape(n, k // QUAD, QUAD), at.astype(np.intp), axis=2)


def expanded(stored: NDArray[np.int8], at: NDArray[np.uint8]) -> NDArray[np.integer]:
    """Return the integers, (n, K), of which (n, K / QUAD, N) are stored.

    Where two have one place, which no image that was built has, they add up, as in the array; then
    integers may need 16 bits.
    """
    n, groups, _ = stored.shape
    at = np.repeat(at, n // len(at), axis=0)
    whole = np.zeros((n, groups, QUAD), np.int16)
    for i in range(stored.shape[2]):
        whole += np.where(at[:, :, i, None] == np.arange(QUAD), stored[:, :, i, None], 0)
    small = -128 <= whole.min() and whole.max() <= 127
    return whole.reshape(n, -1).astype(np.int8 if small else np.int16)


def prune(weights: NDArray[np.floating], fmt: WeightFormat, how: str, *, together: int = 1,
          channels: int = 1) -> NDArray[np.floating]:
    """Return weights, (n, K), with a format's pattern; themselves where it has none.

    Parameters
    ----------
    weights : float array, (n, K)
        Rows as :func:`moeaccel.formats.quantise` takes them.
    fmt : :class:`WeightFormat`
    how : :class:`str`
        One of PRUNINGS.
    together, channels : :class:`int`
        Rows that are dealt together (of 2 or 4: rows of gate and up in turn), and to how many
        channels.

    Raises
    ------
    FormatError
        If there is no such way.
    """
    if how not in PRUNINGS:
        raise FormatError(f"prune must be {' or '.join(map(repr, PRUNINGS))}, not {how!r}")
    if fmt.parts == 1:
        return weights
    n, k = weights.shape
    padded = np.pad(weights, ((0, 0), (0, -k % QUAD))).reshape(n, -1, QUAD)
    weight = np.square(padded.astype(np.float64))
    if fmt.packed:
        row = np.arange(n)
        apart = 1 if together > 1 else channels
        partner = np.where(row // apart % 2 == 0, row + apart, row - apart)
        weight = weight + np.where((partner < n)[:, None, None], weight[np.minimum(partner, n - 1)],
                                   0)
    # Of equal ones the first stays, in both rows alike.
    rank = np.argsort(np.argsort(-weight, axis=2, kind="stable"), axis=2, kind="stable")
    return np.where(rank < fmt.nonzeros, padded, 0).reshape(n, -1)[:, :k].astype(weights.dtype)
