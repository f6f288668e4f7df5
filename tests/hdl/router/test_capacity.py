import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.config import preset
from moeaccel.golden.router import within_capacity
from moeaccel.hdl.router.capacity import Capacity
from moeaccel.router.settings import RouterSettings
from tests.support.router import form_of

CONFIG = preset("tiny").replace(
    router=("softmax",), router_modes=("capacity",), max_tokens=32, max_assignments=64)


@pytest.mark.parametrize(("capacity", "order", "top_k", "tokens"), [
    (3, "rank", 2, 32), (3, "priority", 2, 32), (1, "rank", 3, 21), (1, "priority", 1, 9),
    (1 << 30, "rank", 2, 8), (1 << 30, "priority", 4, 1)])
def test_who_is_left(capacity, order, top_k, tokens):
    """Twice: the counts of the first are not those of the second."""
    rng = np.random.default_rng(capacity % 100)
    dut = Capacity(CONFIG)
    settings = RouterSettings(experts=8, top_k=top_k, capacity=capacity, capacity_order=order)
    form = form_of(settings, modes=("capacity",)) | {"capacity": min(capacity, 63)}
    found, want = [], []

    async def testbench(ctx):
        ctx.set(dut.i_form, form)
        ctx.set(dut.i_experts, 8)
        ctx.set(dut.i_tokens, tokens)
        for _ in range(2):
            ids = rng.integers(-1, 8, (tokens, top_k))
            priority = rng.integers(0, 6, tokens) << 36  # some are equal
            want.append(within_capacity(ids, capacity, priority if order == "priority" else None))
            assert ctx.get(dut.o_done)
            ctx.set(dut.i_start, 1)
            await ctx.tick()
            ctx.set(dut.i_start, 0)
            for i, expert in enumerate(ids.reshape(-1).tolist()):
                while rng.random() < 0.3:
                    ctx.set(dut.i_pair.valid, 0)
                    await ctx.tick()
                ctx.set(dut.i_pair.valid, 1)
                ctx.set(dut.i_pair.payload, {
                    "id": max(expert, 0), "some": int(expert >= 0), "weight": 0,
                    "priority": int(priority[i // top_k]), "last": int(i % top_k == top_k - 1)})
                await ctx.tick().until(dut.i_pair.ready)
            ctx.set(dut.i_pair.valid, 0)
            await ctx.tick().until(dut.o_done)
            left = []
            for _ in range(ids.size):
                asks = int(rng.integers(1, 3))
                ctx.set(dut.i_next, 1)
                await ctx.tick()
                left.append(ctx.get(dut.o_left))
                ctx.set(dut.i_next, 0)
                await ctx.tick().repeat(asks)
            found.append(np.array(left).reshape(tokens, top_k))

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(testbench)
    sim.run()
    assert (np.array(found) == np.array(want)).all()


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="with the mode capacity of a router"):
        Capacity(preset("tiny").replace(router=("softmax",)))
