import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.config import preset
from moeaccel.golden.router import _kept
from moeaccel.hdl.router.dropper import Dropper
from moeaccel.router.settings import RouterSettings
from moeaccel.router.tables import SCORE_BITS, part
from tests.support.router import form_of

CONFIG = preset("tiny").replace(
    router=("softmax",), router_top_k=8, router_modes=("threshold", "top_p", "capacity"))
MODES = {"threshold": {"threshold": 0.5}, "all": {"threshold": 1.0}, "top_p": {"top_p": 0.6},
         "half": {"top_p": 0.5},  # those of two equal ones are exactly that
         "both": {"threshold": 0.1, "top_p": 0.9}, "capacity": {"capacity": 3},
         "three": {"threshold": 0.25, "top_p": 0.8, "capacity": 3}}


def draw(rng, top_k):
    """Return scores, in order and as sigmoids are, of which some are equal or 0, and who is there.
    """
    q = np.sort(rng.integers(0, 4, top_k) << rng.integers(0, SCORE_BITS - 4))[::-1]
    there = np.arange(top_k) < rng.integers(0, top_k + 1)
    return np.where(there, q, 0), there


@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
@pytest.mark.parametrize("name", MODES)
def test_who_is_kept(name, top_k):
    """One token behind another: nothing is left of the one before."""
    rng = np.random.default_rng(top_k)
    modes = CONFIG.router_modes
    dut = Dropper(CONFIG)
    settings = RouterSettings(experts=16, top_k=top_k, **MODES[name])
    capped = settings.capacity is not None
    got, want, cycles = [], [], []
    held = {"scores": [0] * 8, "left": []}

    async def scores(ctx):
        """A chosen one's score, and whether its expert has room, each a cycle after it is asked."""
        async for _, _, place, asks in ctx.tick().sample(dut.score_address, dut.o_next):
            ctx.set(dut.score_data, held["scores"][place])
            if asks:
                ctx.set(dut.i_left, held["left"].pop(0))

    async def testbench(ctx):
        ctx.set(dut.i_form, form_of(settings, modes=modes) | {"capacity": 3 if capped else 0})
        ctx.set(dut.i_capped, capped)
        for _ in range(20):
            q, there = draw(rng, top_k)
            room = rng.random(top_k) < 0.7
            held["scores"] = q.tolist() + [0] * (8 - top_k)
            held["left"] = [int(one) for one in room]
            ctx.set(dut.i_some, sum(1 << i for i in range(top_k) if there[i]))
            ctx.set(dut.i_first, int(q[0]))
            ctx.set(dut.i_total, int(q.sum()))
            ctx.set(dut.i_start, 1)
            await ctx.tick()
            ctx.set(dut.i_start, 0)
            passed = 1
            while not ctx.get(dut.o_done):
                await ctx.tick()
                passed += 1
            cycles.append(passed)
            got.append((ctx.get(dut.o_kept), ctx.get(dut.o_total)))
            keep = _kept(q[None], there[None], settings)[0] & (room | (not capped))
            want.append((sum(1 << i for i in range(top_k) if keep[i]), int(q[keep].sum())))
            assert held["left"] == ([] if capped else [int(one) for one in room])
            await ctx.tick()

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(scores, background=True)
    sim.add_testbench(testbench)
    sim.run()
    assert got == want
    assert len({kept for kept, _ in got}) > 1
    longest = max(part(value or 0) for value in (settings.threshold, settings.top_p))
    assert set(cycles) == {dut.LATENCY_CYCLES + longest.bit_length() + top_k}


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="with modes of a router that drop"):
        Dropper(preset("tiny").replace(router=("softmax",), router_modes=("prior",)))
