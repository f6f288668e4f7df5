"""Logits of float32 become integers."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl import layouts
from moeaccel.hdl.array.normaliser import shift_right
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.router.tables import LOGIT_BITS, WORD_BITS, WORD_MAX, WORD_MIN

__all__ = ["ToFixed"]


_TOP = 127 + WORD_BITS - 1 - LOGIT_BITS
"""Exponent field from which on a logit has no place."""


class ToFixed(wiring.Component):
    """Round float32 to multiples of 2**-20: bit for bit :func:`moeaccel.router.tables.fixed`.

    Latency LATENCY_CYCLES, one a cycle, no flow control. Reset forgets everything under way.

    Members
    -------
    i_valid, i_float : :py:`In(1)`, :py:`In(32)`
    o_valid, o_logit : :py:`Out(1)`, :py:`Out(layouts.fixed_logit())`
    o_nonfinite : :py:`Out(1)`
        It is NaN or infinite, and has become the least there is.
    """

    LATENCY_CYCLES = 5

    def __init__(self):
        super().__init__({"i_valid": In(1), "i_float": In(32), "o_valid": Out(1),
                          "o_logit": Out(layouts.fixed_logit()), "o_nonfinite": Out(1)})

    def elaborate(self, platform):
        m = Module()
        pipe = Pipeline(m, self.i_valid)
        # It comes out of a memory, which is slow to answer.
        s = pipe.stage(float=self.i_float)
        fraction, field, sign = s.float[:23], s.float[23:31], s.float[31]
        distance = Signal(9)
        m.d.comb += distance.eq(_TOP - 1 - field)
        far = field >= _TOP
        s = pipe.stage(
            # One bit above a half, and what is below.
            value=Cat(C(0, 2 + WORD_BITS - 1 - 24), fraction, field != 0),
            shift=Mux(distance[6:].any(), 63, distance[:6]), far=far, sign=sign,
            least=(field == _TOP) & (fraction == 0) & sign, nonfinite=field == 255)
        coarse, lost = shift_right(m, s.value, s.shift[3:], unit=8)
        s = pipe.stage(value=coarse, lost=lost, shift=s.shift[:3], far=s.far, sign=s.sign,
                       least=s.least, nonfinite=s.nonfinite)
        fine, lost = shift_right(m, s.value, s.shift)
        keep, half, sticky = fine[2:], fine[1], fine[0] | lost | s.lost
        s = pipe.stage(value=keep[:WORD_BITS - 1], up=half & (sticky | keep[0]), far=s.far,
                       sign=s.sign, least=s.least, nonfinite=s.nonfinite)
        # Rounded and with its sign by one addition: -(v + up) is ~v + ~up.
        near = (s.value ^ s.sign.replicate(WORD_BITS)) + (s.up ^ s.sign)
        beyond = Mux(s.sign | s.nonfinite, WORD_MIN, WORD_MAX)
        out = pipe.stage(value=Mux(s.far, beyond, near)[:WORD_BITS].as_signed(),
                         beyond=s.far & ~s.least & ~s.nonfinite, nonfinite=s.nonfinite)
        assert pipe.depth == self.LATENCY_CYCLES
        m.d.comb += [
            self.o_valid.eq(pipe.valid), self.o_logit.value.eq(out.value),
            self.o_logit.beyond.eq(out.beyond), self.o_nonfinite.eq(out.nonfinite)]
        return m
