"""The device's arithmetic as integer functions on arrays: what hardware computes, bit for bit.

Two representations carry every value between exact integer dot products (docs/arithmetic.md):

* **block floats**: 32 mantissas of 8 bits (``a8``) or two planes of 8 bits (``a16``), a 4-bit shift
  for each block and a base exponent for each token;
* the **internal float**: an 18-bit signed mantissa with ``2**16 <= |m| < 2**17`` (or zero) and an
  exponent; the value is ``m * 2**e``. Zero is ``m == 0`` with ``e == 0``.

Every rounding is half to even on the magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import BLOCK
from moeaccel.formats.base import bfloat16_floats

Ints = NDArray[np.int64]

MANTISSA_BITS = 17
"""Magnitude bits of the internal float's mantissa."""

ELEMENT_BITS = 24
"""Magnitude bits of an element that enters the quantiser: float32's significand, or h."""

BFLOAT16_BITS = 8
"""Significant bits of a bfloat16, which is the upper half of a float32."""

EXPONENT_RANGE = 10
"""A block's exponent is at most this far below the token's largest."""

SUBNORMAL_EXPONENT = -2048
"""Exponent of the internal float that stands for a subnormal routing weight: no output times it
reaches any grid, so that what it weights underflows, and is counted."""

RAISE_THRESHOLD = 16711424
"""Least 24-bit significand that rounds to more than 32639 = 127 * 256 + 127, the largest balanced
``a16`` mantissa."""


@dataclass(frozen=True)
class InternalFloat:
    """Arrays of internal floats: ``mantissa * 2**exponent``, elementwise (int64)."""

    mantissa: Ints
    exponent: Ints

    def to_float64(self) -> NDArray[np.float64]:
        """Return the exact values."""
        return np.ldexp(self.mantissa.astype(np.float64), self.exponent.astype(np.int32))

    def __getitem__(self, key: object) -> InternalFloat:
        return InternalFloat(self.mantissa[key], self.exponent[key])  # type: ignore[index]


@dataclass(frozen=True)
class BlockFloat:
    """Quantised activations of ``n`` tokens.

    Parameters
    ----------
    mantissa : int64 array, (n, K)
        In [-127, 127] (``a8``) or [-32639, 32639] (``a16``).
    shift : int64 array, (n, K / 32)
        Block shifts, 0 to 11.
    base : int64 array, (n,)
        Exponent of the token: an element's value is ``mantissa * 2**(shift + base)``.
    planes : :class:`int`
        1 (``a8``) or 2 (``a16``).
    """

    mantissa: Ints
    shift: Ints
    base: Ints
    planes: int

    def to_float64(self) -> NDArray[np.float64]:
        """Return the exact values, (n, K)."""
        exponent = np.repeat(self.shift, BLOCK, axis=1) + self.base[:, None]
        return np.ldexp(self.mantissa.astype(np.float64), exponent.astype(np.int32))

    def plane_mantissas(self) -> list[Ints]:
        """Return the 8-bit planes, most significant first.

        ``a16``: ``[hi, lo]`` with ``m = 256 * hi + lo``.
        """
        if self.planes == 1:
            return [self.mantissa]
        low = ((self.mantissa + 128) & 255) - 128
        return [(self.mantissa - low) >> 8, low]


def bit_length(value: Ints) -> Ints:
    """Return the bit length of ``|value|``, |value| < 2**63 (0 for 0)."""
    magnitude = np.abs(value).astype(np.uint64)
    high = (magnitude >> np.uint64(32)).astype(np.float64)
    low = (magnitude & np.uint64(0xFFFFFFFF)).astype(np.float64)
    return np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1]).astype(np.int64)


def round_shift(value: Ints, shift: Ints | int) -> Ints:
    """Return ``value / 2**shift`` rounded half to even on the magnitude, |value| < 2**62.

    Any shift of 0 or more.
    """
    magnitude = np.abs(value)
    shift = np.asarray(np.broadcast_to(shift, magnitude.shape), dtype=np.int64)
    s = np.minimum(shift, 63)
    quotient = np.where(s >= 63, 0, magnitude >> np.minimum(s, 62))
    remainder = magnitude - np.where(s >= 63, 0, quotient << np.minimum(s, 62))
    half = np.where(s > 0, np.int64(1) << np.clip(s - 1, 0, 62), np.int64(1) << 62)
    up = (remainder > half) | ((remainder == half) & (quotient & 1 == 1))
    return np.where(value < 0, -(quotient + up), quotient + up)


def _round_to_bits(value: Ints, exponent: Ints | int, bits: int) -> tuple[Ints, Ints]:
    """Round ``value * 2**exponent`` to ``bits`` significant bits; return significand, exponent."""
    shift = bit_length(value) - bits
    rounded = round_shift(value, np.maximum(shift, 0)) << np.maximum(-shift, 0)
    carry = np.abs(rounded) == 1 << bits
    significand = np.where(carry, rounded >> 1, rounded)
    return significand, np.where(significand == 0, 0, exponent + shift + carry)


def normalise(value: Ints, exponent: Ints | int) -> InternalFloat:
    """Round integers to internal floats: ``value * 2**exponent``, |value| < 2**62."""
    return InternalFloat(
        *_round_to_bits(np.asarray(value, dtype=np.int64), exponent, MANTISSA_BITS))


def multiply(a: InternalFloat, b: InternalFloat) -> InternalFloat:
    """Return the product, rounded once."""
    return normalise(a.mantissa * b.mantissa, a.exponent + b.exponent)


def add(a: InternalFloat, b: InternalFloat) -> InternalFloat:
    """Return the sum, rounded once."""
    a_first = (b.mantissa == 0) | ((a.mantissa != 0) & (a.exponent >= b.exponent))
    large, other = np.where(a_first, a.mantissa, b.mantissa), np.where(
        a_first, b.mantissa, a.mantissa)
    exponent, low = np.where(a_first, a.exponent, b.exponent), np.where(
        a_first, b.exponent, a.exponent)
    distance = np.where(other == 0, 0, exponent - low)
    # Farther away the other one is less than 2**-24 of the last bit: nothing is rounded up to it.
    near = distance <= 42
    shift = np.where(near, distance, 0)
    total = np.asarray((large << shift) + np.where(near, other, 0), np.int64)
    return normalise(total, exponent - shift)


def bfloat16_to_internal(bits: NDArray[np.uint16]) -> InternalFloat:
    """Return bfloat16 numbers, given by their bits (biases).

    Exponent field 0 is zero, field 255 an exponent as any other: what is stored is finite.
    """
    field = bits.astype(np.int64)
    significand = (field & 0x7F | 0x80) << MANTISSA_BITS - 8
    exponent = (field >> 7 & 255) - (127 + MANTISSA_BITS - 1)
    zero = (field >> 7 & 255) == 0
    return InternalFloat(np.where(zero, 0, np.where(field >> 15, -significand, significand)),
                         np.where(zero, 0, exponent))


def multiply_to_element(a: InternalFloat, b: InternalFloat) -> tuple[Ints, Ints]:
    """Return the product as (significand, exponent) of :func:`quantise_elements`, rounded once."""
    return _round_to_bits(a.mantissa * b.mantissa, a.exponent + b.exponent, ELEMENT_BITS)


def split_float32(values: NDArray[np.float32]) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """Split float32 into (signed 24-bit significand, exponent, is not finite).

    Subnormals and what is not finite are zero. All else is ``significand * 2**exponent`` with
    ``2**23 <= |significand| < 2**24``.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.int64)
    field = (bits >> 23) & 255
    nonfinite = field == 255
    significand = np.where((field == 0) | nonfinite, 0, (bits & 0x7FFFFF) | 0x800000)
    return (
        np.where(bits >> 31, -significand, significand),
        np.where(significand == 0, 0, field - 150),
        nonfinite,
    )


def float32_to_internal(values: NDArray[np.float32]) -> InternalFloat:
    """Round float32 to internal floats (routing weights).

    Non-finite values count as zero. Subnormals become ``+-2**16 * 2**SUBNORMAL_EXPONENT``.
    """
    significand, exponent, nonfinite = split_float32(values)
    rounded = normalise(significand, exponent)
    subnormal = (significand == 0) & ~nonfinite & (values != 0)
    tiny = np.where(np.signbit(values), -1, 1) << (MANTISSA_BITS - 1)
    return InternalFloat(np.where(subnormal, tiny, rounded.mantissa),
                         np.where(subnormal, SUBNORMAL_EXPONENT, rounded.exponent))


def quantise_elements(significand: Ints, exponent: Ints, planes: int) -> BlockFloat:
    """Quantise elements to block floats; docs/arithmetic.md, after OCP Microscaling v1.0.

    Parameters
    ----------
    significand, exponent : int64 arrays, (n, K)
        Elements ``significand * 2**exponent``, each zero or with ``2**23 <= |significand| <
        2**24``.
    planes : :class:`int`
        1: 8-bit mantissas in [-127, 127]. 2: 16-bit mantissas in [-32639, 32639].
    """
    n, k = significand.shape
    significand = significand.reshape(n, k // BLOCK, BLOCK)
    top = exponent.reshape(n, k // BLOCK, BLOCK) + (ELEMENT_BITS - 1)  # floor(log2 |element|)
    never = np.int64(-(1 << 20))
    top = np.where(significand == 0, never, top)
    block_top = top.max(axis=2)
    token_top = block_top.max(axis=1)
    token_top = np.where(token_top == never, EXPONENT_RANGE, token_top)
    floor = (token_top - EXPONENT_RANGE)[:, None]
    mantissa_top = 6 if planes == 1 else 14
    shift = np.maximum(block_top - floor, 0)
    if planes == 2:  # raise blocks whose largest mantissa would round beyond balanced digits
        largest = np.where(top == block_top[:, :, None], np.abs(significand), 0).max(axis=2)
        shift = shift + ((block_top >= floor) & (largest >= RAISE_THRESHOLD))
    right = (shift + floor)[:, :, None] - top + (ELEMENT_BITS - 1 - mantissa_top)
    mantissa = round_shift(significand, np.clip(right, 0, 62))
    if planes == 1:
        mantissa = np.clip(mantissa, -127, 127)
    base = token_top - EXPONENT_RANGE - mantissa_top
    return BlockFloat(mantissa.reshape(n, k), shift, base, planes)


def quantise_float32(
    values: NDArray[np.float32], planes: int
) -> tuple[BlockFloat, NDArray[np.bool_]]:
    """Quantise float32 activations, (n, K); also return which tokens are not finite, (n,)."""
    significand, exponent, nonfinite = split_float32(values)
    return quantise_elements(significand, exponent, planes), np.asarray(nonfinite.any(axis=1))


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the upper halves of float32 whose lower halves are zero: bfloat16 as it is stored."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


from_bfloat16 = bfloat16_floats


# -- exact combination
TERM_BITS = 43
"""Magnitude bits of one weighted output on the grid: 16 of them cannot overflow the 48-bit sum."""


def weighted_output(
    output: InternalFloat, weight: InternalFloat, grid_exponent: int
) -> tuple[Ints, Ints, Ints]:
    """Round ``output * weight`` once to the grid of ``2**grid_exponent``.

    Returns
    -------
    (term, overflow, underflow)
        ``term`` fits 43 bits and a sign; where it would not, it is zero and ``overflow`` is 1.
        Where it is rounded to zero and was not zero, ``underflow`` is 1.
    """
    product = output.mantissa * weight.mantissa
    shift = output.exponent + weight.exponent - grid_exponent
    overflow = (product != 0) & (bit_length(product) + shift > TERM_BITS)
    term = np.where(
        shift < 0,
        round_shift(product, np.maximum(-shift, 0)),
        product << np.clip(shift, 0, TERM_BITS - 2 * (MANTISSA_BITS - 1)),
    )
    underflow = (product != 0) & (term == 0) & ~overflow
    return np.where(overflow, 0, term), overflow.astype(np.int64), underflow.astype(np.int64)


def grid_to_float32(total: Ints, grid_exponent: int, bits: int = ELEMENT_BITS
                    ) -> NDArray[np.float32]:
    """Convert 48-bit grid sums to float32, rounded once (half to even; overflow gives infinity).

    ``bits``: significant ones; with BFLOAT16_BITS the result is a bfloat16.
    """
    shift = np.maximum(bit_length(total) - bits, 0)
    rounded = round_shift(total, shift)  # at most 2**24: exact in float32
    return np.ldexp(rounded.astype(np.float64), (shift + grid_exponent).astype(np.int32)).astype(
        np.float32
    )
