"""Products of table values."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.array.multiplier import Multiplier
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.router.tables import VALUE_BITS

__all__ = ["Product"]


class Product(wiring.Component):
    """Multiply two unsigned numbers of 24 bits, by four multipliers of half as many.

    Golden model: products of :mod:`moeaccel.router.tables`. Latency LATENCY_CYCLES, one a
    cycle, no flow control, no valid bit.

    Parameters
    ----------
    family : :class:`str`
        FPGA family: see :class:`~moeaccel.hdl.array.multiplier.Multiplier`.

    Members
    -------
    i_a, i_b : :py:`In(24)`
    o_product : :py:`Out(48)`
    """

    LATENCY_CYCLES = Multiplier.LATENCY_CYCLES + 2

    def __init__(self, family="generic"):
        self._family = family
        super().__init__({"i_a": In(VALUE_BITS), "i_b": In(VALUE_BITS),
                          "o_product": Out(2 * VALUE_BITS)})

    def elaborate(self, platform):
        m = Module()
        half = VALUE_BITS // 2
        a, b = ([value[:half], value[half:]] for value in (self.i_a, self.i_b))

        def multiplied(i, j):
            m.submodules[f"part{i}{j}"] = part = Multiplier(half + 1, half + 1, family=self._family)
            m.d.comb += [part.i_a.eq(a[i]), part.i_b.eq(b[j])]
            return part.o_product[:2 * half]

        pipe = Pipeline(m, C(1))
        pipe.delay(Multiplier.LATENCY_CYCLES)
        s = pipe.stage(ends=Cat(multiplied(0, 0), multiplied(1, 1)),
                       middle=multiplied(0, 1) + multiplied(1, 0))
        s = pipe.stage(total=(s.ends + (s.middle << half))[:2 * VALUE_BITS])
        assert pipe.depth == self.LATENCY_CYCLES
        m.d.comb += self.o_product.eq(s.total)
        return m
