"""The vendors' blocks in Verilator: exact products, enables, and two rows in one multiplier."""

import numpy as np
import pytest
from amaranth import *
from amaranth.back import verilog
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.formats import SHARED_FIELD_BITS
from moeaccel.hdl.array.multiplier import FAMILIES, Multiplier
from moeaccel.hdl.verilog.dsp_models import DSP_MODELS
from moeaccel.sim.errors import BuildError
from tests.support.verilated import Verilated, translate

LATENCY = Multiplier.LATENCY_CYCLES
MODELS = "".join(DSP_MODELS.values())


class Families(wiring.Component):
    """Multipliers of every family side by side, in both orders of a wide and a narrow factor.

    And the widest DSP48E2.
    """

    def __init__(self):
        super().__init__({
            "i_wide": In(signed(18)), "i_narrow": In(signed(8)), "i_enable": In(3),
            "i_a": In(signed(27)), "i_b": In(signed(18)), "o_widest": Out(signed(45)),
            **{f"o_{family}{order}": Out(signed(26)) for family in FAMILIES for order in (0, 1)},
        })

    def elaborate(self, platform):
        m = Module()
        for family in FAMILIES:
            for order, widths in enumerate(((18, 8), (8, 18))):
                m.submodules[f"{family}{order}"] = unit = Multiplier(*widths, family)
                factors = (self.i_wide, self.i_narrow)
                a, b = factors[::-1] if order else factors
                m.d.comb += [unit.i_a.eq(a), unit.i_b.eq(b), unit.i_enable.eq(self.i_enable),
                             getattr(self, f"o_{family}{order}").eq(unit.o_product)]
        m.submodules.widest = widest = Multiplier(27, 18, "xilinx")
        m.d.comb += [widest.i_a.eq(self.i_a), widest.i_b.eq(self.i_b),
                     self.o_widest.eq(widest.o_product)]
        return m


def run(block, cycles, **inputs):
    """Return each output from the latency on; inputs that are not given are 0, or enabled."""
    rest = {"i_wide": 0, "i_narrow": 0, "i_enable": 7, "i_a": 0, "i_b": 0}
    given = {name: np.full(cycles + LATENCY, value) for name, value in rest.items()}
    for name, values in inputs.items():
        given[name][:cycles] = values
    return {name: values[LATENCY:] for name, values in block.run(**given).items()}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return Verilated(Families(), tmp_path_factory.mktemp("families"), models=MODELS)


def test_products_with_random_enables(families):
    """Every family holds and moves each of its three rows of registers as the generic one says."""
    rng = np.random.default_rng(1)
    cycles = 20_000
    wide = rng.integers(-1 << 17, 1 << 17, cycles)
    narrow = rng.integers(-128, 128, cycles)
    for values, least, most in ((wide, -1 << 17, (1 << 17) - 1), (narrow, -128, 127)):
        some = rng.random(cycles) < 0.2
        values[some] = rng.choice([least, most, 0, -1], some.sum())
    enable = np.where(rng.random(cycles) < 0.5, 7, rng.integers(0, 8, cycles))
    enable[:LATENCY] = 7
    found = run(families, cycles, i_wide=wide, i_narrow=narrow, i_enable=enable)
    del found["o_widest"]
    factors, pipeline, product, expected = (0, 0), 0, 0, []
    for a, b, e in zip(wide.tolist(), narrow.tolist(), enable.tolist(), strict=True):
        expected.append(product)
        product = pipeline if e & 4 else product
        pipeline = factors[0] * factors[1] if e & 2 else pipeline
        factors = (a, b) if e & 1 else factors
    assert len(found) == 2 * len(FAMILIES)
    for name, products in found.items():
        assert np.array_equal(products[:cycles - LATENCY], expected[LATENCY:]), name


def split(product):
    """Return (w0 * x, w1 * x) of ((w1 << SHARED_FIELD_BITS) + w0) * x, as DotArray splits it."""
    half = 1 << SHARED_FIELD_BITS - 1
    low = ((product + half) & (2 * half - 1)) - half
    return low, (product - low) >> SHARED_FIELD_BITS


def test_packing_of_every_pair_in_every_family(families):
    """All pairs of 5-bit weights with all mantissas, through the blocks.

    The fields are separate exactly if -2048 <= w0 * x <= 2047. So every format of today is exact
    for x in [-128, 127], and the one product of 5-bit weights that is not is w0 = -16 with the
    low digit x = -128 of ``a16``. w1 may be anything.
    """
    w1, w0, x = (axis.reshape(-1) for axis in np.meshgrid(
        np.arange(-16, 16), np.arange(-16, 16), np.arange(-128, 128), indexing="ij"))
    found = run(families, len(x), i_wide=(w1 << SHARED_FIELD_BITS) + w0, i_narrow=x)
    del found["o_widest"]
    wrong = (w0 == -16) & (x == -128)
    for name, products in found.items():
        low, high = split(products)
        exact = (low == w0 * x) & (high == w1 * x)
        assert np.array_equal(exact, ~wrong), name


@pytest.mark.parametrize(("what", "weights", "mantissas"), [
    ("int4 and mxfp4", (-12, 12), (-128, 127)),
    ("5 bits, one plane or the high one", (-16, 15), (-127, 127)),
    ("z - w of 5 bits, any plane", (-15, 16), (-128, 127)),
])
def test_ranges_that_are_exact(what, weights, mantissas):
    """What a format must keep to; zero-point formats in ``a16`` store z - w, not w - z."""
    low, high = (np.arange(least, most + 1) for least, most in (weights, mantissas))
    w1, w0, x = np.meshgrid(low, low, high, indexing="ij")
    first, second = split(((w1 << SHARED_FIELD_BITS) + w0) * x)
    assert np.array_equal(first, w0 * x), what
    assert np.array_equal(second, w1 * x), what


def test_widest_factors(families):
    """27 x 18 bits, extremes included."""
    rng = np.random.default_rng(2)
    corners = [(a, b) for a in (-1 << 26, (1 << 26) - 1, -1) for b in (-1 << 17, (1 << 17) - 1, 1)]
    a, b = np.array([*corners, *zip(rng.integers(-1 << 26, 1 << 26, 1000),
                                    rng.integers(-1 << 17, 1 << 17, 1000), strict=True)]).T
    found = run(families, len(a), i_a=a, i_b=b)
    assert np.array_equal(found["o_widest"], a * b)


@pytest.mark.parametrize(("family", "given", "changed", "match"), [
    ("xilinx", '.PREG(32\'d1)', '.PREG(32\'d0)', "DSP48E2 is modelled with PREG = 1 only"),
    ("ecp5", '.REG_OUTPUT_CLK("CLK0")', '.REG_OUTPUT_CLK("NONE")',
     "MULT18X18D is modelled with REG_OUTPUT_CLK = CLK0 only"),
])
def test_other_modes_are_refused(tmp_path, family, given, changed, match):
    """A model does not quietly do what it does for parameters that mean something else."""
    text = verilog.convert(Multiplier(8, 8, family), name="top", emit_src=False)
    assert given in text
    with pytest.raises(BuildError, match=match):
        translate(text.replace(given, changed) + MODELS, tmp_path)
