import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.arithmetic import BLOCK, quantise_elements
from moeaccel.config import AcceleratorConfig, preset
from moeaccel.hdl.activations.hidden_buffer import HiddenBuffer
from tests.support.elements import hidden_rows, lane_writes, monitor_lanes

WIDE = AcceleratorConfig(
    name="wide", port_bytes=64, token_lanes=4, token_groups=2, max_dim=160, quantiser_lanes=8,
    read_ahead_beats=128)
SEVERAL = [preset("tiny").replace(channels=2), preset("tiny").replace(channels=32),
           WIDE.replace(channels=4)]
TWO_RESULTS = [WIDE.replace(channels=channels, results_per_cycle=2) for channels in (1, 4)]
NARROW = WIDE.replace(
    name="narrow", port_bytes=8, quantiser_lanes=1, token_groups=1, max_dim=96)


def hidden(significand, exponent):
    """Return one element as the hardware takes it."""
    return {"magnitude": abs(int(significand)), "sign": int(significand < 0),
            "exponent": int(exponent)}


class Bench:
    def __init__(self, config, seed, stall=0.0, apart=2):
        self.config = config
        self.dut = HiddenBuffer(config)
        self.rng = np.random.default_rng(seed)
        self.stall = stall
        self.apart = apart  # cycles of an element
        self.lanes, self.bases = {}, {}

    def elements(self, h, slot, index):
        """Return the elements that come with an index, as many of each core as results."""
        significand, exponent = h
        first = index * self.config.channels
        return [hidden(significand[slot, i % significand.shape[1]],
                       exponent[slot, i % significand.shape[1]])
                for i in range(first, first + self.config.channels * self.config.results_per_cycle)]

    async def send(self, ctx, h, planes, rows, bank=0):
        """Send h as tiles of ``rows`` elements, groups of slots, slots.

        Where several results come in a cycle, they do so for all of a tile or one after another.
        """
        port, cores = self.dut.i_elements, self.config.channels
        count, dim = h[0].shape
        per_group = self.config.token_lanes // planes
        for first in range(0, dim, rows):
            for group in range(0, count, per_group):
                for slot in range(group, min(count, group + per_group)):
                    full = bool(self.config.results_per_cycle > 1 and self.rng.integers(2))
                    for index in range(first // cores, (first + rows) // cores, 1 + full):
                        while self.rng.random() < self.stall:
                            await ctx.tick()
                        ctx.set(port.valid, 1)
                        ctx.set(port.payload, {
                            "slot": slot, "index": index,
                            "value": self.elements(h, slot, index), "full": full, "bank": bank,
                            "last": slot + 1 == count and cores * (index + 1 + full) == dim})
                        await ctx.tick()
                        ctx.set(port.valid, 0)
                        for _ in range(1, self.apart):
                            await ctx.tick()

    async def start(self, ctx, count, planes, steps, bank=0):
        dut = self.dut
        ctx.set(dut.i_start, 1)
        ctx.set(dut.i_count, count)
        ctx.set(dut.i_two_planes, planes - 1)
        ctx.set(dut.i_steps, steps)
        ctx.set(dut.i_bank, bank)
        await ctx.tick()
        ctx.set(dut.i_start, 0)
        ctx.set(dut.i_count, 0)
        ctx.set(dut.i_steps, 0)
        assert ctx.get(dut.o_slots_ready) == 0

    async def finish(self, ctx, blocks, count, bank=0):
        """Wait until all is ready; return the cycles to each slot."""
        dut, at = self.dut, []
        expected = lane_writes(self.config, blocks, range(count))
        for cycle in range(100000):
            ready = ctx.get(dut.o_slots_ready)
            if ready > len(at):
                at.append(cycle)
                assert ready == len(at)
                wanted = lane_writes(self.config, blocks, range(ready))
                assert {k: self.lanes.get(k) for k in wanted} == wanted
            if ready == count:
                break
            await ctx.tick()
        assert self.lanes == expected
        assert self.bases == {(bank, slot): blocks.base[slot] for slot in range(count)}
        self.lanes.clear()
        self.bases.clear()
        return at

    def run(self, testbench):
        sim = Simulator(self.dut)
        sim.add_clock(1e-8)
        sim.add_testbench(
            monitor_lanes(self.dut, self.config, self.lanes, self.bases), background=True)
        sim.add_testbench(testbench)
        sim.run()


@pytest.mark.parametrize(("stall", "apart"), [(0.0, 2), (0.3, 2), (0.0, 1)])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("config", [preset("tiny"), WIDE, NARROW, *SEVERAL, *TWO_RESULTS])
def test_bits(config, planes, stall, apart):
    bench = Bench(config, planes, stall, apart)
    most = config.max_slots // planes

    async def testbench(ctx):
        for turn, count in enumerate((most, 1, max(1, most - 1), most)):
            steps = config.max_steps - turn % 2
            rows = hidden_rows(bench.rng, 6, BLOCK * steps)
            chosen = bench.rng.permutation(np.arange(8) % 6)[:count]
            h = tuple(part[chosen] for part in rows)
            blocks = quantise_elements(*h, planes)
            await bench.send(ctx, h, planes, 2 * config.channels if config.channels < 32 else 32)
            await bench.start(ctx, count, planes, steps)
            await bench.finish(ctx, blocks, count)

    bench.run(testbench)


@pytest.mark.parametrize("config", [preset("tiny"), WIDE, *SEVERAL])
def test_start_before_the_last_element(config):
    bench = Bench(config, 5)
    count, steps = config.max_slots, config.max_steps

    async def testbench(ctx):
        dut = bench.dut
        for wait in (0, 1, 5, 200 // config.channels):
            h = hidden_rows(bench.rng, count, BLOCK * steps)
            indices = BLOCK * steps // config.channels
            part = indices * count - wait
            sent = 0
            port = dut.i_elements
            order = [(slot, index) for index in range(indices) for slot in range(count)]
            for slot, index in order:
                ctx.set(dut.i_start, sent == part)
                ctx.set(dut.i_count, count)
                ctx.set(dut.i_two_planes, 0)
                ctx.set(dut.i_steps, steps)
                ctx.set(port.valid, 1)
                ctx.set(port.payload, {
                    "slot": slot, "index": index,
                    "value": bench.elements(h, slot, index),
                    "last": sent + 1 == len(order)})
                await ctx.tick()
                sent += 1
            ctx.set(port.valid, 0)
            ctx.set(dut.i_start, wait == 0)
            assert wait == 0 or ctx.get(dut.o_slots_ready) == 0
            if wait == 0:
                await ctx.tick()
            ctx.set(dut.i_start, 0)
            at = await bench.finish(ctx, quantise_elements(*h, 1), count)
            row = BLOCK * steps // config.quantiser_lanes
            assert at[0] <= row + dut.latency_cycles
            assert np.diff(at).tolist() == [row] * (count - 1)

    bench.run(testbench)


def test_elements_of_the_next_pass_come_while_h_is_quantised():
    config = WIDE.replace(y_banks=2, hidden_banks=2)
    bench = Bench(config, 6, apart=1)
    count, steps = config.max_slots, config.max_steps
    passes = [hidden_rows(bench.rng, count, BLOCK * steps) for _ in range(4)]
    sent = []

    async def testbench(ctx):
        for turn, h in enumerate(passes):
            while len(sent) <= turn:
                await ctx.tick()
            await bench.start(ctx, count, 1, steps, turn % 2)
            await bench.finish(ctx, quantise_elements(*h, 1), count, turn % 2)

    async def elements(ctx):
        for turn, h in enumerate(passes):
            await bench.send(ctx, h, 1, 2, turn % 2)
            sent.append(turn)
            await ctx.tick().repeat(20)  # it is started before more comes

    sim = Simulator(bench.dut)
    sim.add_clock(1e-8)
    sim.add_testbench(
        monitor_lanes(bench.dut, config, bench.lanes, bench.bases), background=True)
    sim.add_testbench(elements, background=True)
    sim.add_testbench(testbench)
    sim.run()


def test_config_is_checked():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 'tiny'"):
        HiddenBuffer("tiny")
