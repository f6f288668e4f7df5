"""Weight formats: a file for each family says what it means, how it is stored and how a tensor
becomes one.

Every module of this folder that has a tuple ``FORMATS`` adds its formats to the registry; nothing
else needs to know of a new one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import FormatError
from moeaccel.formats.base import (
    BLOCK,
    SHARED_FIELD_BITS,
    SHIFT_BITS,
    SIGNIFICAND_BITS,
    QuantisedMatrix,
    WeightFormat,
)

__all__ = ["BLOCK", "FORMATS", "SHARED_FIELD_BITS", "SHIFT_BITS", "SIGNIFICAND_BITS",
           "QuantisedMatrix", "WeightFormat", "check_dims", "check_matrix", "quantise",
           "weight_format", "whole_blocks"]


def _registry() -> dict[str, WeightFormat]:
    """Return the formats of all families by name, in the order of their codes."""
    found: list[WeightFormat] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "FORMATS", ())
    found.sort(key=lambda f: f.code)
    for attribute in ("name", "code"):
        values = [getattr(f, attribute) for f in found]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise FormatError(f"{attribute} of a weight format must be its own, not {twice} twice")
    return {f.name: f for f in found}


FORMATS = _registry()
"""Every weight format by name, in the order of their codes."""


def weight_format(name: str | WeightFormat) -> WeightFormat:
    """Return the format of that name.

    Raises
    ------
    FormatError
        If there is none.
    """
    if isinstance(name, WeightFormat):
        return name
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise FormatError(
            f"weight_format must be one of {', '.join(FORMATS)}, not {name!r}"
        ) from None


def whole_blocks(dim: int) -> int:
    """Return a dimension as memory and array have it: filled up with zeros to a multiple of 32."""
    return -(-dim // BLOCK) * BLOCK


def check_dims(**dims: int) -> None:
    """Raise :class:`FormatError` unless every named dimension is positive."""
    for name, value in dims.items():
        if value <= 0:
            raise FormatError(f"{name} must be at least 1, not {value}")


ROW_EXPONENTS = range(-256, 256)
"""Row exponents for which no exponent of the device's chain leaves its 12 bits, whatever x; those
of float32 weights lie well inside."""


def check_matrix(matrix: QuantisedMatrix, what: str = "matrix") -> None:
    """Make sure that a matrix holds what its format can say; on anything else golden model and
    hardware need not agree.

    Parameters
    ----------
    matrix : :class:`QuantisedMatrix`
    what : :class:`str`
        For messages.

    Raises
    ------
    FormatError
        Naming the field, the first row, the value and its range.
    """
    fmt = matrix.format
    if not isinstance(fmt, WeightFormat) or FORMATS.get(fmt.name) != fmt:
        raise FormatError(f"{what}: format must be one of {', '.join(FORMATS)}, not {fmt!r}")
    shape = np.shape(matrix.integers)
    if len(shape) != 2 or 0 in shape:
        raise FormatError(f"{what}: integers must be a matrix (rows, K), not of the shape {shape}")
    groups = shape[0], -(-shape[1] // fmt.group)
    for name, expected, dtype in (
            ("integers", shape, np.int8), ("significand", groups, np.int16),
            ("shift", groups, np.int8), ("row_exponent", shape[:1], np.int16)):
        values = getattr(matrix, name)
        if not isinstance(values, np.ndarray) or values.dtype != dtype or values.shape != expected:
            found = (f"{values.dtype} of the shape {values.shape}"
                     if isinstance(values, np.ndarray) else type(values).__name__)
            raise FormatError(f"{what}: {name} must be an array, {np.dtype(dtype)} of the shape "
                              f"{expected}, not {found}")
    known = sorted({int(i) for i in fmt.integers if fmt.low <= i <= fmt.high})
    _check_values(what, matrix.integers, "integers", fmt.name, known)
    _check_values(what, matrix.significand, "significand", fmt.name,
                  range(1 << SIGNIFICAND_BITS) if fmt.real_scale else range(1, 2))
    _check_values(what, matrix.shift, "shift", fmt.name, range(fmt.max_shift + 1))
    _check_values(what, matrix.row_exponent, "row_exponent", fmt.name, ROW_EXPONENTS)
    if not 0 <= matrix.coarsened <= groups[0] * groups[1]:
        raise FormatError(f"{what}: coarsened must be from 0 to its {groups[0] * groups[1]} "
                          f"groups, not {matrix.coarsened}")


def _check_values(what: str, values: NDArray[np.integer], field: str, name: str,
                  known: Sequence[int]) -> None:
    low, high = known[0], known[-1]
    whole = len(known) == high - low + 1
    wrong = (values < low) | (values > high)
    if not whole:
        good = np.zeros(high - low + 1, bool)
        good[np.array(known) - low] = True
        wrong |= ~good[np.clip(values, low, high).astype(np.int64) - low]
    if wrong.any():
        row, *rest = (int(i) for i in np.argwhere(wrong)[0])
        where = "".join(f", {'column' if field == 'integers' else 'group'} {i}" for i in rest)
        allowed = f"from {low} to {high}" if whole else f"one of {', '.join(map(str, known))}"
        raise FormatError(f"{what}: {field} of {name} must be {allowed if low < high else low}, "
                          f"but row {row}{where} holds {values[row, *rest]}")


def quantise(weights: NDArray[np.floating], name: str | WeightFormat) -> QuantisedMatrix:
    """Quantise a float matrix, (n, K), round to nearest, as the format's family has it.

    Raises
    ------
    FormatError
        Unknown format, no rows or columns, or a weight that is not finite.
    """
    fmt = weight_format(name)
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim != 2:
        raise FormatError(
            f"weights must be a matrix (rows, K), not an array of shape {weights.shape}"
        )
    n, k = weights.shape
    check_dims(rows=n, K=k)
    if not np.isfinite(weights).all():
        raise FormatError("weights must be finite; the tensor holds NaN or infinity")
    groups = -(-k // fmt.group)
    padded = (
        weights
        if groups * fmt.group == k
        else np.pad(weights, ((0, 0), (0, groups * fmt.group - k)))
    )
    grouped = padded.reshape(n, groups, fmt.group)
    amax = np.maximum(grouped.max(axis=2), -grouped.min(axis=2)).astype(np.float64)
    significand, exponent = fmt.group_scale(amax)
    never = np.int64(-(1 << 14))
    exponent = np.where(amax > 0, exponent, never)
    top = exponent.max(axis=1)
    row_exponent = np.where(top == never, 0, top - fmt.max_shift)
    below = np.maximum(row_exponent[:, None] - exponent, 0)
    clamped = (below > 0) & (amax > 0)
    if fmt.real_scale:
        significand = np.rint(significand / 2.0 ** np.minimum(below, 30)).astype(np.int64)
    shift = np.maximum(exponent - row_exponent[:, None], 0)
    significand = np.where(amax > 0, significand, 0 if fmt.real_scale else 1)
    shift = np.where(amax > 0, shift, 0)
    scale = np.ldexp(
        significand.astype(np.float64), (shift + row_exponent[:, None]).astype(np.int32)
    )
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale > 0, 1 / scale, 0)
    integers = fmt.nearest((grouped * inverse[:, :, None]).astype(np.float64, copy=False))
    integers = integers.reshape(n, groups * fmt.group)[:, :k]
    return QuantisedMatrix(
        fmt,
        np.ascontiguousarray(integers),
        significand.astype(np.int16),
        shift.astype(np.int8),
        row_exponent.astype(np.int16),
        int(clamped.sum()),
    )
