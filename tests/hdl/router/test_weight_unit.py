import numpy as np
from amaranth.sim import Simulator

from moeaccel.hdl.router.weight_unit import WeightUnit
from moeaccel.router.tables import leading, to_float32


def test_bits():
    rng = np.random.default_rng(1)
    dut = WeightUnit()

    async def testbench(ctx):
        for factor, power in ((1 << 23, -59), ((1 << 24) - 1, -100), (11184811, 20),
                              (12345678, -128), ((1 << 23) - 1, -40)):
            values = rng.integers(0, 1 << 47, 80) >> rng.integers(0, 48, 80)
            mantissa, position = leading(values, 24)
            product = mantissa * factor
            weights = to_float32(product, power + position - 23).view(np.uint32)
            most, place = leading(product, 24)
            ctx.set(dut.i_factor, factor)
            ctx.set(dut.i_power, power)
            got = []
            for cycle in range(len(values) + dut.LATENCY_CYCLES):
                ctx.set(dut.i_valid, cycle < len(values))
                if cycle < len(values):
                    ctx.set(dut.i_value, int(values[cycle]))
                assert ctx.get(dut.o_valid) == (cycle >= dut.LATENCY_CYCLES)
                if ctx.get(dut.o_valid):
                    got.append((ctx.get(dut.o_weight), ctx.get(dut.o_mantissa),
                                ctx.get(dut.o_shift)))
                await ctx.tick()
            for have, value, weight, bits, at in zip(
                    got, values, weights, most, place, strict=True):
                assert have[0] == weight
                if value:
                    assert have[1:] == (bits, 47 - at)

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(testbench)
    sim.run()
