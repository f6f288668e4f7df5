"""Adds two internal floats."""

from amaranth import *
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from moeaccel.arithmetic import MANTISSA_BITS
from moeaccel.hdl.array.normaliser import Normaliser, shift_right
from moeaccel.hdl.layouts import EXPONENT_BITS
from moeaccel.hdl.pipeline import Pipeline

__all__ = ["FloatAdder", "float_parts"]

GUARD_BITS = 3
"""Bits below the larger number's mantissa. Where numbers are two or more powers apart, their sum is
at most one bit shorter than the larger: two bits to round by, and one for all that lies below."""

FINE_BITS = 3
"""Bits of the distance that one shift takes care of, the lower ones; another the rest."""

FAR = 31
"""A distance from which on a number is only known to be there."""


def float_parts():
    """Return an internal float, its sign apart: magnitude 0 or 17 bits, exponent."""
    return data.StructLayout({
        "sign": 1, "magnitude": MANTISSA_BITS, "exponent": signed(EXPONENT_BITS)})


class FloatAdder(wiring.Component):
    """Add two internal floats and round once: ``add`` of :mod:`moeaccel.arithmetic`, bit for bit.

    ::

        a, b --> which is larger? --> shift the smaller --> add --> magnitude --> [Normaliser] --> o

    Latency LATENCY_CYCLES; one sum per cycle, no flow control. Reset forgets what is under way.

    Parameters
    ----------
    tag : shape
        Of what travels along.

    Members
    -------
    i_valid : :py:`In(1)`
    i_a, i_b : :py:`In(float_parts())`
    i_tag : :py:`In(tag)`
    o_valid : :py:`Out(1)`
    o_sum : :py:`Out(float_parts())`
        Sign 0 when it is zero.
    o_tag : :py:`Out(tag)`
    """

    LATENCY_CYCLES = 12

    def __init__(self, tag=1):
        self._tag = tag
        super().__init__({
            "i_valid": In(1),
            "i_a": In(float_parts()),
            "i_b": In(float_parts()),
            "i_tag": In(tag),
            "o_valid": Out(1),
            "o_sum": Out(float_parts()),
            "o_tag": Out(tag),
        })

    def elaborate(self, platform):
        m = Module()
        a, b = self.i_a, self.i_b

        # -- 1, 2: the one with the larger exponent; zero is smaller than all ---------------------
        p = Pipeline(m, self.i_valid)
        s = p.stage(a=a, b=b, tag=self.i_tag, ahead=a.exponent - b.exponent,
                    behind=b.exponent - a.exponent, a_zero=a.magnitude == 0,
                    b_zero=b.magnitude == 0)
        swap = Signal()
        distance = Signal(EXPONENT_BITS)
        m.d.comb += [
            swap.eq(~s.b_zero & (s.a_zero | s.ahead[-1])),
            distance.eq(Mux(swap, s.behind, s.ahead)),
        ]
        large, small = Mux(swap, s.b, s.a), Mux(swap, s.a, s.b)
        large, small = (data.View(float_parts(), value) for value in (large, small))
        s = p.stage(
            sign=large.sign, subtract=large.sign ^ small.sign, large=large.magnitude,
            small=small.magnitude << GUARD_BITS, exponent=large.exponent, tag=s.tag,
            by=Mux(distance[FAR.bit_length():].any(), FAR, distance[:FAR.bit_length()]))

        # -- 3, 4: the smaller one at the larger one's place; what is shifted out is one bit -------
        coarse, lost = shift_right(m, s.small, s.by[FINE_BITS:], unit=1 << FINE_BITS)
        s = p.stage(sign=s.sign, subtract=s.subtract, large=s.large, small=coarse, lost=lost,
                    by=s.by[:FINE_BITS], exponent=s.exponent, tag=s.tag)
        fine, lost = shift_right(m, s.small, s.by)
        s = p.stage(sign=s.sign, subtract=s.subtract, large=s.large,
                    small=Cat(fine[0] | lost | s.lost, fine[1:]), exponent=s.exponent, tag=s.tag)

        # -- 5, 6: the sum and both differences, then the one that is it ---------------------------
        width = MANTISSA_BITS + GUARD_BITS + 1
        large = Cat(C(0, GUARD_BITS), s.large)
        s = p.stage(sign=s.sign, subtract=s.subtract, plus=(large + s.small)[:width],
                    less=large - s.small, more=s.small - large, exponent=s.exponent, tag=s.tag)
        negative = s.subtract & s.less[-1]
        magnitude = Signal(width)
        m.d.comb += magnitude.eq(Mux(
            s.subtract, Mux(s.less[-1], s.more, s.less)[:width - 1], s.plus))
        s = p.stage(sign=s.sign ^ negative, magnitude=magnitude, exponent=s.exponent - GUARD_BITS,
                    tag=s.tag)
        m.submodules.normaliser = normaliser = Normaliser(
            width, exponent_bits=EXPONENT_BITS + 1, tag=self._tag)
        m.d.comb += [
            normaliser.i_valid.eq(p.valid),
            normaliser.i_sign.eq(s.sign),
            normaliser.i_magnitude.eq(s.magnitude),
            normaliser.i_exponent.eq(s.exponent),
            normaliser.i_tag.eq(s.tag),
            self.o_valid.eq(normaliser.o_valid),
            self.o_sum.sign.eq(normaliser.o_sign),
            self.o_sum.magnitude.eq(normaliser.o_magnitude),
            self.o_sum.exponent.eq(normaliser.o_exponent),
            self.o_tag.eq(normaliser.o_tag),
        ]
        assert p.depth + normaliser.latency_cycles == self.LATENCY_CYCLES
        return m
