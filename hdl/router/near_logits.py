"""Logits that are near the largest."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.pipeline import Pipeline
from moeaccel.router.tables import LOGIT_BITS, WORD_BITS

__all__ = ["NearLogits"]


class NearLogits(wiring.Component):
    """Say which logits share in a sparsemixer's sum.

    Golden model: `_mixed` of :mod:`moeaccel.golden.router`: the distance from the largest, as a
    part of the larger magnitude, is within a limit.

    Latency as asked for, one a cycle, no flow control, no valid bit.

    Parameters
    ----------
    latency_cycles : :class:`int`
        LEAST_CYCLES or more.

    Members
    -------
    i_limit : :py:`In(21)`
        In units of 2**-20.
    i_largest, i_logit : :py:`In(signed(32))`
        Largest and limit hold until the last logit is through.
    o_near : :py:`Out(1)`
        Undefined of a logit above the largest.
    """

    LEAST_CYCLES = 6

    def __init__(self, latency_cycles=LEAST_CYCLES):
        if not isinstance(latency_cycles, int) or latency_cycles < self.LEAST_CYCLES:
            raise ValueError(f"latency_cycles must be {self.LEAST_CYCLES} or more, not "
                             f"{latency_cycles!r}")
        self._latency_cycles = latency_cycles
        super().__init__({
            "i_limit": In(LOGIT_BITS + 1), "i_largest": In(signed(WORD_BITS)),
            "i_logit": In(signed(WORD_BITS)), "o_near": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        half, part = WORD_BITS // 2, LOGIT_BITS // 2
        limit = [self.i_limit[:part], self.i_limit[part:]]
        pipe = Pipeline(m, C(1))
        s = pipe.stage(
            distance=(self.i_largest - self.i_logit)[:WORD_BITS],
            size=Mux(self.i_logit[-1], -self.i_logit, self.i_logit)[:WORD_BITS])
        larger = Mux(self.i_largest > s.size, self.i_largest[:WORD_BITS], s.size)
        s = pipe.stage(distance=s.distance, larger=larger)
        # By four multipliers, each as small as a DSP slice.
        s = pipe.stage(distance=s.distance,
                       products=[s.larger[start:start + half] * factor
                                 for start in (0, half) for factor in limit])
        low, high = (s.products[i] + (s.products[i + 1] << part) for i in (0, 2))
        s = pipe.stage(distance=s.distance, low=low, high=high)
        s = pipe.stage(distance=s.distance, product=s.low + (s.high << half))
        s = pipe.stage(near=(s.distance << LOGIT_BITS) <= s.product)
        assert pipe.depth == self.LEAST_CYCLES
        s = pipe.delay(self._latency_cycles - pipe.depth, near=s.near)
        m.d.comb += self.o_near.eq(s.near)
        return m
