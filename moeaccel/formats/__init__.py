"""Weight formats: a file for each family says what it means, how it is stored and how a tensor
becomes one.

Every module of this folder that has a tuple ``FORMATS`` adds its formats to the registry; nothing
else needs to know of a new one.
"""

from __future__ import annotations

import importlib
import pkgutil

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
           "QuantisedMatrix", "WeightFormat", "check_dims", "quantise", "weight_format"]


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


def check_dims(**dims: int) -> None:
    """Raise :class:`FormatError` unless every named dimension is a positive multiple of 32."""
    for name, value in dims.items():
        if value <= 0 or value % BLOCK:
            raise FormatError(
                f"{name} must be a positive multiple of {BLOCK}, not {value}; "
                "pad the weights with zeros"
            )


def quantise(weights: NDArray[np.floating], name: str | WeightFormat) -> QuantisedMatrix:
    """Quantise a float matrix, (n, K), round to nearest, as the format's family has it.

    Raises
    ------
    FormatError
        Unknown format, K not a multiple of 32, or a weight that is not finite.
    """
    fmt = weight_format(name)
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim != 2:
        raise FormatError(
            f"weights must be a matrix (rows, K), not an array of shape {weights.shape}"
        )
    n, k = weights.shape
    check_dims(K=k)
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
