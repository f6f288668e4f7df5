"""Activation tables shared by the golden model and the RTL.

An activation is ``act(g) = g * f(g)`` (:mod:`moeaccel.activations`). ``f`` is tabulated on [-16,
16) in 2048 segments of 1/64 with linear interpolation; below it is 0, above it is 1. A segment's
line is the chord, moved halfway to the curve, so that its error is the same in both directions. An
entry holds the line's left end as a normalised 17-bit mantissa with its own exponent, so that the
error is *relative* also where ``f`` is tiny, and the difference to the right end in the same units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from moeaccel.activations import Activation, Factor
from moeaccel.arithmetic import (
    InternalFloat,
    Ints,
    add,
    multiply,
    multiply_to_element,
    normalise,
)

SEGMENTS = 2048
SEGMENT_BITS = 6
"""A segment is ``2**-6`` wide."""
FRACTION_BITS = 12
"""Bits of the position inside a segment; the argument is truncated to ``2**-18``."""
VALUE_BITS = 17
SLOPE_BITS = 14
EXPONENT_BITS = 5
LIMIT_EXPONENT = 4
"""The table covers ``[-2**4, 2**4)``."""

MAX_RELATIVE_ERROR = 2.0**-15
"""Stated bound on the relative error of ``f`` over [-16, 16) (tested at every argument)."""


ONE = InternalFloat(np.array(1 << (VALUE_BITS - 1)), np.array(-(VALUE_BITS - 1)))
"""1 as an internal float."""


@dataclass(frozen=True)
class ActivationTable:
    """One table: ``f(left) = value * 2**-(16 + exponent)``; ``slope`` is the step to the right end
    in the same units."""

    value: Ints
    slope: Ints
    exponent: Ints

    def packed(self) -> list[int]:
        """Return the ROM's words: value (17 bits), slope (14), exponent (5), least significant
        first."""
        return [
            int(v) | int(s) << VALUE_BITS | int(x) << (VALUE_BITS + SLOPE_BITS)
            for v, s, x in zip(self.value, self.slope, self.exponent, strict=True)
        ]


@cache
def activation_table(act: Activation) -> ActivationTable:
    """Return the table of an activation's f."""
    left = (np.arange(SEGMENTS) - SEGMENTS // 2) / 2.0**SEGMENT_BITS
    value, middle, right = (
        act.f(left + part * 2.0**-SEGMENT_BITS) for part in (0, 0.5, 1))
    sag = (middle - (value + right) / 2) / 2
    value, right = value + sag, right + sag
    exponent = -(np.frexp(value)[1]).astype(np.int64) + 1
    scale = np.ldexp(1.0, (VALUE_BITS - 1 + exponent).astype(np.int32))
    mantissa = np.rint(value * scale).astype(np.int64)
    carry = mantissa >> VALUE_BITS
    mantissa, exponent, scale = mantissa >> carry, exponent - carry, scale / 2.0**carry
    slope = np.rint(right * scale).astype(np.int64) - mantissa
    # Up to the last segment that an entry cannot hold f is 0: it is less than 2**-24 there.
    fits = (exponent < 1 << EXPONENT_BITS) & (slope < 1 << SLOPE_BITS)
    there = np.logical_and.accumulate(fits[::-1])[::-1]
    return ActivationTable(*(np.where(there, part, 0) for part in (mantissa, slope, exponent)))


def gate(g: InternalFloat, table: ActivationTable) -> InternalFloat:
    """Return ``f(g)`` by the table."""
    shift = g.exponent + SEGMENT_BITS + FRACTION_BITS
    limit = 1 << (LIMIT_EXPONENT + SEGMENT_BITS + FRACTION_BITS)
    position = np.where(
        shift >= 0, g.mantissa << np.clip(shift, 0, 8), g.mantissa >> np.clip(-shift, 0, 62)
    )
    above = (g.mantissa > 0) & ((shift > 8) | (position >= limit))
    below = (g.mantissa < 0) & ((shift > 8) | (position < -limit))
    position = np.where(above | below, 0, position)
    index = (position >> FRACTION_BITS) + SEGMENTS // 2
    fraction = position & ((1 << FRACTION_BITS) - 1)
    value = (table.value[index] << FRACTION_BITS) + table.slope[index] * fraction
    f = normalise(value, -(VALUE_BITS - 1) - FRACTION_BITS - table.exponent[index])
    one = 1 << (VALUE_BITS - 1)
    return InternalFloat(
        np.where(above, one, np.where(below, 0, f.mantissa)),
        np.where(above, -(VALUE_BITS - 1), np.where(below, 0, f.exponent)),
    )


def factor(g: InternalFloat, act: Activation) -> InternalFloat:
    """Return ``f(g)`` as the device has it."""
    match act.factor:
        case Factor.TABLE:
            return gate(g, activation_table(act))
        case Factor.STEP:
            above = ONE
        case Factor.RAMP:
            above = g
    positive = g.mantissa > 0
    return InternalFloat(
        np.where(positive, above.mantissa, 0), np.where(positive, above.exponent, 0))


def clamped(values: InternalFloat, limit: InternalFloat, *, below: bool) -> InternalFloat:
    """Return ``min(values, limit)``, and with ``below`` no less than ``-limit``."""
    # Mantissas other than 0 have all their bits, so that exponents decide first.
    magnitude = np.abs(values.mantissa)
    beyond = (magnitude != 0) & ((values.exponent > limit.exponent) | (
        (values.exponent == limit.exponent) & (magnitude > limit.mantissa)))
    beyond &= (values.mantissa > 0) | below
    return InternalFloat(
        np.where(beyond, np.sign(values.mantissa) * limit.mantissa, values.mantissa),
        np.where(beyond, limit.exponent, values.exponent))


def gated(g: InternalFloat, u: InternalFloat, act: Activation,
          limit: InternalFloat | None = None, gate_limit: InternalFloat | None = None,
          second: InternalFloat | None = None) -> tuple[Ints, Ints]:
    """Return ``h = act(g) * u`` (Shazeer, 2020): f, then two products, each rounded once. Of an
    activation with an offset u + 1, rounded once, is in the place of u.

    h is quantised next, so it keeps the quantiser's 24 bits: (significand, exponent). With a
    ``limit`` g is at most that much (or ``gate_limit``), and u at most that far from 0. With
    ``second`` up rows, v, u * v, rounded once, is in the place of u, and v is limited, too.
    """
    if gate_limit is not None:
        g = clamped(g, gate_limit, below=False)
    elif limit is not None:
        g = clamped(g, limit, below=False)
    if limit is not None:
        u = clamped(u, limit, below=True)
    if second is not None:
        u = multiply(u, second if limit is None else clamped(second, limit, below=True))
    elif act.up_offset:
        u = add(u, InternalFloat(*(np.broadcast_to(part, u.mantissa.shape)
                                   for part in (ONE.mantissa, ONE.exponent))))
    return multiply_to_element(multiply(g, factor(g, act)), u)


def ungated(g: InternalFloat, act: Activation,
            limit: InternalFloat | None = None) -> tuple[Ints, Ints]:
    """Return ``h = act(g)`` of an expert without up rows, as :func:`gated` with u = 1."""
    if limit is not None:
        g = clamped(g, limit, below=False)
    return multiply_to_element(multiply(g, factor(g, act)), ONE)
