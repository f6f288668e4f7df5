"""Rounds an integer to a mantissa of fixed length and an exponent."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.arithmetic import MANTISSA_BITS
from moeaccel.hdl.pipeline import Pipeline

__all__ = ["Normaliser", "any_of", "shift_out_zeros", "shift_right"]

WIDE_STEP = 16
"""Longest shift whose test for zero and multiplexer are one stage."""


def shift_out_zeros(value, steps):
    """Shift ``value`` left by each of ``steps`` for which there are that many leading zeros.

    That two steps are due is known from ``value`` alone, so that one multiplexer does both.

    Parameters
    ----------
    value : value
        Unsigned.
    steps : tuple of :class:`int`
        One, or two of which the second is half of the first.

    Returns
    -------
    shifted : value
        As wide as ``value``.
    taken : list of value
        For each step, largest first, whether it was taken.
    """
    width = len(value)
    step = steps[-1]

    def empty(part):
        """Return whether the part is zero; they count from the top, ``step`` bits each."""
        return value[max(0, width - step * (part + 1)):max(0, width - step * part)] == 0

    if len(steps) == 1:
        taken = [empty(0)]
    else:
        both = empty(0) & empty(1)
        taken = [both, Mux(both, empty(2), empty(0))]
    for distance, shift in zip(steps, taken, strict=True):
        value = Mux(shift, value << distance, value)[:width]
    return value, taken


def any_of(value, unit):
    """Return for each ``unit`` bits of ``value``, from the low end on, whether there is a 1."""
    return Cat(value[i:i + unit].any() for i in range(0, len(value), unit))


def shift_right(m, value, by, *, unit=1, parts=None):
    """Shift ``value`` right by ``by * unit``.

    Parameters
    ----------
    m : :class:`Module`
    value : value
    by : value
        Unsigned, a few bits.
    unit : :class:`int`
    parts : value, optional
        Whether there is a 1 in each ``unit`` bits of ``value``, if that is known (:func:`any_of`).

    Returns
    -------
    shifted : :class:`Signal`
        Of the shape of ``value``.
    lost : :class:`Signal`
        A 1 was shifted out.
    """
    shifted, lost = Signal(value.shape(), name="shifted"), Signal(name="lost")
    if parts is None:
        parts = any_of(value, unit)
    with m.Switch(by):
        for n in range(1 << len(by)):
            with m.Case(n):
                m.d.comb += [shifted.eq(value >> n * unit), lost.eq(parts[:n].any() if n else 0)]
    return shifted, lost


class Normaliser(wiring.Component):
    """Round ``magnitude * 2**exponent`` to ``mantissa_bits`` significant bits, half to even.

    Bit for bit ``normalise`` of :mod:`moeaccel.arithmetic`: the mantissa's highest bit is 1, or
    the number is zero with exponent 0. The sign travels beside it, and so does a tag.

        i_* --> shift left until the top bit is 1, largest steps first --> round up? --> add --> o_*

    Latency ``latency_cycles``; one number per cycle, no flow control. Reset forgets what is under
    way.

    Parameters
    ----------
    width : :class:`int`
        Bits of the magnitude.
    mantissa_bits : :class:`int`
        Bits of the result.
    exponent_bits : :class:`int`
        Bits of both signed exponents; the result must fit.
    max_leading_zeros : :class:`int`
        Most leading zeros of a magnitude other than zero, if that is known; fewer cost less.
    tag : shape
        Of what travels along.

    Members
    -------
    i_valid : :py:`In(1)`
    i_sign : :py:`In(1)`
    i_magnitude : :py:`In(width)`
    i_exponent : :py:`In(signed(exponent_bits))`
    i_tag : :py:`In(tag)`
    o_valid : :py:`Out(1)`
    o_sign : :py:`Out(1)`
        0 when the number is zero.
    o_magnitude : :py:`Out(mantissa_bits)`
    o_exponent : :py:`Out(signed(exponent_bits))`
    o_tag : :py:`Out(tag)`
    """

    def __init__(self, width, *, exponent_bits, mantissa_bits=MANTISSA_BITS,
                 max_leading_zeros=None, tag=1):
        if not isinstance(width, int) or width < 2:
            raise ValueError(f"width must be an integer of at least 2, not {width!r}")
        if not isinstance(mantissa_bits, int) or not 2 <= mantissa_bits < width:
            raise ValueError(
                f"mantissa_bits must be an integer from 2 to width - 1, not {mantissa_bits!r}")
        if max_leading_zeros is None:
            max_leading_zeros = width - 1
        if not isinstance(max_leading_zeros, int) or not 1 <= max_leading_zeros < width:
            raise ValueError("max_leading_zeros must be an integer from 1 to width - 1, "
                             f"not {max_leading_zeros!r}")
        self._width = width
        self._mantissa_bits = mantissa_bits
        self._max_leading_zeros = max_leading_zeros
        super().__init__({
            "i_valid": In(1),
            "i_sign": In(1),
            "i_magnitude": In(width),
            "i_exponent": In(signed(exponent_bits)),
            "i_tag": In(tag),
            "o_valid": Out(1),
            "o_sign": Out(1),
            "o_magnitude": Out(mantissa_bits),
            "o_exponent": Out(signed(exponent_bits)),
            "o_tag": Out(tag),
        })

    @property
    def width(self):
        """Bits of the magnitude."""
        return self._width

    @property
    def mantissa_bits(self):
        """Bits of the result."""
        return self._mantissa_bits

    @property
    def max_leading_zeros(self):
        """Most leading zeros of a magnitude other than zero."""
        return self._max_leading_zeros

    @property
    def _shift_stages(self):
        """Shift distances, one tuple for each multiplexer."""
        bits = range(self._max_leading_zeros.bit_length() - 1, -1, -1)
        stages = [(1 << bit,) for bit in bits if bit > 1]
        return [*stages, tuple(1 << bit for bit in bits if bit <= 1)]

    @property
    def latency_cycles(self):
        """Cycles from input to output."""
        wide = sum(steps[0] > WIDE_STEP for steps in self._shift_stages)
        return wide + len(self._shift_stages) + 2

    def elaborate(self, platform):
        m = Module()
        width, mantissa_bits = self._width, self._mantissa_bits
        p = Pipeline(m, self.i_valid)
        magnitude, exponent = self.i_magnitude, self.i_exponent
        sign, tag = self.i_sign, self.i_tag
        zeros = Const(0, 0)  # leading zeros, the bits found so far
        for steps in self._shift_stages:
            if steps[0] > WIDE_STEP:
                (step,) = steps
                s = p.stage(magnitude=magnitude, exponent=exponent, sign=sign, tag=tag, zeros=zeros,
                            empty=magnitude[-step:] == 0)
                exponent, sign, tag, zeros = s.exponent, s.sign, s.tag, s.zeros
                magnitude, taken = Mux(s.empty, s.magnitude << step, s.magnitude)[:width], [s.empty]
            else:
                magnitude, taken = shift_out_zeros(magnitude, steps)
            zeros = Cat(*reversed(taken), zeros)
            s = p.stage(magnitude=magnitude, exponent=exponent, sign=sign, tag=tag, zeros=zeros)
            magnitude, exponent, sign, tag, zeros = (
                s.magnitude, s.exponent, s.sign, s.tag, s.zeros)

        fraction = width - mantissa_bits
        keep = magnitude[fraction:]
        half = magnitude[fraction - 1]
        up = Signal()
        scaled = Signal(exponent.shape())
        m.d.comb += [
            up.eq(half & (magnitude[:fraction - 1].any() | keep[0])),
            scaled.eq(exponent + fraction - zeros),
        ]
        # Not the sum's carry: that would join the carry chains of mantissa and exponent, which may
        # be far apart.
        s = p.stage(keep=keep, up=up, carry=magnitude[fraction - 1:].all(), exponent=scaled,
                    sign=sign, tag=tag)

        total = Signal(mantissa_bits - 1)
        zero = Signal()
        m.d.comb += [total.eq(s.keep[:-1] + s.up), zero.eq(~s.keep[-1])]
        out = p.stage(
            magnitude=Cat(total, s.keep[-1]), exponent=Mux(zero, 0, s.exponent + s.carry),
            sign=s.sign & ~zero, tag=s.tag)
        m.d.comb += [
            self.o_valid.eq(p.valid),
            self.o_sign.eq(out.sign),
            self.o_magnitude.eq(out.magnitude),
            self.o_exponent.eq(out.exponent),
            self.o_tag.eq(out.tag),
        ]
        return m
