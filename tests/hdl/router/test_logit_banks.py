import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.config import preset
from moeaccel.hdl.router.logit_banks import LogitBanks
from moeaccel.router.settings import RouterSettings
from tests.support.router import form_of

MODES = ("gates",)
CONFIG = preset("tiny").replace(router=("sigmoid",), router_modes=MODES)
LEAST, MOST = -(1 << 31), (1 << 31) - 1


@pytest.mark.parametrize(("experts", "shared"), [(1, 0), (7, 0), (16, 0), (12, 3)])
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_logits_of_tokens(experts, shared, tables, stall):
    """With their bias, within their range, and the largest, which no gate is."""
    rng = np.random.default_rng(experts)
    dut = LogitBanks(CONFIG)
    settings = RouterSettings(experts=experts, top_k=1, score="sigmoid", shared=shared,
                              gates="sigmoid" if shared else "none")
    outputs, tokens = settings.outputs, 9
    logits = rng.integers(LEAST, MOST, (tokens, outputs))
    logits[1::3] = rng.integers(-2, 3, logits[1::3].shape)  # some are equal
    beyond = rng.random(logits.shape) < 0.1
    bias = rng.integers(-(1 << 29), 1 << 29, 16)
    total = logits + np.pad(np.where(tables, bias[:experts], 0), (0, shared))
    want = np.clip(total, LEAST, MOST)
    saturated = int((beyond | (total != want)).sum())
    found, pulses = [], []

    async def count(ctx):
        async for _, _, pulse in ctx.tick().sample(dut.o_saturated):
            pulses.append(pulse)

    async def load(ctx):
        for token in range(tokens):
            for value, far in zip(logits[token].tolist(), beyond[token].tolist(), strict=True):
                while rng.random() < stall:
                    ctx.set(dut.i_logit.valid, 0)
                    await ctx.tick()
                ctx.set(dut.i_logit.payload, {"value": value, "beyond": int(far)})
                ctx.set(dut.i_logit.valid, 1)
                await ctx.tick().until(dut.i_logit.ready)
            ctx.set(dut.i_logit.valid, 0)

    async def route(ctx):
        for token in range(tokens):
            await ctx.tick().until(dut.o_full)
            if token == 0:  # a second one comes in meanwhile, but no third
                await ctx.tick().repeat(2 * tokens * outputs)
                assert not ctx.get(dut.i_logit.ready)
            assert not ctx.get(dut.o_idle)
            largest = want[token, :experts]
            assert ctx.get(dut.o_most) == largest.max()
            assert ctx.get(dut.o_most_id) == largest.argmax()
            read = []
            for index in rng.permutation(outputs).tolist():
                ctx.set(dut.i_address, index)
                await ctx.tick()
                read.append((index, ctx.get(dut.o_logit)))
            found.append([value for _, value in sorted(read)])
            ctx.set(dut.i_freed, 1)
            await ctx.tick()
            ctx.set(dut.i_freed, 0)
        await ctx.tick()
        assert ctx.get(dut.o_idle)

    async def testbench(ctx):
        ctx.set(dut.i_form, form_of(settings, modes=MODES) | {"tables": int(tables)})
        for index, value in enumerate(bias.tolist()):
            ctx.set(dut.bias_w_en, 1)
            ctx.set(dut.bias_w_address, index)
            ctx.set(dut.bias_w_data, value)
            await ctx.tick()
        ctx.set(dut.bias_w_en, 0)
        await route(ctx)

    async def loading(ctx):
        await ctx.tick().repeat(len(bias) + 1)
        await load(ctx)

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(count, background=True)
    sim.add_testbench(loading, background=True)
    sim.add_testbench(testbench)
    sim.run()
    assert found == want.tolist()
    assert sum(pulses) == saturated


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 3"):
        LogitBanks(3)
