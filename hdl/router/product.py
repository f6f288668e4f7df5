"""Products of table values."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.pipeline import Pipeline
from moeaccel.router.tables import VALUE_BITS

__all__ = ["Product"]


class Product(wiring.Component):
    """Multiply two unsigned numbers of 24 bits, by four multipliers of half as many.

    Golden model: products of :mod:`moeaccel.router.tables`. Latency LATENCY_CYCLES, one a
    cycle, no flow control, no valid bit.

    Members
    -------
    i_a, i_b : :py:`In(24)`
    o_product : :py:`Out(48)`
    """

    LATENCY_CYCLES = 3

    def __init__(self):
        super().__init__({"i_a": In(VALUE_BITS), "i_b": In(VALUE_BITS),
                          "o_product": Out(2 * VALUE_BITS)})

    def elaborate(self, platform):
        m = Module()
        half = VALUE_BITS // 2
        pipe = Pipeline(m, C(1))
        a, b = ([value[:half], value[half:]] for value in (self.i_a, self.i_b))
        s = pipe.stage(low=a[0] * b[0], middle0=a[0] * b[1], middle1=a[1] * b[0], high=a[1] * b[1])
        s = pipe.stage(ends=Cat(s.low, s.high), middle=s.middle0 + s.middle1)
        s = pipe.stage(total=(s.ends + (s.middle << half))[:2 * VALUE_BITS])
        assert pipe.depth == self.LATENCY_CYCLES
        m.d.comb += self.o_product.eq(s.total)
        return m
