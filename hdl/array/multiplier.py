"""A signed multiplier with all of a DSP block's registers."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["FAMILIES", "Multiplier"]

FAMILIES = {"generic": (64, 64), "ecp5": (18, 18), "xilinx": (27, 18)}
"""FPGA families that :class:`Multiplier` knows, with the widest pair of factors; ``"generic"`` is
portable."""


class Multiplier(wiring.Component):
    """Multiply two signed numbers: ``o_product = i_a * i_b``, exactly.

    Latency LATENCY_CYCLES (input, pipeline and output register), one product per cycle, no flow
    control. What a reset does to the registers is undefined: whoever uses the product carries the
    valid bit.
    ``i_enable`` holds registers whose stage has nothing to do; left alone it is all ones and the
    multiplier runs freely.

        i_a, i_b --> [0: input] --> (*) --> [1: pipeline] --> [2: output] --> o_product

    Yosys never moves registers into an ECP5's MULT18X18D and nextpnr charges 3.9 ns for one without
    them, so ``family="ecp5"`` instantiates the block with its registers; ``"xilinx"`` does so with
    the DSP48E2 of UltraScale+ (AMD UG579). Bits and latency are the same. Simulators need
    :data:`moeaccel.hdl.verilog.dsp_models.DSP_MODELS` of the family beside the Verilog.

    Parameters
    ----------
    a_width, b_width : :class:`int`
        Bits of the factors, signs included; at least 2. At most 18 each for ``"ecp5"``; 27 and 18,
        in any order, for ``"xilinx"``.
    family : :class:`str`
        One of FAMILIES.

    Members
    -------
    i_a : :py:`In(signed(a_width))`
    i_b : :py:`In(signed(b_width))`
    i_enable : :py:`In(3)`
        Enables of the input, pipeline and output registers.
    o_product : :py:`Out(signed(a_width + b_width))`
    """

    LATENCY_CYCLES = 3

    def __init__(self, a_width, b_width, family="generic"):
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
        for name, width in (("a_width", a_width), ("b_width", b_width)):
            most = FAMILIES[family][0]
            if not isinstance(width, int) or not 2 <= width <= most:
                raise ValueError(f"{name} must be an integer from 2 to {most}, not {width!r}")
        if min(a_width, b_width) > FAMILIES[family][1]:
            raise ValueError(f"one of a_width and b_width must be at most {FAMILIES[family][1]}, "
                             f"not {a_width} and {b_width}")
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
        if self._family != "generic":
            widths = FAMILIES[self._family]
            a, b = Signal(signed(widths[0]), name="a"), Signal(signed(widths[1]), name="b")
            factors = (self.i_a, self.i_b)
            if self._a_width < self._b_width:  # the wider factor has the wider port
                factors = factors[::-1]
            m.d.comb += [a.eq(factors[0]), b.eq(factors[1])]
            instantiate = {"ecp5": self._mult18x18d, "xilinx": self._dsp48e2}[self._family]
            instantiate(m, a, b)
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

    def _mult18x18d(self, m, a, b):
        """Add a MULT18X18D; clock enables 0, 1 and 2 belong to its three rows of registers.

        They need no reset, but to keep it at 0 takes a wire of which every block has few; a reset
        that reaches everything has lines of its own.
        """
        product = Signal(signed(len(a) + len(b)))
        m.d.comb += self.o_product.eq(product)
        stages = {"INPUTA": 0, "INPUTB": 0, "PIPELINE": 1, "OUTPUT": 2}
        parameters = {"p_GSR": "DISABLED"}
        for stage, enable in stages.items():
            parameters |= {f"p_REG_{stage}_CLK": "CLK0", f"p_REG_{stage}_CE": f"CE{enable}",
                           f"p_REG_{stage}_RST": "RST0"}
        ports = {"i_CLK0": ClockSignal("sync"), "i_RST0": ResetSignal("sync"),
                 "i_SIGNEDA": Const(1, 1), "i_SIGNEDB": Const(1, 1), "i_SOURCEA": Const(0, 1),
                 "i_SOURCEB": Const(0, 1)}
        ports |= {f"i_CE{i}": self.i_enable[i] for i in range(3)}
        ports |= {f"i_A{i}": a[i] for i in range(len(a))}
        ports |= {f"i_B{i}": b[i] for i in range(len(b))}
        ports |= {f"o_P{i}": product[i] for i in range(len(product))}
        m.submodules.mult18x18d = Instance("MULT18X18D", **parameters, **ports)

    def _dsp48e2(self, m, a, b):
        """Add a DSP48E2 as P = A * B with the registers A2 and B2, M and P.

        Pre-adder, C and cascades are not used; their data inputs are held at 1 and their registers
        in place and disabled, which UG579 says takes the least power.
        """
        product = Signal(signed(48))
        m.d.comb += self.o_product.eq(product)
        parameters = {"A_INPUT": "DIRECT", "B_INPUT": "DIRECT", "AMULTSEL": "A", "BMULTSEL": "B",
                      "USE_MULT": "MULTIPLY", "USE_SIMD": "ONE48"}
        parameters |= dict.fromkeys(("AREG", "BREG", "MREG", "PREG", "ACASCREG", "BCASCREG", "CREG",
                                     "DREG", "ADREG"), 1)
        parameters |= dict.fromkeys(("OPMODEREG", "ALUMODEREG", "INMODEREG", "CARRYINREG",
                                     "CARRYINSELREG"), 0)
        controls = {"OPMODE": Const(0b00_000_01_01, 9),  # X and Y: the product; W and Z: 0
                    "ALUMODE": Const(0b0000, 4),  # Z + W + X + Y + CIN
                    "INMODE": Const(0b00000, 5),  # A2 and B2 to the multiplier
                    "CARRYINSEL": Const(0, 3), "CARRYIN": Const(0, 1)}
        unused = {"C": Const(-1, 48), "D": Const(-1, 27)}
        enables = {"CEA1": 0, "CEB1": 0, "CEC": 0, "CED": 0, "CEAD": 0, "CECTRL": 0, "CEALUMODE": 0,
                   "CECARRYIN": 0, "CEINMODE": 0, "CEA2": self.i_enable[0],
                   "CEB2": self.i_enable[0], "CEM": self.i_enable[1], "CEP": self.i_enable[2]}
        resets = ("A", "B", "C", "D", "M", "P", "CTRL", "ALUMODE", "ALLCARRYIN", "INMODE")
        wide = Signal(signed(30))  # the multiplier takes the low 27 bits
        m.d.comb += wide.eq(a)
        inputs = {"CLK": ClockSignal("sync"), "A": wide, "B": b, **controls, **unused,
                  **{name: Const(value, 1) if isinstance(value, int) else value
                     for name, value in enables.items()},
                  **{f"RST{name}": Const(0, 1) for name in resets}}
        m.submodules.dsp48e2 = Instance(
            "DSP48E2", **{f"p_{name}": value for name, value in parameters.items()},
            **{f"i_{name}": value for name, value in inputs.items()}, o_P=product)
