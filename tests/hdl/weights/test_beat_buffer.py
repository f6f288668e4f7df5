"""BeatBuffer: what was brought comes out again, ahead of what memory brings."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.cycles.weight_streamer import HELD_CYCLES
from moeaccel.hdl.weights.beat_buffer import BeatBuffer

CONFIG = PRESETS["tiny"].replace(name="buffered", buffer_slots=3, buffer_beats=32)


def run(parts, *, stalls=(0.0, 0.0, 0.0), seed=0):
    """Serve parts, (fill, held, place, beats); return the cycles in which beats come out.

    Beats of memory count up from 1; what is stored is followed here.
    """
    dut = BeatBuffer(CONFIG)
    ask, bring, take = (np.random.default_rng((seed, i)) for i in range(3))
    stored, expected, total = {}, [], 0
    for fill, held, place, beats in parts:
        expected += [stored[place + i] for i in range(held)]
        for i in range(beats):
            total += 1
            if fill:
                stored[place + i] = total
            else:
                expected.append(total)
    found, cycles = [], []

    async def request(ctx):
        for fill, held, place, beats in parts:
            while ask.random() < stalls[0]:
                await ctx.tick()
            for name, value in (("fill", fill), ("held", held), ("place", place), ("beats", beats)):
                ctx.set(dut.i_part.p[name], int(value))
            ctx.set(dut.i_part.valid, 1)
            await ctx.tick().until(dut.i_part.ready)
            ctx.set(dut.i_part.valid, 0)

    async def memory(ctx):
        for value in range(1, total + 1):
            while bring.random() < stalls[1]:
                await ctx.tick()
            ctx.set(dut.i_beat.payload, value)
            ctx.set(dut.i_beat.valid, 1)
            await ctx.tick().until(dut.i_beat.ready)
            ctx.set(dut.i_beat.valid, 0)
        while len(found) < len(expected):
            await ctx.tick()
        await ctx.tick().repeat(3)
        assert ctx.get(dut.o_idle)

    async def collect(ctx):
        cycle = 0
        while True:
            ready = take.random() >= stalls[2]
            ctx.set(dut.o_beat.ready, int(ready))
            _, _, valid, value = await ctx.tick().sample(dut.o_beat.valid, dut.o_beat.payload)
            if valid and ready:
                found.append(value)
                cycles.append(cycle)
            cycle += 1

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    for one, background in ((request, False), (memory, False), (collect, True)):
        simulator.add_testbench(one, background=background)
    simulator.run_until(1e-3)
    assert found == expected
    return cycles


def draw(rng, count):
    """Return fills and uses; a slot has as much as was brought there."""
    filled, parts = {}, []
    for _ in range(count):
        slot = int(rng.integers(CONFIG.buffer_slots))
        there = filled.get(slot, 0)
        if rng.random() < 0.4 and there < CONFIG.buffer_beats:
            beats = int(rng.integers(1, CONFIG.buffer_beats - there + 1))
            parts.append((1, 0, slot * CONFIG.buffer_beats + there, beats))
            filled[slot] = there + beats
        else:
            held = int(rng.integers(there + 1))
            begin = int(rng.integers(there - held + 1))
            beats = int(rng.integers(0 if held else 1, 40))
            parts.append((0, held, slot * CONFIG.buffer_beats + begin, beats))
    return parts


@pytest.mark.parametrize("stalls", [
    (0.0, 0.0, 0.0), (0.9, 0.0, 0.0), (0.0, 0.7, 0.0), (0.0, 0.0, 0.7), (0.5, 0.5, 0.5)])
def test_random_requests(stalls):
    run(draw(np.random.default_rng(int(10 * sum(stalls))), 25), stalls=stalls)


def test_rates():
    """A beat a cycle, from here and from memory; one cycle without between requests of memory."""
    cycles = run([(1, 0, 32, 20), (0, 20, 32, 30), (0, 0, 0, 10), (0, 20, 32, 0)])
    gaps = np.diff(cycles)
    assert np.flatnonzero(gaps != 1).tolist() == [49, 59]
    assert gaps[[49, 59]].tolist() == [2, 3]


def test_latency():
    """As the cycle model has it, which counts from the port, two cycles ahead of here."""
    dut, waited = BeatBuffer(CONFIG), []

    async def bench(ctx):
        ctx.set(dut.i_part.p.held, 4)
        ctx.set(dut.i_part.valid, 1)
        await ctx.tick()
        ctx.set(dut.i_part.valid, 0)
        _, _, *ticks = await ctx.tick().sample(dut.o_beat.valid)
        waited.append(1)
        while not ticks[0]:
            _, _, *ticks = await ctx.tick().sample(dut.o_beat.valid)
            waited[0] += 1

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.run()
    assert waited == [HELD_CYCLES + 2]


def test_constructor():
    with pytest.raises(ValueError, match="must have buffer_slots, and 'tiny' has none"):
        BeatBuffer(PRESETS["tiny"])
