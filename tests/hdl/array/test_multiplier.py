"""Multiplier: products, latency, enables, and the ECP5 block's registers."""

import numpy as np
import pytest
from amaranth.back import rtlil
from amaranth.sim import Simulator

from moeaccel.hdl.array.multiplier import Multiplier


def run(dut, inputs):
    """Return what ``o_product`` shows in each cycle, for (a, b, enable) in each cycle."""
    seen = []

    async def bench(ctx):
        for a, b, enable in inputs:
            ctx.set(dut.i_a, a)
            ctx.set(dut.i_b, b)
            ctx.set(dut.i_enable, enable)
            seen.append(ctx.get(dut.o_product))
            await ctx.tick()

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(bench)
    sim.run()
    return seen


@pytest.mark.parametrize(("a_width", "b_width"), [(17, 8), (18, 18), (17, 12), (2, 2)])
def test_products_follow_after_latency(a_width, b_width):
    """One exact product per cycle, extremes included."""
    rng = np.random.default_rng(1)
    low_a, low_b = -1 << a_width - 1, -1 << b_width - 1
    operands = [(a, b, 7) for a in (low_a, ~low_a, 0) for b in (low_b, ~low_b, -1)]
    operands += [(int(rng.integers(low_a, -low_a)), int(rng.integers(low_b, -low_b)), 7)
                 for _ in range(200)]
    latency = Multiplier.LATENCY_CYCLES
    seen = run(Multiplier(a_width, b_width), operands + [(0, 0, 7)] * latency)
    assert seen[latency:] == [a * b for a, b, _ in operands]


def test_enables_hold_registers():
    """A register whose enable is low keeps its value; the others go on."""
    seen = run(Multiplier(8, 8), [
        (3, 5, 7),      # 15 on its way
        (7, 7, 0b110),  # not taken: the input register keeps (3, 5)
        (2, 2, 0b011),  # the output register keeps what it has
        (0, 0, 0b000),
        (0, 0, 7),
        (0, 0, 7),
        (0, 0, 7),
    ])
    assert seen == [0, 0, 0, 0, 0, 15, 4]


def test_ecp5_sets_every_register():
    """All registers of the block are clocked, each row with its own enable."""
    text = rtlil.convert(Multiplier(17, 8, "ecp5"))
    for stage, enable in (("INPUTA", 0), ("INPUTB", 0), ("PIPELINE", 1), ("OUTPUT", 2)):
        assert f'parameter \\REG_{stage}_CLK "CLK0"' in text
        assert f'parameter \\REG_{stage}_CE "CE{enable}"' in text
    assert text.count("connect \\P") == 36


@pytest.mark.parametrize(("arguments", "match"), [
    ((19, 8, "ecp5"), "a_width must be an integer from 2 to 18, not 19"),
    ((8, 1), "b_width must be an integer from 2 to 64, not 1"),
    ((8, 8, "asic"), "family must be one of generic, ecp5, xilinx, not 'asic'"),
])
def test_constructor(arguments, match):
    with pytest.raises(ValueError, match=match):
        Multiplier(*arguments)
