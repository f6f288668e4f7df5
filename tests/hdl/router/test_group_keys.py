import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.config import preset
from moeaccel.golden.router import _group_keys
from moeaccel.hdl.router.group_keys import GroupKeys
from moeaccel.router.settings import RouterSettings
from tests.support.router import form_of

CONFIG = preset("tiny").replace(router=("sigmoid",), max_experts=64)
LEAST, MOST = -(1 << 31), (1 << 31) - 1


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize(("groups", "size"), [(1, 5), (4, 2), (8, 8), (64, 1)])
@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_keys_of_groups(group_score, groups, size, stall):
    """Also where keys are equal, fall, rise, or are the least and the largest that there are."""
    if group_score == "top2_sum" and size == 1:
        pytest.skip("a group of one expert has no two")
    rng = np.random.default_rng(groups)
    experts = groups * size
    dut = GroupKeys(CONFIG)
    settings = RouterSettings(experts=experts, top_k=1, score="sigmoid", groups=groups,
                              group_score=group_score)
    rows = np.stack([
        rng.integers(LEAST, MOST, experts), np.arange(experts), -np.arange(experts),
        np.full(experts, LEAST), np.full(experts, MOST), rng.integers(-2, 2, experts),
        np.where(rng.random(experts) < 0.5, LEAST, MOST)])
    got, latencies, last = [], [], {}

    async def keys(ctx):
        cycle = 0
        async for _, _, valid, key, group, comes, at in ctx.tick().sample(
                dut.o_valid, dut.o_key, dut.o_group, dut.i_valid, dut.o_at):
            if comes:
                last[at] = cycle
            if valid:
                got.append((group, key))
                latencies.append(cycle - last[group])
            cycle += 1

    async def testbench(ctx):
        ctx.set(dut.i_form, form_of(settings) | {
            "group_size": size, "top2": group_score == "top2_sum"})
        await ctx.tick()
        for row in rows.tolist():
            for key in row:
                while rng.random() < stall:
                    ctx.set(dut.i_valid, 0)
                    await ctx.tick()
                ctx.set(dut.i_valid, 1)
                ctx.set(dut.i_key, key)
                await ctx.tick()
            ctx.set(dut.i_valid, 0)
            await ctx.tick().repeat(dut.LATENCY_CYCLES)
            ctx.set(dut.i_clear, 1)
            await ctx.tick()
            ctx.set(dut.i_clear, 0)

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(keys, background=True)
    sim.add_testbench(testbench)
    sim.run()
    want = _group_keys(rows, settings)
    assert got == [(group, key) for row in want.tolist() for group, key in enumerate(row)]
    assert set(latencies) == {dut.LATENCY_CYCLES}


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 3"):
        GroupKeys(3)
