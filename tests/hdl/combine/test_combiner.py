"""Row sums and combiner against moeaccel.arithmetic: sums, workspace, float32, counts."""

import random

import numpy as np
import pytest
from amaranth import Cat, Elaboratable, Module, Signal
from amaranth.sim import Simulator

from moeaccel.arithmetic import (
    BFLOAT16_BITS,
    ELEMENT_BITS,
    InternalFloat,
    from_bfloat16,
    grid_to_float32,
    normalise,
    weighted_output,
)
from moeaccel.config import PRESETS
from moeaccel.hdl import layouts
from moeaccel.hdl.combine.combiner import Combiner
from moeaccel.hdl.combine.row_sums import RowSums

Y, WORKSPACE = 0x10000, 0x40000
GRID = -28


class Joined(Elaboratable):
    """The combiner and the row sums of every core."""

    def __init__(self, config):
        self.combiner = Combiner(config)
        self.lookup = Signal(layouts.slot_address_bits(config))  # of the elements
        self.weight = Signal(layouts.internal_float())
        self.cores = [RowSums(config) for _ in range(config.channels)]

    def elaborate(self, platform):
        m = Module()
        m.submodules.combiner = combiner = self.combiner
        for c, core in enumerate(self.cores):
            m.submodules[f"core{c}"] = core
            m.d.comb += [
                core.i_grid_exponent.eq(combiner.i_grid_exponent),
                core.i_weight.eq(self.weight),
                core.i_draining.eq(combiner.o_draining),
                core.r_address.eq(combiner.r_address),
                core.w_address.eq(combiner.w_address),
            ]
            for lane, at in enumerate(range(c, len(combiner.r_data), len(self.cores))):
                m.d.comb += [
                    combiner.r_data[at].eq(core.r_data[lane]),
                    core.w_en[lane].eq(combiner.w_en[at]),
                    core.w_data[lane].eq(combiner.w_data[at]),
                ]
        return m


class Bench:
    """A combiner with a slot table and a memory that answers when it likes."""

    def __init__(self, config, seed, *, stalls=True):
        self.config, self.joined = config, Joined(config)
        self.dut, self.cores = self.joined.combiner, self.joined.cores
        self.rng = random.Random(seed)
        self.stalls = stalls
        self.acknowledges = True
        self.memory = bytearray(1 << 20)
        self.table = {}
        self.overflows = self.underflows = 0

    def pause(self):
        return self.stalls and self.rng.random() < 0.3

    async def slots(self, ctx):
        dut = self.dut
        while True:
            *_, address, lookup = await ctx.tick().sample(dut.slot_address, self.joined.lookup)
            ctx.set(dut.slot_data, self.table.get(address, {}))
            ctx.set(self.joined.weight, self.table.get(lookup, {}).get("weight", {}))

    async def reads(self, ctx):
        reader, port = self.dut.reader, self.config.port_bytes
        while True:
            ctx.set(reader.request.ready, not self.pause())
            *_, go, p = await ctx.tick().sample(
                reader.request.valid & reader.request.ready, reader.request.p)
            ctx.set(reader.request.ready, 0)
            for i in range(p.beats if go else 0):
                while self.pause():
                    await ctx.tick()
                at = p.address + i * port
                ctx.set(reader.valid, 1)
                ctx.set(reader.last, i + 1 == p.beats)
                ctx.set(reader.data, int.from_bytes(self.memory[at : at + port], "little"))
                await ctx.tick()
                ctx.set(reader.valid, 0)

    async def writes(self, ctx):
        """Take rows as they come; ``done`` when nothing that was asked for is left."""
        writer, port = self.dut.writer, self.config.port_bytes
        asked, beat, owed = [], 0, False
        while True:
            done = owed and not asked and self.acknowledges and not self.pause()
            ctx.set(writer.request.ready, len(asked) < 2 and not self.pause())
            ctx.set(writer.data.ready, bool(asked) and not self.pause())
            ctx.set(writer.done, done)
            *_, go, p, comes, value = await ctx.tick().sample(
                writer.request.valid & writer.request.ready, writer.request.p,
                writer.data.valid & writer.data.ready, writer.data.payload)
            if comes:
                address, beats = asked[0]
                at = address + beat * port
                self.memory[at : at + port] = value.to_bytes(port, "little")
                beat += 1
                if beat == beats:
                    asked.pop(0)
                    beat = 0
            if go:
                asked.append((p.address, p.beats))
            owed = go or (owed and not done)

    async def count(self, ctx):
        while True:
            *_, over, under = await ctx.tick().sample(
                Cat(core.o_overflow for core in self.cores),
                Cat(core.o_underflow for core in self.cores))
            self.overflows += over.bit_count()
            self.underflows += under.bit_count()

    async def elements(self, ctx, values, *, bank, fresh, y_bank=0):
        """Send one pass: ``values`` (slots, rows)."""
        slots, rows = values.mantissa.shape
        own = rows // len(self.cores)
        for slot in range(slots):
            for row in range(own):
                while self.pause():
                    await ctx.tick()
                ctx.set(self.joined.lookup, slot | bank * self.config.max_slots)
                for c, core in enumerate(self.cores):
                    at = row * len(self.cores) + c
                    ctx.set(core.i_valid, 1)
                    ctx.set(core.i_element, {"slot": slot, "row": row, "value": {
                        "mantissa": int(values.mantissa[slot, at]),
                        "exponent": int(values.exponent[slot, at])}})
                    ctx.set(core.i_fresh, fresh)
                    ctx.set(core.i_bank, y_bank)
                    ctx.set(core.i_last, (slot, row) == (slots - 1, own - 1))
                await ctx.tick()
                for core in self.cores:
                    ctx.set(core.i_valid, 0)
        await ctx.tick().until(self.cores[0].o_pass_done)

    async def drain(self, ctx, *, bank, count, y_bank=0):
        dut = self.dut
        ctx.set(dut.i_drain.p, {"slot_bank": bank, "count": count, "y_bank": y_bank})
        ctx.set(dut.i_drain.valid, 1)
        await ctx.tick().until(dut.i_drain.ready)
        ctx.set(dut.i_drain.valid, 0)
        await ctx.tick().until(dut.o_drained)

    def row(self, token, rows, *, narrow=False):
        size = 2 if narrow else 4
        at = Y + token * rows * size
        raw = bytes(self.memory[at : at + size * rows])
        return from_bfloat16(np.frombuffer(raw, "<u2")) if narrow else np.frombuffer(raw, "<f4")

    def run(self, scenario):
        sim = Simulator(self.joined)
        sim.add_clock(1e-6)
        for process in (self.slots, self.reads, self.writes, self.count):
            sim.add_testbench(process, background=True)
        sim.add_testbench(scenario)
        sim.run()


def draw(rng, shape, low=-30, high=-10):
    return normalise(rng.integers(-(1 << 40), 1 << 40, shape), rng.integers(low, high, shape) - 24)


@pytest.mark.parametrize(("name", "changes"), [
    ("tiny", {}), ("small", {}), ("tiny", {"channels": 2}), ("tiny", {"channels": 8}),
    ("small", {"channels": 4}), ("small", {"channels": 32}),
    ("tiny", {"quantiser_lanes": 4}), ("tiny", {"quantiser_lanes": 1, "y_banks": 2}),
    ("small", {"quantiser_lanes": 32, "channels": 2, "y_banks": 2})])
@pytest.mark.parametrize(("seed", "narrow"), [(1, False), (3, True)])
def test_sums_travel_through_the_workspace_and_end_as_floats(name, changes, seed, narrow):
    config = PRESETS[name].replace(**changes)
    bench = Bench(config, seed)
    rng = np.random.default_rng(seed)
    rows, steps = 64, 2
    # Three sets of tokens; tokens 0 and 3 appear in several, token 3 twice in one.
    sets = [[0, 1, 3], [3, 3, 0], [0, 2]]
    passes = [2, 1, 1]
    touches = [t for tokens in sets for t in tokens]
    total = np.zeros((4, rows), np.int64)
    overflows, underflows = [], []

    async def scenario(ctx):
        dut = bench.dut
        ctx.set(dut.i_grid_exponent, GRID)
        ctx.set(dut.i_steps_out, steps)
        ctx.set(dut.i_narrow, narrow)
        ctx.set(dut.i_y_address, Y)
        ctx.set(dut.i_workspace_address, WORKSPACE)
        ctx.set(dut.i_zero.payload, 3)  # overwritten by the sums of token 3 later
        ctx.set(dut.i_zero.valid, 1)
        await ctx.tick().until(dut.i_zero.ready)
        ctx.set(dut.i_zero.valid, 0)
        await ctx.tick().until(dut.o_idle)
        seen, bank = [], 0
        for turn, (tokens, repeats) in enumerate(zip(sets, passes, strict=True)):
            y_bank = turn % config.y_banks
            firsts = [t not in seen and t not in tokens[:i] for i, t in enumerate(tokens)]
            for repeat in range(repeats):
                bank ^= 1
                weights = draw(rng, len(tokens), -4, 2)
                for slot, t in enumerate(tokens):
                    later = touches[len(seen) + slot + 1 :]
                    bench.table[slot | bank * config.max_slots] = {
                        "token": t, "first": firsts[slot], "last": t not in later,
                        "weight": {"mantissa": int(weights.mantissa[slot]),
                                   "exponent": int(weights.exponent[slot])}}
                values = draw(rng, (len(tokens), rows))
                term, overflow, underflow = weighted_output(values, InternalFloat(
                    weights.mantissa[:, None], weights.exponent[:, None]), GRID)
                np.add.at(total, tokens, term)
                overflows.append(int(overflow.sum()))
                underflows.append(int(underflow.sum()))
                await bench.elements(ctx, values, bank=bank, fresh=repeat == 0, y_bank=y_bank)
            await bench.drain(ctx, bank=bank, count=len(tokens), y_bank=y_bank)
            seen += tokens

    bench.run(scenario)
    expected = grid_to_float32(total, GRID, BFLOAT16_BITS if narrow else ELEMENT_BITS)
    for token in range(4):
        assert (bench.row(token, rows, narrow=narrow) == expected[token]).all()
    assert bench.overflows == sum(overflows)
    assert bench.underflows == sum(underflows)


@pytest.mark.parametrize(("name", "channels"), [("tiny", 1), ("small", 4)])
def test_a_row_of_zeros_leaves_the_buffer_to_the_cores(name, channels):
    """A pass comes while memory keeps the row's acknowledgement; the drain waits for it."""
    config = PRESETS[name].replace(channels=channels)
    bench = Bench(config, 3)
    rng = np.random.default_rng(3)
    rows, tokens = 64, [0, 2]
    weights, values = draw(rng, len(tokens), -4, 2), draw(rng, (len(tokens), rows))
    term, *_ = weighted_output(
        values, InternalFloat(weights.mantissa[:, None], weights.exponent[:, None]), GRID)
    for slot, token in enumerate(tokens):
        bench.table[slot] = {"token": token, "first": 1, "last": 1, "weight": {
            "mantissa": int(weights.mantissa[slot]), "exponent": int(weights.exponent[slot])}}
    bench.memory[Y : Y + 3 * 4 * rows] = b"\xee" * (3 * 4 * rows)
    bench.acknowledges = False

    async def scenario(ctx):
        dut = bench.dut
        ctx.set(dut.i_grid_exponent, GRID)
        ctx.set(dut.i_steps_out, rows // 32)
        ctx.set(dut.i_y_address, Y)
        ctx.set(dut.i_zero.payload, 1)
        ctx.set(dut.i_zero.valid, 1)
        await ctx.tick().until(dut.i_zero.ready)
        ctx.set(dut.i_zero.valid, 0)
        for _ in range(300):
            assert not ctx.get(dut.o_draining) and not ctx.get(dut.o_idle)
            await ctx.tick()
        assert not bench.row(1, rows).any()
        await bench.elements(ctx, values, bank=0, fresh=1)
        ctx.set(dut.i_drain.p, {"slot_bank": 0, "count": len(tokens)})
        ctx.set(dut.i_drain.valid, 1)
        for _ in range(100):
            await ctx.tick()
            assert not ctx.get(dut.i_drain.ready)
        bench.acknowledges = True
        await bench.drain(ctx, bank=0, count=len(tokens))

    bench.run(scenario)
    for token, sums in zip(tokens, term, strict=True):
        assert (bench.row(token, rows) == grid_to_float32(sums, GRID)).all()
    assert not bench.row(1, rows).any()


@pytest.mark.parametrize("narrow", [False, True])
def test_rounding_extremes_overflow_underflow_and_throughput(narrow):
    config = PRESETS["tiny"]
    bench = Bench(config, 5, stalls=False)
    rng = np.random.default_rng(5)
    rows = 256
    values = draw(rng, (1, rows), -80, 40)
    # Exact ties of the rounding, zero, the largest term, and one beyond it.
    for i, (m, e) in enumerate([(65536, -29), (98304, -29), (-98304, -29), (65536, -45),
                                (0, 0), (131071, -2), (65536, -1), (-65536, 16), (-131071, -2),
                                (65537, -45), (65536, -46), (-65536, -200), (65536, 1500),
                                (-65537, -45), (-65536, -45), (131071, -46), (65536, -2048),
                                # Ties of bfloat16, to even and away from it, and next to them.
                                (65536 + 256, -20), (65536 + 768, -20), (65536 + 257, -20),
                                (-131072 + 256, -20), (131071, -20)]):
        values.mantissa[0, i], values.exponent[0, i] = m, e
    weight = InternalFloat(np.array([65536]), np.array([-16]))
    term, overflow, underflow = weighted_output(values, weight, GRID)
    cycles = []

    async def scenario(ctx):
        dut = bench.dut
        ctx.set(dut.i_grid_exponent, GRID)
        ctx.set(dut.i_steps_out, rows // 32)
        ctx.set(dut.i_y_address, Y)
        ctx.set(dut.i_narrow, narrow)
        bench.table[0] = {"token": 0, "first": 1, "last": 1,
                          "weight": {"mantissa": 65536, "exponent": -16}}
        await bench.elements(ctx, values, bank=0, fresh=1)
        bench.stalls = False
        begin = [0]
        ctx.set(dut.i_drain.p, {"slot_bank": 0, "count": 1})
        ctx.set(dut.i_drain.valid, 1)
        await ctx.tick()
        ctx.set(dut.i_drain.valid, 0)
        while not ctx.get(dut.o_drained):
            begin[0] += 1
            await ctx.tick()
        cycles.append(begin[0])

    bench.run(scenario)
    bits = BFLOAT16_BITS if narrow else ELEMENT_BITS
    assert (bench.row(0, rows, narrow=narrow) == grid_to_float32(term, GRID, bits)[0]).all()
    assert bench.overflows == overflow.sum() > 0
    assert bench.underflows == underflow.sum() > 0
    # Ties at half the grid's unit, the nearest beyond them, zero: what counts and what does not.
    assert underflow[0, [3, 4, 9, 10, 11, 13, 14, 15, 16]].tolist() == [1, 0, 0, 1, 1, 0, 1, 1, 1]
    assert cycles[0] <= rows // config.quantiser_lanes + 40  # a word per cycle


def test_a_row_leaves_while_the_one_before_is_not_acknowledged():
    """But what a token's second slot reads is what its first one wrote."""
    config = PRESETS["tiny"]
    bench = Bench(config, 7, stalls=False)
    rng = np.random.default_rng(7)
    rows, tokens = 64, [0, 1, 1]
    weights, values = draw(rng, len(tokens), -4, 2), draw(rng, (len(tokens), rows))
    term, *_ = weighted_output(
        values, InternalFloat(weights.mantissa[:, None], weights.exponent[:, None]), GRID)
    for slot, token in enumerate(tokens):
        bench.table[slot] = {
            "token": token, "first": slot < 2, "last": slot != 1, "weight": {
                "mantissa": int(weights.mantissa[slot]), "exponent": int(weights.exponent[slot])}}
    bench.acknowledges = False

    async def scenario(ctx):
        dut = bench.dut
        ctx.set(dut.i_grid_exponent, GRID)
        ctx.set(dut.i_steps_out, rows // 32)
        ctx.set(dut.i_y_address, Y)
        ctx.set(dut.i_workspace_address, WORKSPACE)
        await bench.elements(ctx, values, bank=0, fresh=1)
        ctx.set(dut.i_drain.p, {"slot_bank": 0, "count": len(tokens)})
        ctx.set(dut.i_drain.valid, 1)
        await ctx.tick()
        ctx.set(dut.i_drain.valid, 0)
        for _ in range(600):
            assert not ctx.get(dut.reader.request.valid) and not ctx.get(dut.o_drained)
            await ctx.tick()
        at = WORKSPACE + rows * 8
        partial = np.frombuffer(bytes(bench.memory[at : at + 8 * rows]), "<i8")
        assert (partial == term[1]).all()
        bench.acknowledges = True
        await ctx.tick().until(dut.o_drained)

    bench.run(scenario)
    for token, sums in ((0, term[0]), (1, term[1] + term[2])):
        assert (bench.row(token, rows) == grid_to_float32(sums, GRID)).all()
