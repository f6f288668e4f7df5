"""Scores become weights."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.router.leading import WIDTH, Leading
from moeaccel.hdl.router.product import Product
from moeaccel.router.tables import VALUE_BITS

__all__ = ["POWER_BITS", "WeightUnit"]

POWER_BITS = 8
"""Bits of a factor's exponent, sign included."""

_BIAS = 127


class WeightUnit(wiring.Component):
    """Multiply scores by a factor: ``i_value * i_factor * 2**i_power`` as float32.

    Golden model: `_scaled` of :mod:`moeaccel.golden.router`: the first 24 bits of the score, and
    the product rounded half to even (:func:`moeaccel.router.tables.to_float32`). The product's own
    first 24 bits come out as well, of which a factor can be made.

    Latency LATENCY_CYCLES, one a cycle, no flow control. Factor and power hold until the last one
    has come out. Reset forgets everything under way.

    Parameters
    ----------
    family : :class:`str`
        FPGA family: see :class:`~moeaccel.hdl.array.multiplier.Multiplier`.

    Members
    -------
    i_valid, i_value : :py:`In(1)`, :py:`In(48)`
    i_factor, i_power : :py:`In(24)`, :py:`In(signed(8))`
        The factor is at least 2**23.
    o_valid, o_weight : :py:`Out(1)`, :py:`Out(32)`
    o_mantissa, o_shift : :py:`Out(24)`, :py:`Out(2)`
        The product of the two 24-bit numbers is ``mantissa * 2**(24 - shift)``, cut off.
    """

    LATENCY_CYCLES = Leading.LATENCY_CYCLES + Product.LATENCY_CYCLES + 4

    def __init__(self, family="generic"):
        self._family = family
        super().__init__({
            "i_valid": In(1),
            "i_value": In(WIDTH),
            "i_factor": In(VALUE_BITS),
            "i_power": In(signed(POWER_BITS)),
            "o_valid": Out(1),
            "o_weight": Out(32),
            "o_mantissa": Out(VALUE_BITS),
            "o_shift": Out(2),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.leading = leading = Leading()
        m.submodules.product = product = Product(self._family)
        pipe = Pipeline(m, self.i_valid)
        m.d.comb += [
            leading.i_value.eq(self.i_value),
            product.i_a.eq(leading.o_mantissa[1:]), product.i_b.eq(self.i_factor),
        ]
        pipe.delay(Leading.LATENCY_CYCLES)
        s = pipe.stage(position=leading.o_position)
        s = pipe.delay(Product.LATENCY_CYCLES - 1, position=s.position)
        # Of two numbers with 24 bits, or of a table's value that is a little less.
        p = product.o_product
        s = pipe.stage(product=p, shift=Mux(p[-1], 0, Mux(p[-2], 1, 2)), position=s.position)
        aligned = (s.product << s.shift)[:2 * VALUE_BITS]
        s = pipe.stage(
            keep=aligned[VALUE_BITS:], half=aligned[VALUE_BITS - 1],
            sticky=aligned[:VALUE_BITS - 1].any(), shift=s.shift,
            exponent=(_BIAS + VALUE_BITS + self.i_power + s.position - s.shift).as_signed())
        s = pipe.stage(
            rounded=(s.keep + (s.half & (s.sticky | s.keep[0])))[:VALUE_BITS + 1], keep=s.keep,
            exponent=s.exponent, shift=s.shift)
        carry = s.rounded[-1]
        exponent = Signal(signed(12))
        m.d.comb += exponent.eq(s.exponent + carry)
        zero = ~s.keep[-1] | (exponent <= 0)
        s = pipe.stage(
            weight=Mux(zero, 0, Cat(s.rounded[:VALUE_BITS - 1], exponent[:8])), keep=s.keep,
            shift=s.shift)
        assert pipe.depth == self.LATENCY_CYCLES
        m.d.comb += [self.o_valid.eq(pipe.valid), self.o_weight.eq(s.weight),
                     self.o_mantissa.eq(s.keep), self.o_shift.eq(s.shift)]
        return m
