"""Weight formats: encode, decode, quantise a float tensor, report the error.

A weight is ``integer * significand * 2**shift * 2**row_exponent``: a small signed integer, a scale
for each group along K (an 11-bit significand, or 1 in power-of-two formats, and a non-negative
shift) and one exponent for each row, so that the shifts of a row start at its largest scale minus
``max_shift``. Groups whose scale lies below that range are coarsened, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import BLOCK
from moeaccel.errors import FormatError

SIGNIFICAND_BITS = 11

E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12], dtype=np.int8)
"""Twice the magnitudes of FP4 E2M1 by code (OCP Microscaling v1.0): integers."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of one format are stored and what they mean.

    Parameters
    ----------
    name, code : :class:`str`, :class:`int`
        Name for users; number in images, layer descriptors and hardware.
    weight_bits : :class:`int`
        4 (two rows share a multiplier) or 8.
    group : :class:`int`
        Weights along K that share a scale; the last group of a row may be short.
    scale_bits : :class:`int`
        Stored bits of a scale. 16: significand in bits 0 to 10, shift in bits 11 to 15. 8: the
        shift alone.
    max_integer : :class:`int`
        Largest magnitude of a decoded integer.
    max_shift : :class:`int`
        Largest shift; chosen so that the accumulator closes at 53 bits for K = 32768 (DESIGN
        section 3).
    """

    name: str
    code: int
    weight_bits: int
    group: int
    scale_bits: int
    max_integer: int
    max_shift: int

    @property
    def packed(self) -> bool:
        """Whether two rows share one multiplier."""
        return self.weight_bits == 4

    @property
    def real_scale(self) -> bool:
        """Whether a scale has a significand."""
        return self.scale_bits == 16

    @property
    def steps_per_group(self) -> int:
        """Blocks of 32 that share a scale."""
        return self.group // BLOCK

    @property
    def scaled_block_bits(self) -> int:
        """Magnitude bits of a block's sum times its scale, before the activation's shift."""
        block = (
            BLOCK * 128 * self.max_integer * ((1 << SIGNIFICAND_BITS) - 1 if self.real_scale else 1)
        )
        return block.bit_length() + self.max_shift

    def rows(self, row_multipliers: int) -> int:
        """Rows of one tile on an array with that many multiplier rows."""
        return row_multipliers * (2 if self.packed else 1)

    def bits_per_weight(self) -> float:
        """Stored bits of a weight, scales included, for K a multiple of the group."""
        return self.weight_bits + self.scale_bits / self.group


FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat("mxint8", 0, 8, 32, 8, 127, 13),
        WeightFormat("int4_g32", 1, 4, 32, 16, 8, 6),
        WeightFormat("int4_g128", 2, 4, 128, 16, 8, 6),
        WeightFormat("mxfp4", 3, 4, 32, 8, 12, 15),
    )
}


def weight_format(name: str | WeightFormat) -> WeightFormat:
    """Return the format of that name."""
    if isinstance(name, WeightFormat):
        return name
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise FormatError(
            f"weight_format must be one of {', '.join(FORMATS)}, not {name!r}"
        ) from None


@dataclass(frozen=True)
class QuantisedMatrix:
    """A quantised matrix of ``n`` rows and K columns.

    Parameters
    ----------
    format : :class:`WeightFormat`
    integers : int8 array, (n, K)
        Decoded integers (``mxfp4``: twice the E2M1 value).
    significand : int16 array, (n, groups)
        1 in power-of-two formats, else 0 to 2047.
    shift : int8 array, (n, groups)
        0 to ``max_shift``.
    row_exponent : int16 array, (n,)
    coarsened : :class:`int`
        Groups whose scale the row's range clamped.
    """

    format: WeightFormat
    integers: NDArray[np.int8]
    significand: NDArray[np.int16]
    shift: NDArray[np.int8]
    row_exponent: NDArray[np.int16]
    coarsened: int

    def __getitem__(self, rows: slice) -> QuantisedMatrix:
        """Return some rows; ``coarsened`` stays that of the whole."""
        return replace(
            self, integers=self.integers[rows], significand=self.significand[rows],
            shift=self.shift[rows], row_exponent=self.row_exponent[rows])

    def filled(self, rows: int, k: int) -> QuantisedMatrix:
        """Return the matrix with zeros behind its rows and columns, (rows, k)."""
        n, columns = self.integers.shape
        if (n, columns) == (rows, k):
            return self
        groups = -(-k // self.format.group)
        below = [(0, rows - n)]
        right = [(0, groups - self.significand.shape[1])]
        return replace(
            self,
            integers=np.pad(self.integers, [*below, (0, k - columns)]),
            significand=np.pad(self.significand, below + right,
                               constant_values=0 if self.format.real_scale else 1),
            shift=np.pad(self.shift, below + right),
            row_exponent=np.pad(self.row_exponent, below))

    def dequantise(self) -> NDArray[np.float64]:
        """Return the exact weights, (n, K) float64."""
        scale = np.ldexp(
            self.significand.astype(np.float64),
            self.shift.astype(np.int32) + self.row_exponent[:, None].astype(np.int32),
        )
        scales = np.repeat(scale, self.format.group, axis=1)[:, : self.integers.shape[1]]
        return self.integers.astype(np.float64) * scales

    def relative_error(self, weights: NDArray[np.floating]) -> float:
        """Return the relative Frobenius error against the float weights it came from."""
        return float(np.linalg.norm(self.dequantise() - weights) / np.linalg.norm(weights))


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
    _check_values(what, matrix.integers, "integers", fmt.name, _known_integers(fmt))
    _check_values(what, matrix.significand, "significand", fmt.name,
                  range(1 << SIGNIFICAND_BITS) if fmt.real_scale else range(1, 2))
    _check_values(what, matrix.shift, "shift", fmt.name, range(fmt.max_shift + 1))
    _check_values(what, matrix.row_exponent, "row_exponent", fmt.name, ROW_EXPONENTS)
    if not 0 <= matrix.coarsened <= groups[0] * groups[1]:
        raise FormatError(f"{what}: coarsened must be from 0 to its {groups[0] * groups[1]} "
                          f"groups, not {matrix.coarsened}")


def _known_integers(fmt: WeightFormat) -> Sequence[int]:
    """Return what a format's codes stand for, in order, without what its range excludes."""
    codes = np.arange(1 << fmt.weight_bits, dtype=np.uint8)
    return sorted({i for i in decode_integers(fmt, codes).tolist() if abs(i) <= fmt.max_integer})


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
    """Quantise a float matrix, (n, K), round to nearest.

    ``mxint8`` and ``mxfp4`` follow OCP Microscaling v1.0 (scale 2**(floor(log2 amax) - emax), here
    with -127 as the least ``mxint8`` integer); ``int4`` uses amax / 7, rounded to an 11-bit
    significand, and integers in [-8, 7].

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
    significand, exponent = _scales(fmt, amax)
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
    integers = _INTEGERS[fmt.name]((grouped * inverse[:, :, None]).astype(np.float64, copy=False))
    integers = integers.reshape(n, groups * fmt.group)[:, :k]
    return QuantisedMatrix(
        fmt,
        np.ascontiguousarray(integers),
        significand.astype(np.int16),
        shift.astype(np.int8),
        row_exponent.astype(np.int16),
        int(clamped.sum()),
    )


def _scales(
    fmt: WeightFormat, amax: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (significand, exponent) of each group's unclamped scale."""
    if fmt.real_scale:
        fraction, exponent = np.frexp(amax / 7)
        significand = np.rint(fraction * (1 << SIGNIFICAND_BITS)).astype(np.int64)
        carry = significand >> SIGNIFICAND_BITS
        return significand >> carry, exponent.astype(np.int64) - SIGNIFICAND_BITS + carry
    floor_log2 = np.frexp(amax)[1].astype(np.int64) - 1
    # mxint8: 2**-6 is an integer's unit; mxfp4: emax 2 of E2M1, and integers are doubled.
    return np.ones(amax.shape, np.int64), floor_log2 - (6 if fmt.name == "mxint8" else 3)


def _round_mxfp4(scaled: NDArray[np.float64]) -> NDArray[np.int8]:
    """Round to the E2M1 grid (doubled), half to even code, saturating."""
    magnitude = np.abs(scaled)
    # Midpoints between neighbours; a tie goes to the even code: below at even lower codes, above at
    # odd ones.
    code = np.zeros(scaled.shape, np.int8)
    for lower, (a, b) in enumerate(pairwise(E2M1_DOUBLED)):
        middle = (float(a) + float(b)) / 2
        code += (magnitude > middle) if lower % 2 == 0 else (magnitude >= middle)
    return np.where(scaled < 0, -E2M1_DOUBLED[code], E2M1_DOUBLED[code]).astype(np.int8)


_INTEGERS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.int8]]] = {
    "mxint8": lambda x: np.clip(np.rint(x), -127, 127).astype(np.int8),
    "int4_g32": lambda x: np.clip(np.rint(x), -8, 7).astype(np.int8),
    "int4_g128": lambda x: np.clip(np.rint(x), -8, 7).astype(np.int8),
    "mxfp4": _round_mxfp4,
}


def encode_integers(fmt: WeightFormat, integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return the stored code of each integer: two's complement, or sign and E2M1 magnitude
    (``mxfp4``)."""
    if fmt.name == "mxfp4":
        lookup = np.zeros(256, np.uint8)
        for code, value in enumerate(E2M1_DOUBLED):
            lookup[np.uint8(np.int8(-value).view(np.uint8))] = code | 8
            lookup[np.uint8(value)] = code
        return lookup[integers.view(np.uint8)]
    return integers.view(np.uint8) & np.uint8((1 << fmt.weight_bits) - 1)


def decode_integers(fmt: WeightFormat, codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Return the integer of each stored code."""
    if fmt.name == "mxfp4":
        magnitude = E2M1_DOUBLED[codes & 7]
        return np.where(codes & 8, -magnitude, magnitude).astype(np.int8)
    sign = np.uint8(1 << (fmt.weight_bits - 1))
    return ((codes ^ sign).astype(np.int16) - int(sign)).astype(np.int8)
