"""The parts of ROUTE by themselves; tests/system/test_routing.py has all of it."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.config import preset
from moeaccel.hdl.control.field_checks import FieldChecks
from moeaccel.hdl.router.pair_writer import PairWriter
from moeaccel.hdl.router.route_unit import RouteUnit
from moeaccel.hdl.router.router_checks import RouterChecks
from moeaccel.hdl.router.to_fixed import ToFixed
from moeaccel.hdl.router.word_reader import WordReader
from moeaccel.interface.commands import ROUTER, encode, field_of
from moeaccel.router.choices import MODES
from moeaccel.router.descriptor import descriptor
from moeaccel.router.settings import RouterSettings
from moeaccel.router.tables import LOGIT_BITS, fixed
from tests.support.router import form_of

CONFIG = preset("tiny").replace(router=("softmax",))


def simulate(dut, testbench, *more):
    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(testbench)
    for one in more:
        sim.add_testbench(one, background=True)
    sim.run()


def test_floats_become_fixed():
    rng = np.random.default_rng(1)
    values = np.concatenate([
        rng.standard_normal(400) * 2.0**rng.integers(-30, 14, 400),
        [0, -0.0, 2.0**-21, 3 * 2.0**-21, -(2.0**-21), 2.0**-22, 1e-40, -2048, 2048, -2048.001,
         np.nextafter(np.float32(2048), np.float32(0)), np.inf, -np.inf, np.nan, 1e38],
        (rng.integers(-(1 << 20), 1 << 20, 100) * 2 + 1) * 2.0**-21]).astype(np.float32)
    want, beyond = fixed(values, LOGIT_BITS)
    dut, got = ToFixed(), []

    async def testbench(ctx):
        for cycle in range(len(values) + dut.LATENCY_CYCLES):
            ctx.set(dut.i_valid, cycle < len(values))
            if cycle < len(values):
                ctx.set(dut.i_float, int(values.view(np.uint32)[cycle]))
            assert ctx.get(dut.o_valid) == (cycle >= dut.LATENCY_CYCLES)
            if ctx.get(dut.o_valid):
                logit = ctx.get(dut.o_logit)
                got.append((logit.value, logit.beyond, ctx.get(dut.o_nonfinite)))
            await ctx.tick()

    simulate(dut, testbench)
    assert got == list(zip(want.tolist(), beyond.tolist(), (~np.isfinite(values)).tolist(),
                           strict=True))


@pytest.mark.parametrize("port_bytes", [8, 64])
def test_words_come_in_order_and_fit(port_bytes):
    """Memory answers whenever it likes; the reader never asks for more than it has room for."""
    rng = np.random.default_rng(2)
    config = CONFIG.replace(port_bytes=port_bytes, quantiser_lanes=port_bytes // 4)
    dut = WordReader(config, count_bits=8)
    words = rng.integers(0, 1 << 32, 16 * 40)
    beats = words.astype("<u4").view(np.uint8).reshape(-1, port_bytes)
    asked, got = [], []

    async def memory(ctx):
        while True:
            ctx.set(dut.reader.request.ready, int(rng.integers(2)))
            ctx.set(dut.reader.valid, 0)
            if asked and rng.random() < 0.6:
                ctx.set(dut.reader.valid, 1)
                ctx.set(dut.reader.data, int.from_bytes(beats[asked.pop(0)].tobytes(), "little"))
            *_, valid, ready, request = await ctx.tick().sample(
                dut.reader.request.valid, dut.reader.request.ready, dut.reader.request.payload)
            if valid and ready:
                first = (request.address - 0x1000) // port_bytes
                asked.extend(range(first, first + request.beats))

    async def testbench(ctx):
        ctx.set(dut.i_address, 0x1000)
        ctx.set(dut.i_count, 40)
        ctx.set(dut.i_start, 1)
        assert ctx.get(dut.o_idle)
        await ctx.tick()
        ctx.set(dut.i_start, 0)
        while len(got) < len(words):
            ready = int(rng.random() < (0.1 if len(got) < 100 else 0.9))
            ctx.set(dut.o_word.ready, ready)
            assert not ctx.get(dut.o_idle)
            *_, valid, word = await ctx.tick().sample(dut.o_word.valid, dut.o_word.payload)
            if valid and ready:
                got.append(word)
        assert ctx.get(dut.o_idle)

    simulate(dut, testbench, memory)
    assert got == words.tolist()


@pytest.mark.parametrize("name", ["small", "wide512"])
def test_a_row_that_is_given_has_room(name):
    """All its beats may come before the first word is taken; a read behind it is as ever."""
    rng = np.random.default_rng(4)
    config = preset(name)
    port_bytes, experts = config.port_bytes, config.max_experts
    dut = WordReader(config, count_bits=8)
    words = rng.integers(0, 1 << 32, experts + 16)
    beats = [int.from_bytes(beat.tobytes(), "little") for beat in
             words.astype("<u4").view(np.uint8).reshape(-1, port_bytes)]
    given, got = 4 * experts // port_bytes, []

    async def take(ctx, count):
        ctx.set(dut.o_word.ready, 1)
        while len(got) < count:
            assert not ctx.get(dut.o_idle)
            *_, valid, word = await ctx.tick().sample(dut.o_word.valid, dut.o_word.payload)
            if valid:
                got.append(word)
        ctx.set(dut.o_word.ready, 0)
        assert ctx.get(dut.o_idle)

    async def testbench(ctx):
        for beat in beats[:given]:
            ctx.set(dut.i_beat, {"valid": 1, "data": beat})
            await ctx.tick()
        ctx.set(dut.i_beat.valid, 0)
        await ctx.tick().repeat(3)
        await take(ctx, experts)
        ctx.set(dut.i_count, 1)
        ctx.set(dut.i_start, 1)
        ctx.set(dut.reader.request.ready, 1)
        await ctx.tick()
        ctx.set(dut.i_start, 0)
        assert ctx.get(dut.reader.request.valid)
        await ctx.tick()
        assert not ctx.get(dut.reader.request.valid)
        for beat in beats[given:]:
            ctx.set(dut.reader.valid, 1)
            ctx.set(dut.reader.data, beat)
            await ctx.tick()
        ctx.set(dut.reader.valid, 0)
        await take(ctx, experts + 16)

    simulate(dut, testbench)
    assert got == words.tolist()


@pytest.mark.parametrize(("tokens", "top_k", "shared"), [
    (1, 1, 0), (4, 4, 0), (5, 7, 0), (2, 8, 0), (2, 6, 2), (5, 3, 1), (1, 1, 15)])
def test_pairs_are_written_and_filled_up(tokens, top_k, shared):
    rng = np.random.default_rng(3)
    dut = PairWriter(CONFIG)
    ids = rng.integers(-1, 16, tokens * top_k)
    weights = rng.integers(0, 1 << 32, tokens * top_k)
    memory = {}

    async def port(ctx):
        writer, left, address = dut.writer, 0, 0
        while True:
            ready = int(rng.random() < 0.6)
            ctx.set(writer.request.ready, int(not left))
            ctx.set(writer.data.ready, ready)
            *_, asked, request, given, value = await ctx.tick().sample(
                writer.request.valid, writer.request.payload, writer.data.valid,
                writer.data.payload)
            if not left and asked:
                left, address = request.beats, request.address
            elif left and given and ready:
                memory[address] = value
                left, address = left - 1, address + 8
                ctx.set(writer.done, int(not left))
                if not left:
                    await ctx.tick()
                    ctx.set(writer.done, 0)

    async def testbench(ctx):
        ctx.set(dut.i_tokens, tokens)
        ctx.set(dut.i_shared, shared)
        ctx.set(dut.i_experts, 16)
        ctx.set(dut.i_ids_address, 0x100000)
        ctx.set(dut.i_weights_address, 0x200000)
        ctx.set(dut.i_start, 1)
        await ctx.tick()
        ctx.set(dut.i_start, 0)
        for i in range(tokens * top_k):
            while rng.random() < 0.3:
                ctx.set(dut.i_pair.valid, 0)
                await ctx.tick()
            ctx.set(dut.i_pair.valid, 1)
            ctx.set(dut.i_pair.payload, {
                "id": max(int(ids[i]), 0), "some": int(ids[i] >= 0), "weight": int(weights[i]),
                "last": int(i % top_k == top_k - 1)})
            await ctx.tick().until(dut.i_pair.ready)
        ctx.set(dut.i_pair.valid, 0)
        await ctx.tick().until(dut.o_idle)

    simulate(dut, testbench, port)
    ids = np.concatenate(
        [ids.reshape(tokens, top_k), np.tile(16 + np.arange(shared), (tokens, 1))], 1).reshape(-1)
    weights = np.concatenate(
        [weights.reshape(tokens, top_k), np.full((tokens, shared), 0x3F800000)], 1).reshape(-1)
    pairs = tokens * (top_k + shared)
    whole = -(-pairs // 16) * 16
    for base, values, rest in ((0x100000, ids, -1), (0x200000, weights, 0)):
        want = np.concatenate([values, np.full(whole - pairs, rest)]).astype(np.uint32)
        found = np.array([memory.pop(base + 8 * i) for i in range(whole // 2)], "<u8")
        assert found.view(np.uint32).tolist() == want.tolist()
    assert not memory


def test_groups_are_those_of_the_experts():
    dut = RouterChecks(CONFIG)
    form = form_of(RouterSettings(experts=12, top_k=4, groups=4, keep_groups=2))

    async def testbench(ctx):
        for groups, changes, bad_top_k, bad in (
                (4, {}, False, None), (3, {}, False, "groups"), (4, {"top_k": 7}, True, None),
                (4, {"keep_groups": 5}, False, "keep_groups"), (4, {"top_k": 6}, False, None),
                (4, {"top_k": 0}, True, None),
                (4, {"experts": 13}, False, "groups")):
            ctx.set(dut.i_groups, groups)
            ctx.set(dut.i_form, form | changes)
            await ctx.tick().repeat(dut.LATENCY_CYCLES)
            assert ctx.get(dut.o_bad_top_k) == bad_top_k
            assert ctx.get(dut.o_bad) == (bad is not None)
            if bad:
                assert ctx.get(dut.o_word) == field_of(ROUTER, bad).word

    simulate(dut, testbench)


GOOD = descriptor(RouterSettings(experts=8, top_k=2), biased=False, tables=False, table_address=0)
OF_MODES = {"threshold": ["threshold"], "top_p": ["top_p"], "prior": ["prior", "prior_keep"],
            "capacity": ["capacity", "capacity_order"], "mixer": ["selection"]}


@pytest.mark.parametrize("lacking", MODES)
def test_fields_of_modes_that_are_not_there_are_named(lacking):
    """Each is refused where its mode is not there, and by nobody else."""
    dut = FieldChecks(CONFIG.replace(router_modes=tuple(m for m in MODES if m != lacking)))

    async def testbench(ctx):
        for mode, names in OF_MODES.items():
            for name in names:
                fields = GOOD | {name: 3 if name == "selection" else 1}
                ctx.set(dut.i_entry, int.from_bytes(encode(ROUTER, fields), "little"))
                ctx.set(dut.i_is_layer, 1)
                ctx.set(dut.i_is_router, 1)
                await ctx.tick().repeat(4)
                assert ctx.get(dut.o_bad) == (mode == lacking)
                if mode == lacking:
                    assert ctx.get(dut.o_word) == field_of(ROUTER, name).word

    simulate(dut, testbench)


def test_parameters_are_checked():
    for make in (lambda: WordReader("tiny", count_bits=3), lambda: PairWriter(None),
                 lambda: RouterChecks(1), lambda: RouteUnit(preset("tiny"))):
        with pytest.raises(TypeError, match="config must be an AcceleratorConfig"):
            make()
