"""A signed multiplier with all of a DSP block's registers."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["FAMILIES", "Multiplier"]

FAMILIES = ("generic", "ecp5")
"""FPGA families that :class:`Multiplier` knows; ``"generic"`` is portable."""


class Multiplier(wiring.Component):
    """Multiply two signed numbers: ``o_product = i_a * i_b``, exactly.

    Latency LATENCY_CYCLES (input, pipeline and output register), one product per cycle, no flow
    control. A reset leaves the registers alone: whoever uses the product carries the valid bit.
    ``i_enable`` holds registers whose stage has nothing to do; left alone it is all ones and the
    multiplier runs freely.

        i_a, i_b --> [0: input] --> (*) --> [1: pipeline] --> [2: output] --> o_product

    Yosys never moves registers into an ECP5's MULT18X18D and nextpnr charges 3.9 ns for one without
    them, so ``family="ecp5"`` instantiates the block with its registers. Bits and latency are the
    same.

    Parameters
    ----------
    a_width, b_width : :class:`int`
        Bits of the factors, signs included; at least 2, and at most 18 for ``"ecp5"``.
    family : :class:`str`
        ``"generic"`` or ``"ecp5"``.

    Members
    -------
    i_a : :py:`In(signed(a_width))`
    i_b : :py:`In(signed(b_width))`
    i_enable : :py:`In(3)`
        Enables of the input, pipeline and output registers.
    o_product : :py:`Out(signed(a_width + b_width))`
    """

    LATENCY_CYCLES = 3
    ECP5_WIDTH = 18

    def __init__(self, a_width, b_width, family="generic"):
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
        most = self.ECP5_WIDTH if family == "ecp5" else 64
        for name, width in (("a_width", a_width), ("b_width", b_width)):
            if not isinstance(width, int) or not 2 <= width <= most:
                raise ValueError(f"{name} must be an integer from 2 to {most}, not {width!r}")
        self._a_width = a_width
        self._b_width = b_width
        self._family = family
        super().__init__({
            "i_a": In(signed(a_width)),
            "i_b": In(signed(b_width)),
            "i_enable": In(3, init=0b111),
            "o_product": Out(signed(a_width + b_width)),
        })

    @property
    def a_width(self):
        """Bits of the first factor."""
        return self._a_width

    @property
    def b_width(self):
        """Bits of the second factor."""
        return self._b_width

    @property
    def family(self):
        """FPGA family."""
        return self._family

    def elaborate(self, platform):
        m = Module()
        if self._family == "ecp5":
            self._instantiate(m)
            return m
        a = Signal(self.i_a.shape(), reset_less=True)
        b = Signal(self.i_b.shape(), reset_less=True)
        pipeline = Signal(self.o_product.shape(), reset_less=True)
        product = Signal(self.o_product.shape(), reset_less=True)
        with m.If(self.i_enable[0]):
            m.d.sync += [a.eq(self.i_a), b.eq(self.i_b)]
        with m.If(self.i_enable[1]):
            m.d.sync += pipeline.eq(a * b)
        with m.If(self.i_enable[2]):
            m.d.sync += product.eq(pipeline)
        m.d.comb += self.o_product.eq(product)
        return m

    def _instantiate(self, m):
        """Add a MULT18X18D; clock enables 0, 1 and 2 belong to its three rows of registers."""
        width = self.ECP5_WIDTH
        a, b = Signal(signed(width)), Signal(signed(width))
        product = Signal(signed(2 * width))
        m.d.comb += [a.eq(self.i_a), b.eq(self.i_b), self.o_product.eq(product)]
        stages = {"INPUTA": 0, "INPUTB": 0, "PIPELINE": 1, "OUTPUT": 2}
        parameters = {"p_GSR": "DISABLED"}
        for stage, enable in stages.items():
            parameters |= {f"p_REG_{stage}_CLK": "CLK0", f"p_REG_{stage}_CE": f"CE{enable}",
                           f"p_REG_{stage}_RST": "RST0"}
        ports = {"i_CLK0": ClockSignal("sync"), "i_RST0": Const(0, 1), "i_SIGNEDA": Const(1, 1),
                 "i_SIGNEDB": Const(1, 1), "i_SOURCEA": Const(0, 1), "i_SOURCEB": Const(0, 1)}
        ports |= {f"i_CE{i}": self.i_enable[i] for i in range(3)}
        ports |= {f"i_A{i}": a[i] for i in range(width)}
        ports |= {f"i_B{i}": b[i] for i in range(width)}
        ports |= {f"o_P{i}": product[i] for i in range(2 * width)}
        m.submodules.mult18x18d = Instance("MULT18X18D", **parameters, **ports)
