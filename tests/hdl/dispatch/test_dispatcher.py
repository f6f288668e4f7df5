"""The dispatcher against the plan: every pair in one pass, in order, with the right flags."""

import random
import sys

import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.activations import ACTIVATIONS
from moeaccel.arithmetic import float32_to_internal
from moeaccel.config import PRESETS
from moeaccel.formats import FORMATS
from moeaccel.hdl.dispatch.dispatcher import Dispatcher
from moeaccel.image import ExpertShape, table_entry
from moeaccel.interface.commands import EXPERT, encode, field_of
from moeaccel.plan import plan

CONFIG = PRESETS["tiny"]
TABLE = 0x40000
FIRST = {"d_model": 64, "row_multipliers": CONFIG.row_multipliers}
EXPERTS = [  # of a mixed layer
    ExpertShape(FORMATS["int4_g32"], d_expert=32, **FIRST),
    ExpertShape(FORMATS["mxint8"], d_expert=64, down_format=FORMATS["mxfp4"],
                gate_up_biased=True, **FIRST),
    ExpertShape(FORMATS["int4_g128"], d_expert=96, activation="relu", **FIRST)]


def shape_of(expert):
    return EXPERTS[expert % len(EXPERTS)]


def image_of(expert):
    return 0x100040 + 8192 * expert


def table_of(num_experts, bad=None):
    """Return an expert table; ``bad``: the expert whose entry no device takes."""
    return {TABLE + 64 * e: encode(EXPERT, table_entry(shape_of(e), image_of(e)) | (
        {"flags": 3} if e == bad else {})) for e in range(num_experts)}


def run(ids, weights, *, num_experts, two_planes, seed, routed=True, delay=0, more=(),
        nonfinite=None, bad=(), held=False):
    """Return (passes, zero tokens, ...); a pass is (count, same, last, slots, x bank, work).

    ``more``: weights with which the job is run again; None: not routed. ``bad``: for each run the
    expert whose entry is bad, or None; it is checked that the dispatcher says so. ``nonfinite``:
    list that takes, for each run, the token whose weight is not finite, or None. ``held``: a router
    brings ids and weights.
    """
    rng = random.Random(seed)
    tokens, top_k = ids.shape
    dut = Dispatcher(CONFIG.replace(router=("softmax",)) if held else CONFIG)
    passes, zeros, requests, sections, loads = [], [], [], [], []
    table = {}
    asked = []
    unanswered = set()  # addresses asked for whose data is not complete
    beats = {0x10000: ids.astype("<i4").tobytes()} | table_of(num_experts)

    async def memory(ctx):
        while True:
            ctx.set(dut.reader.request.ready, rng.random() < 0.7)
            *_, valid, address, count = await ctx.tick().sample(
                dut.reader.request.valid & dut.reader.request.ready,
                dut.reader.request.p.address,
                dut.reader.request.p.beats,
            )
            ctx.set(dut.reader.request.ready, 0)
            if not valid:
                continue
            unanswered.add(address)
            asked.append(address)
            for _ in range(delay):
                await ctx.tick()
            data = beats[address].ljust(count * CONFIG.port_bytes, b"\xee")
            for i in range(count):
                while rng.random() < 0.3:
                    await ctx.tick()
                ctx.set(dut.reader.valid, 1)
                word = data[i * CONFIG.port_bytes : (i + 1) * CONFIG.port_bytes]
                ctx.set(dut.reader.data, int.from_bytes(word, "little"))
                ctx.set(dut.reader.last, i + 1 == count)
                await ctx.tick()
                ctx.set(dut.reader.valid, 0)
            unanswered.remove(address)

    def sink(port, store, convert):
        async def process(ctx):
            while True:
                ctx.set(port.ready, rng.random() < 0.5)
                *_, valid, payload = await ctx.tick().sample(port.valid & port.ready, port.payload)
                if valid:
                    store.append(convert(payload))

        return process

    async def slot_table(ctx):
        while True:
            *_, en, address, value = await ctx.tick().sample(
                dut.slot_w_en, dut.slot_w_address, dut.slot_w_data
            )
            if en:
                table[address] = (
                    value.token,
                    value.weight.mantissa,
                    value.weight.exponent,
                    value.first,
                    value.last,
                )

    waiting = []

    async def take_passes(ctx):
        while True:
            ctx.set(dut.o_pass.ready, rng.random() < 0.5)
            *_, valid, p = await ctx.tick().sample(
                dut.o_pass.valid & dut.o_pass.ready, dut.o_pass.p
            )
            if valid:
                base = p.slot_bank * CONFIG.max_slots
                slots = [table[base + i] for i in range(p.count)]
                passes.append((p.count, p.same, p.last, slots, p.x_bank, p.work))
                waiting.append(rng.randrange(60))

    async def retire(ctx):
        while True:
            await ctx.tick()
            if waiting and waiting[0] == 0:
                waiting.pop(0)
                ctx.set(dut.i_retired, 1)
                ctx.set(dut.i_x_free, 1)
                await ctx.tick()
                ctx.set(dut.i_retired, 0)
                ctx.set(dut.i_x_free, 0)
            elif waiting:
                waiting[0] -= 1

    async def bring(ctx, *lists):
        """Write ids and weights as a router does, 64 bytes of each in turn."""
        width = CONFIG.port_bytes
        for at in range(0, len(lists[0]), 64):
            for of_weights, whole in enumerate(lists):
                part = whole[at : at + 64].ljust(64, b"\x01")
                for i in range(0, 64, width):
                    ctx.set(dut.i_pairs, {
                        "valid": 1, "of_weights": of_weights,
                        "data": int.from_bytes(part[i : i + width], "little")})
                    await ctx.tick()
                    ctx.set(dut.i_pairs.valid, 0)
                    while rng.random() < 0.3:
                        await ctx.tick()

    async def job(ctx):
        p = dut.i_job.p
        for name, value in {
            "routed": routed,
            "two_planes": two_planes,
            "steps_in": 2,
            "num_experts": num_experts,
            "steps_out": 2,
            "table_address": TABLE,
            "tokens": tokens,
            "top_k": top_k,
            "ids_address": 0x10000,
            "weights_address": 0x20000,
        }.items():
            ctx.set(p[name], value)
        for turn, now in enumerate((weights, *more)):
            wrong = bad[turn] if turn < len(bad) else None
            beats.update(table_of(num_experts, wrong))
            wrong = wrong if wrong in ids else None  # without tokens nobody looks at it
            if now is None:
                ctx.set(p.routed, 0)
            else:
                beats[0x20000] = now.astype("<f4").tobytes()
            if held:
                await bring(ctx, beats[0x10000], beats[0x20000])
                ctx.set(p.continues, 1)
            ctx.set(dut.i_job.valid, 1)
            await ctx.tick().until(dut.i_job.ready)
            ctx.set(dut.i_job.valid, 0)
            await ctx.tick()
            await ctx.tick().until(dut.o_done)
            # What comes later would be taken for the next command's.
            assert not unanswered
            assert ctx.get(dut.o_bad) == (wrong is not None)
            if wrong is not None:
                assert ctx.get(dut.o_bad_expert) == wrong
                assert ctx.get(dut.o_bad_word) == field_of(EXPERT, "flags").word
            if nonfinite is not None:
                found = ctx.get(dut.o_nonfinite)
                nonfinite.append(ctx.get(dut.o_nonfinite_token) if found else None)
            last = len(asked)
            for _ in range(200):
                await ctx.tick()
            assert len(asked) == last

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    for background in (
        memory,
        slot_table,
        take_passes,
        retire,
        sink(dut.o_weights, requests, lambda p: (p.address, p.words)),
        sink(dut.o_section, sections, lambda p: (p.format, p.steps, p.tiles)),
        sink(dut.o_load, loads, lambda p: (p.bank, p.slot_bank, p.count)),
        sink(dut.o_zero, zeros, int),
    ):
        sim.add_testbench(background, background=True)
    sim.add_testbench(job)
    sim.run()
    assert not held or not {0x10000, 0x20000} & set(asked)
    return passes, zeros, requests, sections, loads


@pytest.mark.parametrize("shape", [(1, 3), (20, 2), (16, 4), (5, 16)])
def test_pairs_of_a_router_are_not_fetched(shape):
    """The same passes, job after job."""
    rng = np.random.default_rng(5)
    ids = rng.integers(-1, 7, shape)
    calls = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
    found, expected = (run(ids, calls[0], more=calls[1:], num_experts=6, two_planes=1, seed=3,
                           held=held) for held in (True, False))
    assert [p[:4] for p in found[0]] == [p[:4] for p in expected[0]]
    assert found[1:4] == expected[1:4]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("two_planes", [0, 1])
def test_passes_hold_every_pair_once_in_order(seed, two_planes):
    rng = np.random.default_rng(seed)
    tokens, top_k, num_experts = [
        (1, 1, 2),
        (1, 3, 16),
        (7, 2, 5),
        (16, 4, 3),
        (5, 16, 16),
        (9, 1, 4),
    ][seed]
    ids = rng.integers(-1, num_experts + 1, (tokens, top_k))
    if seed == 5:
        ids[:] = 2  # one expert with all tokens, the others with none
    weights = rng.standard_normal((tokens, top_k)).astype(np.float32)
    odd = np.array([0, -0.0, 1e-45, -1e-45, -1.1e-38, 2**-126, -(2**-126), 3.4e38], np.float32)
    weights = np.where(rng.random(weights.shape) < 0.7, weights, rng.choice(odd, weights.shape))
    capacity = CONFIG.max_slots // (2 if two_planes else 1)
    passes, zeros, requests, sections, loads = run(
        ids, weights, num_experts=num_experts, two_planes=two_planes, seed=seed
    )
    expected = plan(ids, num_experts, capacity)
    assert zeros == list(expected.zeros)
    shapes = [shape_of(now.expert) for now in expected.passes]
    assert requests == [
        (image_of(now.expert), shape.gate_up.words + shape.down.words)
        for now, shape in zip(expected.passes, shapes, strict=True)]
    assert sections == [
        (section.format.code, section.steps, section.tiles)
        for shape in shapes for section in shape.sections]
    assert [p[5].form.activation for p in passes] == [
        ACTIVATIONS[shape.activation].code for shape in shapes]
    assert sum(load[2] for load in loads) == len(expected.loads)
    for (count, same, last, slots, *_), now in zip(passes, expected.passes, strict=True):
        assert (count, same, last) == (len(now.pairs), now.same, now is expected.passes[-1])
        chosen = float32_to_internal(weights.reshape(-1)[list(now.pairs)])
        assert slots == list(zip(now.tokens, chosen.mantissa, chosen.exponent, now.first, now.last,
                                 strict=True))


def test_the_lowest_token_whose_weight_is_not_finite_is_named():
    """Of pairs that are computed, whichever comes first, and not beyond the job."""
    ids = np.array([[3, -1], [2, 5], [3, 1], [0, 1], [2, 0]])
    good = np.full(ids.shape, 0.5, np.float32)

    def holding(*places):
        weights = good.copy()
        for i, (token, k) in enumerate(places):
            weights[token, k] = [np.nan, -np.inf, np.inf][i % 3]
        return weights

    found = []
    run(ids, holding((0, 1), (1, 1)), num_experts=5, two_planes=1, seed=3, nonfinite=found, more=[
        holding((3, 0), (2, 0)), good, holding((4, 1), (3, 1), (1, 1)), holding((0, 0)), good])
    assert found == [None, 2, None, 3, 0, None]


def test_what_is_not_routed_has_no_weights_that_are_not_finite():
    """What the memory of weights holds is another command's."""
    found = []
    run(np.zeros((3, 1), int), np.full((3, 1), np.nan, np.float32), num_experts=1, two_planes=0,
        seed=1, more=[None], nonfinite=found)
    assert found == [0, None]


def test_what_is_not_routed_needs_no_ids():
    passes, zeros, requests, sections, _ = run(
        np.zeros((6, 1), int), np.zeros((6, 1)), num_experts=1, two_planes=1, seed=1, routed=False
    )
    assert [p[0] for p in passes] == [2, 2, 2] and not zeros
    assert all(slot[1:3] == (1 << 16, -16) for p in passes for slot in p[3])
    assert len(sections) == 6 and requests == [requests[0]] * 3


@pytest.mark.parametrize("seed", range(4))
def test_a_command_ends_at_a_bad_entry(seed):
    """Passes of the experts before it go out and retire; the next command is as any other."""
    ids = np.array([[3, 0], [2, 1], [3, 1], [0, 1], [2, 3]])
    weights = np.ones(ids.shape, np.float32)
    passes, _, requests, _, _ = run(
        ids, weights, num_experts=5, two_planes=1, seed=seed, more=[weights] * 5,
        bad=[2, None, 0, 4, 3, None])
    capacity = CONFIG.max_slots // 2
    planned = plan(ids, 5, capacity)
    assert [(address - image_of(0)) // 8192 for address, _ in requests] == [
        now.expert for bad in (2, None, 0, None, 3, None)
        for now in (planned if bad is None else planned.before(bad)).passes]
    assert len(passes) == len(requests)


def test_the_longest_list_of_ids_is_asked_for_in_whole():
    config = CONFIG.replace(max_assignments=1 << 17, max_tokens=1 << 16, token_groups=64)
    dut = Dispatcher(config)
    asked = []

    async def scenario(ctx):
        ctx.set(dut.i_job.p, {
            "routed": 1, "num_experts": 2, "tokens": config.max_tokens, "top_k": 2})
        ctx.set(dut.i_job.valid, 1)
        await ctx.tick().until(dut.i_job.ready)
        (beats,) = await ctx.tick().sample(dut.reader.request.p.beats).until(
            dut.reader.request.valid)
        asked.append(beats)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(scenario)
    sim.run()
    assert asked == [4 * config.max_assignments // config.port_bytes] == [1 << 16]


@pytest.mark.parametrize("seed", range(4))
def test_a_command_without_valid_ids_waits_for_its_weights(seed):
    passes, zeros, *_ = run(np.full((2, 1), -1), np.ones((2, 1)), num_experts=1, two_planes=1,
                            seed=seed, delay=40)
    assert not passes and zeros == [0, 1]


def test_a_bad_first_entry_leaves_none_under_way(monkeypatch):
    """More experts have tokens than entries are read ahead, and sorting takes longer than reading
    those: none is asked for behind the end."""
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", CONFIG.replace(max_experts=32))
    ids = (np.arange(120) % 24).reshape(60, 2)
    weights = np.ones(ids.shape, np.float32)
    passes, *_ = run(ids, weights, num_experts=24, two_planes=0, seed=0, bad=[0],
                     more=[weights])
    assert len(passes) == 48


@pytest.mark.parametrize("changes", [{"y_banks": 2}, {"y_banks": 2, "hidden_banks": 2}])
@pytest.mark.parametrize("seed", range(3))
def test_sections_are_announced_while_passes_are_prepared(monkeypatch, changes, seed):
    """With two banks of h, down rows of a pass come behind gate and up rows of the next one."""
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", CONFIG.replace(**changes))
    ids = np.random.default_rng(seed).integers(0, 5, (11, 3))
    passes, _, requests, sections, loads = run(
        ids, np.ones(ids.shape, np.float32), num_experts=5, two_planes=0, seed=seed)
    expected = plan(ids, 5, CONFIG.max_slots)
    assert [p[0] for p in passes] == [len(now.pairs) for now in expected.passes]
    assert sum(load[2] for load in loads) == len(expected.loads)
    order = [(now.expert, part) for now in expected.passes for part in range(2)]
    if "hidden_banks" in changes:
        first, second = order[::2], order[1::2]
        order = [first[0]]
        for i in range(1, len(first)):
            order += [first[i], second[i - 1]]
        order.append(second[-1])
    shapes = [(shape_of(expert).sections[part], expert, part) for expert, part in order]
    assert sections == [(s.format.code, s.steps, s.tiles) for s, *_ in shapes]
    if "hidden_banks" in changes:
        begins = [image_of(expert) + part * CONFIG.word_bytes * shape_of(expert).sections[0].words
                  for _, expert, part in shapes]
        assert requests == [(at, s.words) for at, (s, *_) in zip(begins, shapes, strict=True)]
    else:
        assert requests == [(image_of(now.expert), sum(
            s.words for s in shape_of(now.expert).sections)) for now in expected.passes]
