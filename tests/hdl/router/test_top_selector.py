import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.golden.router import _top
from moeaccel.hdl.router.top_selector import TopSelector


@pytest.mark.parametrize("places", [1, 8])
@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_order(places, stall):
    rng = np.random.default_rng(places)
    dut = TopSelector(places, key_bits=6, id_bits=6)

    async def testbench(ctx):
        for count in (64, 20, 3, 0, 64):
            keys = rng.integers(-32, 32, count)
            if count == 20:
                keys[:] = -32  # all equal, and the least there is
            ctx.set(dut.i_clear, 1)
            await ctx.tick()
            ctx.set(dut.i_clear, 0)
            for i, key in enumerate(keys.tolist()):
                while rng.random() < stall:
                    ctx.set(dut.i_valid, 0)
                    await ctx.tick()
                ctx.set(dut.i_valid, 1)
                ctx.set(dut.i_key, key)
                ctx.set(dut.i_id, i)
                await ctx.tick()
            ctx.set(dut.i_valid, 0)
            await ctx.tick().repeat(dut.LATENCY_CYCLES)
            some = ctx.get(dut.o_some)
            got = [ctx.get(dut.o_ids[i]) for i in range(places) if some >> i & 1]
            assert some == (1 << min(count, places)) - 1
            assert got == _top(keys[None], places)[0].tolist()

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(testbench)
    sim.run()


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="places must be a positive integer, not 0"):
        TopSelector(0, key_bits=4, id_bits=4)
