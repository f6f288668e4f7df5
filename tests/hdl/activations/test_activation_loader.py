import random

import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.arithmetic import from_bfloat16, quantise_float32, to_bfloat16
from moeaccel.config import AcceleratorConfig, preset
from moeaccel.hdl.activations.activation_loader import ActivationLoader
from tests.support.elements import float32_rows, lane_writes, monitor_lanes
from tests.support.ports import serve_reads

WIDE = AcceleratorConfig(
    name="wide", port_bytes=64, token_lanes=4, token_groups=2, max_dim=160, quantiser_lanes=8,
    max_tokens=32, read_ahead_beats=128)
EQUAL = WIDE.replace(name="equal", quantiser_lanes=16, token_groups=1, token_lanes=8)
TWICE = WIDE.replace(name="twice", quantiser_lanes=32, y_banks=2)
X_ADDRESS = 192


class Bench:
    def __init__(self, config, x, *, seed=0, stall=0.0, latency=5, narrow=False):
        self.narrow = narrow
        self.config = config
        self.dut = ActivationLoader(config)
        self.memory = bytearray(X_ADDRESS) + bytearray((to_bfloat16(x) if narrow else x).tobytes())
        self.table = {}
        self.lanes, self.bases = {}, {}
        self.rng = random.Random(seed)
        self.reads = serve_reads(
            self.dut.reader, self.memory, config, self.rng, stall=stall, latency=latency)

    async def slots(self, ctx):
        bits = (self.config.max_slots - 1).bit_length()
        while True:
            *_, address = await ctx.tick().sample(self.dut.slot_address)
            ctx.set(self.dut.slot_token, self.table.get(divmod(address, 1 << bits), 0))

    async def load(self, ctx, tokens, planes, steps, *, bank, slot_bank):
        dut = self.dut
        self.table.update({(slot_bank, slot): int(t) for slot, t in enumerate(tokens)})
        self.lanes.clear()
        self.bases.clear()
        ctx.set(dut.i_two_planes, planes - 1)
        ctx.set(dut.i_steps, steps)
        ctx.set(dut.i_narrow, self.narrow)
        ctx.set(dut.i_x_address, X_ADDRESS)
        ctx.set(dut.i_request.payload, {"bank": bank, "slot_bank": slot_bank, "count": len(tokens)})
        ctx.set(dut.i_request.valid, 1)
        await ctx.tick().until(dut.i_request.ready)
        ctx.set(dut.i_request.valid, 0)
        cycles = 0
        while not ctx.get(dut.o_done):
            await ctx.tick()
            cycles += 1
            assert cycles < 20000
        assert ctx.get(dut.o_idle)
        return cycles

    def run(self, testbench):
        sim = Simulator(self.dut)
        sim.add_clock(1e-8)
        sim.add_testbench(testbench)
        sim.add_testbench(self.slots, background=True)
        sim.add_testbench(self.reads, background=True)
        sim.add_testbench(
            monitor_lanes(self.dut, self.config, self.lanes, self.bases), background=True)
        sim.run()


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("planes", "stall"), [(1, 0.0), (2, 0.3)])
@pytest.mark.parametrize("config", [preset("tiny"), WIDE, EQUAL, TWICE])
def test_bits(config, planes, stall, narrow):
    rng = np.random.default_rng(3)
    steps = config.max_steps - 1
    x = float32_rows(rng, 16, 32 * steps)
    x[5, 7], x[5, 40], x[9, 33], x[11, 0] = np.inf, np.nan, -np.inf, np.nan
    if narrow:
        x = from_bfloat16(to_bfloat16(x))  # towards zero: an infinity stays one, and NaN does
    blocks, nonfinite = quantise_float32(x, planes)
    bench = Bench(config, x, stall=stall, narrow=narrow)

    async def testbench(ctx):
        dut = bench.dut
        for turn, count in enumerate((1, config.max_slots // planes, 2)):
            tokens = rng.permutation(16)[:count]
            bank, slot_bank = turn & 1, turn & 1 ^ 1
            ctx.set(dut.i_clear, 1)
            await ctx.tick()
            ctx.set(dut.i_clear, 0)
            await bench.load(ctx, tokens, planes, steps, bank=bank, slot_bank=slot_bank)
            assert bench.lanes == lane_writes(config, blocks, tokens, bank)
            assert bench.bases == {(bank, s): blocks.base[t] for s, t in enumerate(tokens)}
            bad = tokens[nonfinite[tokens]]
            assert ctx.get(dut.o_nonfinite) == (len(bad) > 0)
            if len(bad):
                assert ctx.get(dut.o_nonfinite_token) == bad.min()

    bench.run(testbench)


@pytest.mark.parametrize("config", [preset("tiny"), WIDE])
def test_throughput(config):
    steps = config.max_steps
    x = np.ones((8, 32 * steps), np.float32)
    bench = Bench(config, x, latency=20)
    row = 32 * steps // config.quantiser_lanes

    async def testbench(ctx):
        few, many = 2, 4
        first = await bench.load(ctx, range(few), 1, steps, bank=0, slot_bank=0)
        second = await bench.load(ctx, range(many), 1, steps, bank=1, slot_bank=0)
        # one row asked for late because the line buffer holds two: its memory latency is exposed
        # where a row is no longer than that
        fetch = 20 + 32 * steps * 4 // config.port_bytes
        assert second - first <= (many - few) * max(row, fetch + 20)
        assert first <= 2 * row + fetch + 40

    bench.run(testbench)


def test_config_is_checked():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 'tiny'"):
        ActivationLoader("tiny")
