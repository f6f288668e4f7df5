"""Integer functions of the router, shared by golden model and hardware.

exp2, reciprocal and what ``sqrt_softplus`` needs are tables of linear segments: lines that are
continuous, monotone, and off by the same in both directions. Arguments and values are fixed point:

* logits and what is added to them: multiples of 2**-20, 32 bits signed;
* scores: multiples of 2**-36; keys with a selection bias: multiples of 2**-22, 32 bits signed;
* values of the tables: 24 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import Ints, bit_length, round_shift
from moeaccel.router.choices import PART_BITS

__all__ = [
    "EXP2",
    "KEY_BITS",
    "LOG1P",
    "LOGIT_BITS",
    "NEVER",
    "RECIPROCAL",
    "SCORE_BITS",
    "SQRT",
    "VALUE_BITS",
    "WORD_BITS",
    "WORD_MAX",
    "WORD_MIN",
    "Exponential",
    "Lines",
    "exponential",
    "fixed",
    "leading",
    "part",
    "quotient",
    "sigmoid",
    "significand",
    "sqrt_softplus",
    "to_float32",
]

LOGIT_BITS = 20
"""Fraction bits of a logit."""
WORD_BITS = 32
"""Bits of a logit and of a key, sign included."""
WORD_MIN, WORD_MAX = -(1 << (WORD_BITS - 1)), (1 << (WORD_BITS - 1)) - 1
"""Least and largest of those: what is beyond becomes one of them."""
NEVER = WORD_MIN
"""What is added to the key of an expert that is never chosen."""
KEY_BITS = 22
"""Fraction bits of a key that is a score plus a selection bias."""
SCORE_BITS = 36
"""Fraction bits of a score."""
VALUE_BITS = 24
"""Bits of a table's value."""
FRACTION_BITS = 15
"""Bits of the position within a segment."""

LOG2E = 6051102
"""log2(e) in units of 2**-22, off by 3e-9 of it."""
LOG2E_BITS = 22

EXPONENTIAL_LIMIT = 32 << LOGIT_BITS
"""From here on exp(-d) is 0: it is below 2**-46."""

_Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Lines:
    """A function as linear segments.

    Parameters
    ----------
    node, step : int64 arrays, (segments,)
        Value at a segment's left end, 24 bits, and how much larger that at its right end is, up to
        16 bits and, if the function falls, negative.
    """

    node: Ints
    step: Ints

    @property
    def segments(self) -> int:
        """Segments: a power of two."""
        return len(self.node)

    @property
    def rises(self) -> bool:
        """Whether the function rises."""
        return bool(self.step[0] > 0)

    def __call__(self, position: Ints) -> Ints:
        """Return the values at positions, in units of a segment times 2**-15."""
        index = position >> FRACTION_BITS
        part = np.abs(self.step[index]) * (position & ((1 << FRACTION_BITS) - 1))
        part = (part + (1 << (FRACTION_BITS - 1))) >> FRACTION_BITS
        return self.node[index] + (part if self.rises else -part)

    def packed(self) -> list[int]:
        """Return a ROM's words: node (24 bits), magnitude of the step (16), least significant
        first."""
        return [int(n) | abs(int(s)) << VALUE_BITS
                for n, s in zip(self.node, self.step, strict=True)]


def _lines(places: NDArray[np.float64], f: _Function, second: _Function, unit: float,
           width: NDArray[np.float64]) -> tuple[Ints, Ints]:
    """Return nodes and steps of lines on ``places``: nodes are moved by half of what a chord is off
    in its middle, width**2 / 8 of the second derivative."""
    node = np.rint((f(places) - second(places) * width**2 / 16) * unit).astype(np.int64)
    node = np.minimum(node, (1 << VALUE_BITS) - 1)
    return node[:-1], np.diff(node)


def _table(segments: int, f: _Function, second: _Function) -> Lines:
    """Return the lines of a function from [0, 1] to (0, 1]."""
    places = np.arange(segments + 1) / segments
    return Lines(*_lines(places, f, second, 2.0**VALUE_BITS, np.full(len(places), 1 / segments)))


def _sqrt_table(segments: int) -> Lines:
    """Return the lines of sqrt from [1, 2), then [2, 4), half of the segments each, to [1, 2)."""
    half = segments // 2
    parts = [_lines(octave * (1 + np.arange(half + 1) / half), np.sqrt, lambda m: -m**-1.5 / 4,
                    2.0**(VALUE_BITS - 1), np.full(half + 1, octave / half))
             for octave in (1, 2)]
    return Lines(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _log1p_ratio(v: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(v == 0, 1, np.log1p(v) / np.where(v == 0, 1, v))


def _log1p_ratio_second(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the second derivative of log(1 + v) / v."""
    w = np.maximum(v, 1e-3)  # by then it is 2/3 to within its use here
    return (2 * np.log1p(w) - 2 * w / (1 + w) - (w / (1 + w))**2) / w**3


EXP2 = _table(256, lambda v: 2.0**-v, lambda v: np.log(2)**2 * 2.0**-v)
"""2**-v."""
RECIPROCAL = _table(512, lambda v: 1 / (1 + v), lambda v: 2 / (1 + v)**3)
"""1 / (1 + v)."""
LOG1P = _table(512, _log1p_ratio, _log1p_ratio_second)
"""log(1 + v) / v."""
SQRT = _sqrt_table(512)
"""sqrt(m), in units of 2**-23."""


def fixed(values: NDArray[np.floating], fraction_bits: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Return values as multiples of ``2**-fraction_bits`` of 32 bits, half to even on the
    magnitude, and which of them are beyond and become the largest there is.

    What is not finite becomes the least, and is not beyond.
    """
    finite = np.isfinite(values)
    scaled = np.rint(np.ldexp(np.where(finite, values, 0).astype(np.float64), fraction_bits))
    held = np.clip(scaled, WORD_MIN, WORD_MAX).astype(np.int64)
    return np.where(finite, held, WORD_MIN), np.asarray(finite & (scaled != held))


@dataclass(frozen=True)
class Exponential:
    """exp(-d) as ``mantissa * 2**-(24 + shift)``; the mantissa is 0 from `EXPONENTIAL_LIMIT` on."""

    mantissa: Ints
    shift: Ints

    @property
    def score(self) -> Ints:
        """In units of scores, cut off."""
        return (self.mantissa << (SCORE_BITS - VALUE_BITS)) >> self.shift

    @property
    def position(self) -> Ints:
        """As an argument of the tables with 512 segments, cut off."""
        return self.mantissa >> self.shift


def exponential(distance: Ints) -> Exponential:
    """Return exp(-d), d in units of logits, 0 or more."""
    near = distance < EXPONENTIAL_LIMIT
    power = (np.where(near, distance, 0) * LOG2E) >> (LOGIT_BITS + LOG2E_BITS - 23)
    return Exponential(np.where(near, EXP2(power & ((1 << 23) - 1)), 0), power >> 23)


def leading(value: Ints, bits: int) -> tuple[Ints, Ints]:
    """Return the first ``bits`` significant bits of values of 0 or more, cut off, and the position
    of the first: ``value = mantissa * 2**(position - bits + 1)``. Of 0: 0 and -1."""
    position = bit_length(value) - 1
    shift = position - bits + 1
    return (value << np.maximum(-shift, 0)) >> np.maximum(shift, 0), position


def quotient(dividend: Exponential, divisor: Ints) -> Ints:
    """Return ``exp / sum`` as a score; the divisor is in units of scores, at least 2**35."""
    mantissa, position = leading(divisor, VALUE_BITS + 1)
    product = dividend.mantissa * RECIPROCAL(mantissa & ((1 << VALUE_BITS) - 1))
    return product >> (dividend.shift + position + 2 * VALUE_BITS - 2 * SCORE_BITS)


def sigmoid(logit: Ints) -> Ints:
    """Return the score ``1 / (1 + exp(-s))``: ``r`` for s of 0 or more, else ``exp(s) r``, with ``r
    = 1 / (1 + exp(-|s|))``."""
    power = exponential(np.abs(logit))
    r = RECIPROCAL(power.position)
    below = (power.mantissa * r) >> (power.shift + 2 * VALUE_BITS - SCORE_BITS)
    return np.where(logit < 0, below, r << (SCORE_BITS - VALUE_BITS))


def sqrt_softplus(logit: Ints) -> Ints:
    """Return the score ``sqrt(log(1 + exp(s)))``: with v = exp(-|s|), the square root of ``v *
    log(1 + v) / v``, to which s is added where it is positive."""
    power = exponential(np.abs(logit))
    product = power.mantissa * LOG1P(power.position)
    inside = (logit << (SCORE_BITS - LOGIT_BITS)) + (
        product >> (power.shift + 2 * VALUE_BITS - SCORE_BITS))
    mantissa, position = leading(np.where(logit < 0, product, inside), VALUE_BITS)
    exponent = position - np.where(logit < 0, 2 * VALUE_BITS + power.shift, SCORE_BITS)
    fraction = mantissa & ((1 << (VALUE_BITS - 1)) - 1)
    root = SQRT((exponent & 1) << (VALUE_BITS - 1) | fraction)
    shift = SCORE_BITS - VALUE_BITS + 1 + (exponent >> 1)
    return np.where(mantissa == 0, 0, (root << np.maximum(shift, 0)) >> np.maximum(-shift, 0))


def part(value: float) -> int:
    """Return a share, 0 to 1, as routers compare with it."""
    return round(value * 2**PART_BITS)


def significand(value: float) -> tuple[int, int]:
    """Return (significand of 24 bits, exponent) of a positive number, rounded as float32 is."""
    fraction, exponent = np.frexp(np.float32(value))
    return int(np.ldexp(fraction, VALUE_BITS)), int(exponent) - VALUE_BITS


def to_float32(product: Ints, exponent: Ints) -> NDArray[np.float32]:
    """Return ``product * 2**exponent`` rounded to 24 bits, half to even; subnormal ones are 0."""
    shift = np.maximum(bit_length(product) - VALUE_BITS, 0)
    rounded = np.ldexp(round_shift(product, shift).astype(np.float64),
                       (shift + exponent).astype(np.int32))
    return np.where(np.abs(rounded) < 2.0**-126, 0, rounded).astype(np.float32)
