"""An unsigned multiplier of one adder, for addresses."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["SequentialMultiplier"]


class SequentialMultiplier(wiring.Component):
    """Multiply two unsigned numbers by shifting and adding: ``o_product = i_a * i_b``.

    Latency: ``o_done`` is high again after at most ``b_width`` + 1 cycles (one for each bit of
    ``i_b`` up to its highest set one) and stays high, with the product, until the next start.
    Reset: done, 0.

    Parameters
    ----------
    a_width, b_width : :class:`int`
        Bits of the factors.

    Members
    -------
    i_start : :py:`In(1)`
        Take the factors; what was under way is forgotten.
    i_a, i_b : :py:`In(a_width)`, :py:`In(b_width)`
    o_done : :py:`Out(1)`
    o_product : :py:`Out(a_width + b_width)`
    """

    def __init__(self, a_width, b_width):
        for name, width in (("a_width", a_width), ("b_width", b_width)):
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"{name} must be a positive integer, not {width!r}")
        self._a_width = a_width
        self._b_width = b_width
        super().__init__({
            "i_start": In(1),
            "i_a": In(a_width),
            "i_b": In(b_width),
            "o_done": Out(1),
            "o_product": Out(a_width + b_width),
        })

    @property
    def a_width(self):
        """Bits of the first factor."""
        return self._a_width

    @property
    def b_width(self):
        """Bits of the second factor."""
        return self._b_width

    def elaborate(self, platform):
        m = Module()
        a = Signal(self._a_width + self._b_width)
        b = Signal(self._b_width)
        m.d.comb += self.o_done.eq(b == 0)
        with m.If(self.i_start):
            m.d.sync += [a.eq(self.i_a), b.eq(self.i_b), self.o_product.eq(0)]
        with m.Elif(b != 0):
            m.d.sync += [a.eq(a << 1), b.eq(b >> 1)]
            with m.If(b[0]):
                m.d.sync += self.o_product.eq(self.o_product + a)
        return m
