"""How a float matrix becomes a quantised one: which scales, and which integers.

The device is told neither: it multiplies integers and scales, whoever chose them.

``"search"``
    A scale of each group that makes its squared error small. Of some candidates around the one that
    just avoids saturation, each is rounded with and, in formats with real scales, replaced by the
    least-squares scale of the integers so found, ``sum(w q) / sum(q q)``; the best stays. With
    ``moments`` the error of each weight counts as much as its input does.
``"amax"``
    The scale that the format's family derives from a group's largest magnitude.
``"gptq"``
    The scales of ``"search"``, then integers with error feedback: columns are rounded one after
    another, and what each rounding costs is made up for by those that are still to come, as the
    correlations of the inputs allow (Frantar et al., GPTQ: Accurate Post-Training Quantization for
    Generative Pre-trained Transformers, ICLR 2023, section 3.3). Columns go in the order of falling
    moments. Scales, minima and zero points are those that ``"search"`` found; where an N:M pattern
    has no weight, none comes, and what its column's error would need goes on to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import FormatError
from moeaccel.formats.base import (
    BLOCK,
    QuantisedMatrix,
    WeightFormat,
    bfloat16_floats,
    in_groups,
)
from moeaccel.formats.scales import fit_rows, split_scales

__all__ = ["QUANTISERS", "Measured", "Weights", "feed_back", "quantise_matrix",
           "quantise_measured", "widened"]

QUANTISERS = ("search", "amax", "gptq")
"""Names of the quantisers, the default first."""

Floats = NDArray[np.floating]

Weights = NDArray[np.float32 | np.uint16]
"""A matrix, (n, K), of floats, or of bfloat16 as uint16."""

CLIP_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0)
"""Candidates of real scales: the largest magnitude becomes the format's largest integer and so
much. The last is for groups of more than 32, whose largest magnitude lies farther out. (With these
the error is within 0.6 % of that of very many, for groups of 32 and of 128.)"""

_CHUNK_ELEMENTS = 1 << 18  # small against a core's time, large against a call's
_FLOAT32_EXPONENTS = 60  # squares of 2**60 and of 2**-60 are well inside float32
_LINE_BYTES = 64
_FEEDBACK_COLUMNS = 128
_DAMPING = 0.01


def quantise_matrix(weights: Weights, fmt: WeightFormat, quantiser: str,
                    moments: Floats | None) -> QuantisedMatrix:
    """Quantise a matrix; :func:`moeaccel.formats.quantise` says what its arguments mean.

    Raises
    ------
    FormatError
        For a quantiser that there is not, moments that it cannot use, and weights that are not
        finite.
    """
    return _quantise(weights, fmt, quantiser, moments, None)


def quantise_measured(weights: Weights, fmt: WeightFormat, quantiser: str
                      ) -> tuple[QuantisedMatrix, Measured]:
    """Quantise a matrix of floats, or of bfloat16 as uint16, and measure it in the same pass; for
    quantisers that take no moments, and formats that are quantised here.

    Raises
    ------
    FormatError
        As :func:`quantise_matrix`.
    """
    n, k = weights.shape
    found = Measured(np.zeros(n), np.zeros(-(-k // fmt.group) * fmt.group))
    matrix = _quantise(weights, fmt, quantiser, None, found)
    found.columns = found.columns[:k]
    return matrix, found


def _quantise(weights: Weights, fmt: WeightFormat, quantiser: str, moments: Floats | None,
              found: Measured | None) -> QuantisedMatrix:
    """Quantise a matrix, some rows at a time, and add to what is measured where that is asked."""
    n, k = weights.shape
    importance, second = _check_moments(quantiser, moments, k)
    groups = -(-k // fmt.group)
    integers = np.empty((n, groups * fmt.group), np.int8)
    significand = np.empty((n, groups), np.int16)
    shift = np.empty((n, groups), np.int8)
    row_exponent = np.empty(n, np.int16)
    coarsened = 0
    step = max(1, _CHUNK_ELEMENTS // (groups * fmt.group))
    scratch = _Scratch(fmt.group, min(step, n) * groups)
    for first in range(0, n, step):
        part = slice(first, first + step)
        columns, amax = _grouped(weights[part], fmt.group, scratch)
        if not np.isfinite(amax).all():
            raise FormatError("weights must be finite; the tensor holds NaN or infinity")
        rounded = scratch.like(columns)
        if quantiser == "amax":
            split = fmt.group_scale(amax)
            split = np.where(amax > 0, split[0], 0), split[1]
        else:
            split = _search(columns, amax, fmt, _spread(importance, columns, groups, fmt.group),
                            rounded)
        rows = len(weights[part])
        significand[part], shift[part], row_exponent[part], changed = fit_rows(
            fmt, split[0].reshape(rows, groups), split[1].reshape(rows, groups))
        coarsened += int(changed.sum())
        scale = _scales(significand[part], shift[part], row_exponent[part])
        fmt.nearest(np.multiply(columns, _inverse(scale).reshape(-1).astype(columns.dtype),
                                out=rounded))
        # Bytes are turned faster than floats are.
        small = scratch.bytes(columns.shape[1])
        np.copyto(small, rounded, casting="unsafe")
        np.copyto(integers[part].reshape(-1, fmt.group), small.T)
        if found is not None:
            found.add(part, columns, rounded, scale)
    integers = np.ascontiguousarray(integers[:, :k])
    matrix = QuantisedMatrix(fmt, integers, significand, shift, row_exponent, coarsened)
    return matrix if second is None else _fed_back(widened(weights), matrix, second)


def feed_back(weights: NDArray[np.float32], matrix: QuantisedMatrix, moments: Floats | None
              ) -> QuantisedMatrix:
    """Return a matrix that was quantised from weights with other integers: those of ``"gptq"``.

    Raises
    ------
    FormatError
        For moments that it cannot use.
    """
    _, second = _check_moments("gptq", moments, weights.shape[1])
    assert second is not None
    return _fed_back(weights, matrix, second)


def widened(weights: Weights) -> NDArray[np.float32]:
    """Return weights as float32: bfloat16, which comes as uint16, too."""
    if weights.dtype == np.uint16:
        return bfloat16_floats(weights.view(np.uint16))
    return np.asarray(weights, np.float32)


@dataclass
class Measured:
    """Sums of squares of a matrix of ``n`` rows and K columns, to float32's precision.

    Parameters
    ----------
    rows, columns : float64 arrays, (n,) and (K,)
        Of the weights.
    error : :class:`float`
        Of what quantising changed.
    """

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]
    error: float = 0.0

    def add(self, part: slice, columns: Floats, rounded: Floats,
            scale: NDArray[np.float64]) -> None:
        """Add some rows: their groups, what these became, and the scales, (rows, groups);
        ``rounded`` is overwritten."""
        rounded *= scale.reshape(-1).astype(columns.dtype)
        rounded -= columns
        # A group's largest magnitude is inside float32 by its square, too (:func:`_grouped`).
        self.error += float(np.einsum("ij,ij->j", rounded, rounded).sum(dtype=np.float64))
        np.multiply(columns, columns, out=rounded)
        rows, groups = scale.shape
        self.rows[part] = rounded.sum(axis=0).reshape(rows, groups).sum(axis=1, dtype=np.float64)
        each = rounded.reshape(-1, rows, groups).sum(axis=1)
        self.columns += each.T.reshape(-1)


class _Scratch:
    """Memory that is used again for each chunk: fresh memory costs more than what is done there.

    Rows are a cache line longer than a chunk's, since those a power of two apart fall upon one
    another in a cache.

    Parameters
    ----------
    group, columns : :class:`int`
        Of a chunk, at most so many columns.
    """

    def __init__(self, group: int, columns: int) -> None:
        self._floats = np.empty((2, group, columns + _LINE_BYTES // 4), np.float32)
        self._bytes = np.empty((group, columns + _LINE_BYTES), np.int8)

    def columns(self, count: int) -> NDArray[np.float32]:
        """Return room for so many columns of a chunk."""
        return self._floats[0, :, :count]

    def like(self, columns: Floats) -> Floats:
        """Return room for what becomes of a chunk."""
        if columns.dtype != np.float32:
            return np.empty_like(columns)
        return self._floats[1, :, : columns.shape[1]]

    def bytes(self, count: int) -> NDArray[np.int8]:
        """Return room for a chunk's integers."""
        return self._bytes[:, :count]


def _check_moments(quantiser: str, moments: Floats | None,
                   k: int) -> tuple[Floats | None, Floats | None]:
    """Return (mean squares of the inputs, second moments) as far as a quantiser uses them."""
    if quantiser not in QUANTISERS:
        raise FormatError(f"quantiser must be one of {', '.join(QUANTISERS)}, not {quantiser!r}")
    shapes = {"search": ((k,), (k, k)), "gptq": ((k, k),), "amax": ()}[quantiser]
    if moments is None and quantiser != "gptq":
        return None, None
    if moments is None or np.shape(moments) not in shapes:
        wanted = f"an array of the shape {' or '.join(map(str, shapes))}" if shapes else "left out"
        found = "left out" if moments is None else f"of {np.shape(moments)}"
        raise FormatError(f"moments of quantiser {quantiser!r} must be {wanted}, not {found}")
    second = np.asarray(moments, np.float64)
    importance = second if second.ndim == 1 else second.diagonal()
    if not (np.isfinite(second).all() and (importance >= 0).all()):
        raise FormatError("moments must be finite, and mean squares at least 0; the calibration's "
                          "activations hold NaN or infinity")
    return (importance if importance.any() else None), (second if quantiser == "gptq" else None)


def _grouped(weights: Weights, group: int, scratch: _Scratch
             ) -> tuple[Floats, NDArray[np.float64]]:
    """Return a column for each group, (group, n * groups), and the largest magnitude of each.

    Groups beside one another and not behind one another: what is summed over a group then is whole
    vectors. float32, but where squares would leave its range.
    """
    n, k = weights.shape
    groups = -(-k // group)
    if groups * group != k:
        weights = np.pad(weights, ((0, 0), (0, groups * group - k)))
    turned = weights.reshape(n * groups, group).T
    columns: Floats = scratch.columns(turned.shape[1])
    if weights.dtype == np.uint16:
        np.left_shift(turned, 16, out=columns.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(columns, turned)
    amax = np.maximum(columns.max(axis=0), -columns.min(axis=0)).astype(np.float64)
    exponent = np.frexp(amax[(amax > 0) & (amax < np.inf)])[1]
    if len(exponent) and max(exponent.max(), -exponent.min()) > _FLOAT32_EXPONENTS:
        columns = columns.astype(np.float64)
    return columns, amax


def _spread(importance: Floats | None, columns: Floats, groups: int, group: int) -> Floats | None:
    """Return the importance of each weight of each group's column; their sum is that of ones."""
    if importance is None:
        return None
    padded = np.pad(importance / importance.mean(), (0, groups * group - len(importance)))
    each = padded.reshape(groups, group).T.astype(columns.dtype)
    return np.tile(each, columns.shape[1] // groups)


def _search(columns: Floats, amax: NDArray[np.float64], fmt: WeightFormat,
            importance: Floats | None, rounded: Floats
            ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (significand, exponent) of the scale of each group with the least squared error;
    ``rounded`` is overwritten."""
    weighted = columns if importance is None else columns * importance
    if fmt.real_scale:
        unit = _inverse(amax).astype(columns.dtype)
        steps = CLIP_STEPS if fmt.group > BLOCK else CLIP_STEPS[:-1]
        candidates = [(unit * columns.dtype.type(fmt.high + step), None) for step in steps]
    else:
        exponent = fmt.group_scale(amax)[1].astype(np.int32)
        there = np.where(amax > 0, 1.0, 0.0)
        candidates = [(np.ldexp(there, -exponent - step).astype(columns.dtype),
                       np.ldexp(there, exponent + step)) for step in (0, -1, 1)]
    best = np.full(amax.shape, -np.inf, columns.dtype)
    chosen = np.zeros(amax.shape)
    for inverse, scale in candidates:
        fmt.nearest(np.multiply(columns, inverse, out=rounded))
        cross = np.einsum("ij,ij->j", weighted, rounded)
        power = (np.einsum("ij,ij->j", rounded, rounded) if importance is None
                 else np.einsum("ij,ij,ij->j", rounded, rounded, importance))
        # The error is that of all zeros less the gain.
        if scale is None:
            with np.errstate(invalid="ignore", divide="ignore"):  # a group of zeros: never better
                scale = cross / power
                gain = scale * cross
        else:
            gain = scale * (2 * cross - scale * power)
        better = gain > best
        np.copyto(best, gain, where=better, casting="same_kind")
        np.copyto(chosen, scale, where=better)
    return split_scales(fmt, chosen)


def _scales(significand: NDArray[np.int16], shift: NDArray[np.int8],
            row_exponent: NDArray[np.int16]) -> NDArray[np.float64]:
    """Return the scales, (n, groups)."""
    return np.ldexp(significand.astype(np.float64), shift.astype(np.int32) + row_exponent[:, None])


def _inverse(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 / scale, 0 where it is 0."""
    return np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)


def _fed_back(weights: NDArray[np.float32], matrix: QuantisedMatrix, second: Floats
              ) -> QuantisedMatrix:
    """Return a matrix with integers, (n, K), chosen column by column so that errors of the outputs
    are small.

    Parameters
    ----------
    weights : float32 array, (n, K)
    matrix : :class:`QuantisedMatrix`
        Whose scales stay.
    second : array, (K, K)
        Second moments of the inputs.
    """
    fmt, k = matrix.format, weights.shape[1]

    def columns(of_groups: NDArray[Any]) -> NDArray[Any]:
        """Return what each group has, (n, groups), of each weight in its place, (K, n)."""
        return np.ascontiguousarray(np.repeat(of_groups, fmt.group, axis=1)[:, :k].T[order])

    order = np.argsort(-second.diagonal(), kind="stable")
    moments = second[np.ix_(order, order)].astype(np.float64)
    moments = (moments + moments.T) / 2
    diagonal = np.einsum("ii->i", moments)
    diagonal += max(_DAMPING * float(diagonal.mean()), np.finfo(np.float32).tiny)
    try:
        # Row i holds how the columns after i make up for an error of column i.
        upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    except np.linalg.LinAlgError:
        raise FormatError("moments must be those of real inputs, a matrix without negative "
                          "eigenvalues; measure them again") from None
    left = weights.T[order].astype(np.float64)  # (K, n): a column of the weights is a row here
    there = left != 0 if fmt.parts > 1 else None
    of_groups = _scales(matrix.significand, matrix.shift, matrix.row_exponent)
    scale, inverse = columns(of_groups), columns(_inverse(of_groups))
    offset = None if matrix.minimum is None else columns(
        np.ldexp(matrix.minimum.astype(np.float64), matrix.row_exponent[:, None].astype(np.int32)))
    zero = columns(fmt.zero_points(in_groups(matrix.integers, fmt.group))) if (
        fmt.zero_point) else None
    top = (1 << fmt.weight_bits) - 1
    integers = np.empty(left.shape, np.int8)
    for first in range(0, k, _FEEDBACK_COLUMNS):
        last = min(first + _FEEDBACK_COLUMNS, k)
        errors = np.empty((last - first, left.shape[1]))
        for i in range(first, last):
            wanted = left[i] if offset is None else left[i] - offset[i]
            rounded = fmt.nearest(wanted * inverse[i])
            if zero is not None:
                rounded = np.clip(rounded, -zero[i], top - zero[i])
            if there is not None:
                rounded *= there[i]
            integers[i] = rounded
            error = (wanted - rounded * scale[i]) / upper[i, i]
            errors[i - first] = error
            left[i + 1 : last] -= upper[i, i + 1 : last, None] * error
        left[last:] -= upper[first:last, last:].T @ errors
    back = np.empty_like(integers)
    back[order] = integers
    return replace(matrix, integers=np.ascontiguousarray(back.T))
