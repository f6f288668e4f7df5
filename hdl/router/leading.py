"""The first significant bits of a number."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.array.normaliser import shift_out_zeros
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.router.tables import VALUE_BITS

__all__ = ["Leading"]

WIDTH = 48
"""Bits of sums of scores, and more than those of a score."""


class Leading(wiring.Component):
    """Find the first significant bits: bit for bit :func:`moeaccel.router.tables.leading`.

    Latency LATENCY_CYCLES, one a cycle, no flow control, no valid bit.

    Members
    -------
    i_value : :py:`In(48)`
    o_mantissa : :py:`Out(25)`
        The first is 1, unless the number is 0.
    o_position : :py:`Out(6)`
        Of the first; undefined of 0.
    """

    LATENCY_CYCLES = 6

    def __init__(self):
        super().__init__({"i_value": In(WIDTH), "o_mantissa": Out(VALUE_BITS + 1),
                          "o_position": Out(range(WIDTH))})

    def elaborate(self, platform):
        m = Module()
        pipe = Pipeline(m, C(1))
        s = pipe.stage(value=self.i_value, empty=self.i_value[-32:] == 0)
        value = Mux(s.empty, s.value << 32, s.value)[:WIDTH]
        s = pipe.stage(value=value, zeros=s.empty)
        s = pipe.stage(value=s.value, zeros=s.zeros, empty=s.value[-16:] == 0)
        value = Mux(s.empty, s.value << 16, s.value)[:WIDTH]
        s = pipe.stage(value=value, zeros=Cat(s.empty, s.zeros))
        for shifts in ((8, 4), (2, 1)):
            value, taken = shift_out_zeros(s.value, shifts)
            s = pipe.stage(value=value, zeros=Cat(*reversed(taken), s.zeros))
        assert pipe.depth == self.LATENCY_CYCLES
        m.d.comb += [self.o_mantissa.eq(s.value[-VALUE_BITS - 1:]),
                     self.o_position.eq(WIDTH - 1 - s.zeros)]
        return m
