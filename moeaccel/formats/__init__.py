"""Weight formats: a file for each family says what it means, how it is stored and how a tensor
becomes one.

Every module of this folder that has a tuple ``FORMATS`` adds its formats to the registry; nothing
else needs to know of a new one. Those of a tuple ``OPTIONAL`` are for configurations that name
them: they cost hardware, or are there for few.
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
    MINIMUM_SHIFT_BITS,
    MINIMUM_SHIFT_MAX,
    QUAD,
    SHARED_FIELD_BITS,
    SHIFT_BITS,
    SIGNIFICAND_BITS,
    ZERO_POINT_BITS,
    QuantisedMatrix,
    WeightFormat,
    in_groups,
    minima,
    minimum_entries,
)
from moeaccel.formats.patterns import PRUNINGS, check_pattern, prune
from moeaccel.formats.quantisers import (
    QUANTISERS,
    Measured,
    Weights,
    feed_back,
    quantise_matrix,
    quantise_measured,
    widened,
)

__all__ = ["ALL_FORMATS", "BLOCK", "FORMATS", "MINIMUM_SHIFT_BITS", "MINIMUM_SHIFT_MAX", "PRUNINGS",
           "QUAD", "QUANTISERS", "SHARED_FIELD_BITS", "SHIFT_BITS", "SIGNIFICAND_BITS",
           "ZERO_POINT_BITS", "Measured", "QuantisedMatrix", "WeightFormat", "Weights",
           "check_dims", "check_matrix", "check_pattern", "in_groups", "prune", "quantise",
           "quantise_measured", "weight_format", "whole_blocks", "widened"]


def _registry(*tuples: str) -> dict[str, WeightFormat]:
    """Return the formats of all families by name, in the order of their codes."""
    found: list[WeightFormat] = []
    for module in pkgutil.iter_modules(__path__):
        for name in tuples:
            found += getattr(importlib.import_module(f"{__name__}.{module.name}"), name, ())
    found.sort(key=lambda f: f.code)
    for attribute in ("name", "code"):
        values = [getattr(f, attribute) for f in found]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise FormatError(f"{attribute} of a weight format must be its own, not {twice} twice")
    return {f.name: f for f in found}


ALL_FORMATS = _registry("FORMATS", "OPTIONAL")
"""Every weight format by name, in the order of their codes."""

FORMATS = {name: fmt for name, fmt in ALL_FORMATS.items() if name in _registry("FORMATS")}
"""Those of configurations that do not name any."""


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
        return ALL_FORMATS[name]
    except (KeyError, TypeError):
        raise FormatError(
            f"weight_format must be one of {', '.join(ALL_FORMATS)}, not {name!r}"
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
    if not isinstance(fmt, WeightFormat) or ALL_FORMATS.get(fmt.name) != fmt:
        raise FormatError(f"{what}: format must be one of {', '.join(ALL_FORMATS)}, not {fmt!r}")
    shape = np.shape(matrix.integers)
    if len(shape) != 2 or 0 in shape:
        raise FormatError(f"{what}: integers must be a matrix (rows, K), not of the shape {shape}")
    groups = shape[0], -(-shape[1] // fmt.group)
    for name, expected, dtype in (
            ("integers", shape, np.int8), ("significand", groups, np.int16),
            ("shift", groups, np.int8), ("row_exponent", shape[:1], np.int16),
            *([("minimum", groups, np.int32)] if fmt.minimum else [])):
        values = getattr(matrix, name)
        if not isinstance(values, np.ndarray) or values.dtype != dtype or values.shape != expected:
            found = (f"{values.dtype} of the shape {values.shape}"
                     if isinstance(values, np.ndarray) else type(values).__name__)
            raise FormatError(f"{what}: {name} must be an array, {np.dtype(dtype)} of the shape "
                              f"{expected}, not {found}")
    if not fmt.minimum and matrix.minimum is not None:
        raise FormatError(f"{what}: minimum must be None, as {fmt.name} has no minima, not an "
                          "array; leave it out")
    bias = matrix.bias
    if bias is not None:
        if (not isinstance(bias, np.ndarray) or bias.dtype != np.uint16
                or bias.shape != shape[:1]):
            raise FormatError(f"{what}: bias must be None, or an array, uint16 of the shape "
                              f"{shape[:1]}; QuantisedMatrix.with_bias() makes one")
        wrong = (bias & 0x7F80) == 0x7F80
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise FormatError(f"{what}: bias must be finite, but row {row} holds "
                              f"{matrix.bias_values[row]}")
    _check_values(what, matrix.integers, "integers", fmt.name, fmt.known)
    whole = fmt.whole_groups(in_groups(matrix.integers, fmt.group))
    check_pattern(matrix.integers, fmt)
    if not whole.all():
        row, group = (int(i) for i in np.argwhere(~whole)[0])
        raise FormatError(f"{what}: integers of {fmt.name} must lie within 15 of each other and of "
                          f"0 in each group of {fmt.group}, but those of row {row}, group {group} "
                          "do not")
    _check_values(what, matrix.significand, "significand", fmt.name,
                  range(1 << SIGNIFICAND_BITS) if fmt.real_scale else range(1, 2))
    _check_values(what, matrix.shift, "shift", fmt.name, range(fmt.max_shift + 1))
    _check_values(what, matrix.row_exponent, "row_exponent", fmt.name, ROW_EXPONENTS)
    if matrix.minimum is not None:
        wrong = minima(minimum_entries(matrix.minimum)) != matrix.minimum
        if wrong.any():
            row, group = (int(i) for i in np.argwhere(wrong)[0])
            raise FormatError(
                f"{what}: minimum of {fmt.name} must be an integer of {SIGNIFICAND_BITS} bits with "
                f"up to {MINIMUM_SHIFT_MAX} zeros behind them, but row {row}, group {group} holds "
                f"{matrix.minimum[row, group]}")
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


def quantise(weights: NDArray[np.floating], name: str | WeightFormat, *,
             quantiser: str = "search",
             moments: NDArray[np.floating] | None = None) -> QuantisedMatrix:
    """Quantise a float matrix, (n, K).

    Parameters
    ----------
    weights : float array, (n, K)
    name : :class:`str`
        Of a format.
    quantiser : :class:`str`
        ``"search"``: scales of little squared error. ``"amax"``: scales from the largest magnitude
        of each group alone. ``"gptq"``: ``"search"``, then integers with error feedback
        (:mod:`moeaccel.formats.quantisers`).
    moments : float array, optional
        How large the inputs are that the weights will meet: mean squares, (K,), for ``"search"``,
        or second moments, (K, K), for both, ``"gptq"`` asks for these. Their unit does not matter.

    Raises
    ------
    FormatError
        Unknown format or quantiser, no rows or columns, moments that are none, a weight that is
        not finite, or weights without the pattern of an N:M format (:func:`prune`).
    """
    fmt = weight_format(name)
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim != 2:
        raise FormatError(
            f"weights must be a matrix (rows, K), not an array of shape {weights.shape}"
        )
    n, k = weights.shape
    check_dims(rows=n, K=k)
    again = quantiser == "gptq" and not fmt.scaled_alone
    if again and moments is None:
        raise FormatError(f"moments of quantiser 'gptq' must be an array of the shape {(k, k)}, "
                          "not left out")
    matrix = fmt.quantised(weights, "search" if again else quantiser, moments)
    if matrix is None:
        matrix = quantise_matrix(weights, fmt, quantiser, moments)
    if again:
        matrix = feed_back(weights, matrix, moments)
    check_pattern(matrix.integers, fmt)
    return matrix
