"""Sums on the grid become float32, or bfloat16."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.array.normaliser import shift_out_zeros
from moeaccel.hdl.combine.row_sums import SUM_BITS
from moeaccel.hdl.pipeline import Pipeline

__all__ = ["ToFloat32"]


class ToFloat32(wiring.Component):
    """Convert a 48-bit sum on the grid: bit for bit ``arithmetic.grid_to_float32``.

    Latency LATENCY_CYCLES, one per cycle, no flow control. Reset forgets everything under way.

    Members
    -------
    i_valid, o_valid : :py:`In(1)`, :py:`Out(1)`
    i_sum : :py:`In(signed(48))`
    i_grid_exponent : :py:`In(signed(8))`
        Of the command: it holds until the last sum has come out.
    i_narrow : :py:`In(1)`
        Of the command, too: round to 8 significant bits instead of 24.
    o_float : :py:`Out(32)`
        Its upper half is the bfloat16.
    """

    LATENCY_CYCLES = 10

    def __init__(self):
        super().__init__({"i_valid": In(1), "i_sum": In(signed(SUM_BITS)),
                          "i_grid_exponent": In(signed(8)), "i_narrow": In(1),
                          "o_valid": Out(1), "o_float": Out(32)})

    def elaborate(self, platform):
        m = Module()
        pipe = Pipeline(m, self.i_valid)
        # Block RAM is slow to answer: a register behind it, ahead of everything else.
        s = pipe.stage(sum=self.i_sum)
        s = pipe.stage(sign=s.sum[-1], magnitude=Mux(s.sum[-1], -s.sum, s.sum)[:SUM_BITS])
        # Whether to shift far is known a stage before it is done.
        s = pipe.stage(sign=s.sign, magnitude=s.magnitude, empty=s.magnitude[-32:] == 0)
        value = Mux(s.empty, s.magnitude << 32, s.magnitude)[:SUM_BITS]
        s = pipe.stage(sign=s.sign, magnitude=value, lost=s.empty, empty=value[-16:] == 0)
        value = Mux(s.empty, s.magnitude << 16, s.magnitude)[:SUM_BITS]
        s = pipe.stage(sign=s.sign, magnitude=value, lost=Cat(s.empty, s.lost))
        for shifts in ((8, 4), (2, 1)):
            value, taken = shift_out_zeros(s.magnitude, shifts)
            s = pipe.stage(sign=s.sign, magnitude=value, lost=Cat(*reversed(taken), s.lost))
        value = s.magnitude  # bit 47 is set, unless it is zero
        low = value[:23].any()
        s = pipe.stage(
            sign=s.sign, lost=s.lost,
            keep=Mux(self.i_narrow, value[40:] << 16, value[24:])[:24],
            half=Mux(self.i_narrow, value[39], value[23]),
            sticky=Mux(self.i_narrow, value[23:39].any() | low, low))
        up = s.half & (s.sticky | Mux(self.i_narrow, s.keep[16], s.keep[0]))
        s = pipe.stage(
            sign=s.sign, zero=~s.keep[-1],
            rounded=(s.keep + Cat(up & ~self.i_narrow, C(0, 15), up & self.i_narrow))[:25],
            exponent=(self.i_grid_exponent + (127 + SUM_BITS - 1) - s.lost)[:9])
        carry = s.rounded[24]
        s = pipe.stage(value=Mux(s.zero, 0, Cat(
            Mux(carry, 0, s.rounded[:23]), (s.exponent + carry)[:8], s.sign)))
        assert pipe.depth == self.LATENCY_CYCLES
        m.d.comb += [self.o_valid.eq(pipe.valid), self.o_float.eq(s.value)]
        return m
