import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.hdl.router.near_logits import NearLogits
from moeaccel.router.tables import LOGIT_BITS


@pytest.mark.parametrize("limit", [0, 0.02, 0.5, 1.0])
def test_near_is_relative_to_the_larger(limit):
    """The formula is that of the golden model."""
    rng = np.random.default_rng(1)
    units = round(limit * 2**LOGIT_BITS)
    dut = NearLogits(7)
    largests = [-(1 << 31), -5, 0, 1 << 20, (1 << 31) - 1]
    below = np.concatenate([[0, 1, 2], (rng.random(40) * 2**rng.uniform(0, 32, 40)).astype(int)])
    logits = [np.maximum(largest - below, -(1 << 31)) for largest in largests]
    edges = [largest - np.arange(-2, 3) - round(largest * limit) for largest in largests]
    logits = [np.concatenate([some, edge[(edge <= largest) & (edge >= -(1 << 31))]])
              for some, edge, largest in zip(logits, edges, largests, strict=True)]
    got, want = [], []

    async def testbench(ctx):
        ctx.set(dut.i_limit, units)
        for largest, some in zip(largests, logits, strict=True):
            ctx.set(dut.i_largest, largest)
            for cycle in range(len(some) + 7):
                ctx.set(dut.i_logit, int(some[min(cycle, len(some) - 1)]))
                if cycle >= 7:
                    got.append(ctx.get(dut.o_near))
                await ctx.tick()
            want.extend((((largest - some) << LOGIT_BITS)
                         <= units * np.maximum(np.abs(some), largest)).tolist())

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(testbench)
    sim.run()
    assert got == want
    assert any(want)


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="latency_cycles must be 6 or more, not 5"):
        NearLogits(5)
