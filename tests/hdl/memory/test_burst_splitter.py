"""BurstSplitter: bursts lie in blocks and make up the request, whatever its length."""

import random

import pytest
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl import layouts
from moeaccel.hdl.memory.burst_splitter import BurstSplitter

TINY = PRESETS["tiny"]
MANY = TINY.replace(name="many pairs", max_assignments=1 << 17, max_tokens=1 << 16,
                    token_groups=64)


def run(config, testbench):
    dut = BurstSplitter(config)
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)

    async def started(ctx):
        await testbench(ctx, dut)

    simulator.add_testbench(started)
    simulator.run()


async def request(ctx, dut, beat, beats):
    ctx.set(dut.request.p, {"address": beat * dut._config.port_bytes, "beats": beats})
    ctx.set(dut.request.valid, 1)
    await ctx.tick().until(dut.request.ready)
    ctx.set(dut.request.valid, 0)


async def bursts(ctx, dut, stall=lambda: False):
    """Take bursts until the last of the request; none may be taken in the cycle after it."""
    await ctx.tick()
    found = []
    while not found or not found[-1].last:
        ctx.set(dut.burst.ready, not stall())
        _, _, valid, ready, payload = await ctx.tick().sample(
            dut.burst.valid, dut.burst.ready, dut.burst.p)
        assert valid
        if ready:
            found.append(payload)
    ctx.set(dut.burst.ready, 0)
    return found


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("stalls", [0.0, 0.5])
def test_requests_become_bursts(preset, stalls):
    """Each begins where the one before ended, and all but the last end with their block."""
    config = PRESETS[preset]
    rng = random.Random(1)
    most, longest = config.max_burst_beats, layouts.most_beats(config)

    async def testbench(ctx, dut):
        for beats in [1, most, longest, *(rng.randint(1, longest) for _ in range(20))]:
            first = rng.randrange(1 << 12)
            await request(ctx, dut, first, beats)
            at = first
            for burst in await bursts(ctx, dut, lambda: rng.random() < stalls):
                assert burst.block * most + burst.start == at
                at = burst.block * most + burst.end + 1
                assert burst.last or burst.end == most - 1
            assert at == first + beats

    run(config, testbench)


def test_the_longest_request():
    """65,536 beats, one more than 16 bits count, from the middle of a burst on."""
    most = layouts.most_beats(MANY)

    async def testbench(ctx, dut):
        await request(ctx, dut, 3, most)
        found = await bursts(ctx, dut)
        beats = [burst.end - burst.start + 1 for burst in found]
        assert sum(beats) == most == 1 << 16 and len(beats) == most // MANY.max_burst_beats + 1
        assert [burst.block for burst in found] == list(range(len(beats)))

    run(MANY, testbench)


def test_drop_forgets_the_request():
    async def testbench(ctx, dut):
        await request(ctx, dut, 5, 100)
        await ctx.tick()
        assert ctx.get(dut.burst.valid)
        ctx.set(dut.drop, 1)
        ctx.set(dut.request.valid, 1)
        await ctx.tick().repeat(3)
        assert not ctx.get(dut.burst.valid)
        assert not ctx.get(dut.request.ready)
        ctx.set(dut.request.valid, 0)
        ctx.set(dut.drop, 0)
        await request(ctx, dut, 7, 1)
        (burst,) = await bursts(ctx, dut)
        assert (burst.start, burst.end, burst.last) == (7, 7, 1)

    run(TINY, testbench)
