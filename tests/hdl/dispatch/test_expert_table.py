"""The expert table: who has tokens, in order, with an entry that can be relied upon."""

import random
from dataclasses import replace

import pytest
from amaranth.sim import Simulator

from moeaccel.activations import ACTIVATIONS
from moeaccel.config import PRESETS
from moeaccel.formats import FORMATS
from moeaccel.hdl.dispatch.expert_table import ExpertTable
from moeaccel.image import ExpertShape, LinearShape, gate_limit_bits, limit_bits, table_entry
from moeaccel.interface.commands import EXPERT, encode, field_of
from tests.support.ports import serve_reads

TINY = PRESETS["tiny"]
TABLE = 0x400
D_IN, D_OUT = 64, 64
SHAPE = {"row_multipliers": TINY.row_multipliers, "channels": TINY.channels}


def shape_of(rng):
    """Return a shape as an expert of a mixed layer may have it."""
    formats = list(FORMATS.values())
    if rng.random() < 0.3:
        return LinearShape(
            rng.choice(formats), D_OUT, D_IN, biased=rng.random() < 0.5, **SHAPE)
    gated = rng.random() < 0.5
    return ExpertShape(
        rng.choice(formats), D_IN, 32 * rng.randint(1, 8), down_format=rng.choice(formats),
        activation=rng.choice(list(ACTIVATIONS)), gated=gated,
        second_up=gated and rng.random() < 0.5, limit=rng.choice((None, 7.0)),
        gate_limit=rng.choice((None, 0.0625, 6.98712158203125)), gate_up_biased=rng.random() < 0.5,
        down_biased=rng.random() < 0.5, **SHAPE)


def run(config, experts, entries, *, seed=0, stall=0.0, latency=5, take=1.0, expected=None,
        known=1.0):
    """Return (what the table hands out, by experts: its entry's fields; requests).

    ``known``: chance of each cycle that another one of the experts becomes known.
    """
    rng = random.Random(seed)
    dut = ExpertTable(config)
    memory = bytearray(TABLE) + b"".join(encode(EXPERT, entry) for entry in entries)
    found, requests = [], []
    wanted = len(experts) if expected is None else expected

    async def number_memory(ctx):
        """Has a number from the cycle on in which it counts."""
        count = 0
        while True:
            _, _, address = await ctx.tick().sample(dut.expert_address)
            ctx.set(dut.expert_data, experts[address] if address < count else 77)
            count += count < len(experts) and rng.random() < known
            ctx.set(dut.i_experts, count)

    async def watch(ctx):
        while True:
            _, _, valid, address = await ctx.tick().sample(
                dut.reader.request.valid & dut.reader.request.ready, dut.reader.request.p.address)
            if valid:
                requests.append((address - TABLE) // 64)

    async def scenario(ctx):
        ctx.set(dut.i_job, {
            "steps_in": D_IN // 32, "steps_out": D_OUT // 32, "table_address": TABLE})
        while len(found) < wanted:
            ctx.set(dut.o_expert.ready, rng.random() < take)
            _, _, valid, p = await ctx.tick().sample(
                dut.o_expert.valid & dut.o_expert.ready, dut.o_expert.p)
            if valid:
                found.append(p)
        ctx.set(dut.o_expert.ready, 0)
        for _ in range(3 * len(experts) + 200):
            await ctx.tick()
        assert ctx.get(dut.o_quiet)
        assert expected is not None or not ctx.get(dut.o_expert.valid)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(number_memory, background=True)
    sim.add_testbench(watch, background=True)
    sim.add_testbench(
        serve_reads(dut.reader, memory, config, rng, latency=latency, stall=stall), background=True)
    sim.add_testbench(scenario)
    sim.run()
    return found, requests


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("port_bytes", [8, 64])
def test_experts_with_tokens_come_in_order_with_their_shapes(seed, port_bytes):
    rng = random.Random(seed)
    config = TINY.replace(port_bytes=port_bytes, quantiser_lanes=port_bytes // 4, max_experts=64,
                          second_up=True)
    experts = rng.choice((1, 5, 64))
    busy = rng.sample(range(experts), rng.randint(1, experts))
    shapes = [shape_of(rng) for _ in range(experts)]
    images = [4096 * (e + 1) + 64 for e in range(experts)]
    entries = [table_entry(shape, image) for shape, image in zip(shapes, images, strict=True)]
    found, requests = run(config, busy, entries, seed=seed, stall=(0, 0.5)[seed % 2],
                          latency=(0, 60)[seed // 2], take=(1.0, 0.05)[seed % 2],
                          known=(1.0, 0.3, 0.1, 1.0)[seed])
    assert requests == busy
    for e, p in zip(busy, found, strict=True):
        shape = shapes[e]
        sections = shape.sections
        assert (p.expert, p.image_address, p.bad) == (e, images[e], 0)
        assert p.words == sum(section.words for section in sections)
        assert p.work.single == (len(sections) == 1)
        for i, section in enumerate(sections):
            work = p.work.sections[i]
            assert (work.dims.format, work.dims.steps, work.dims.tiles) == (
                section.format.code, section.steps, section.tiles)
            assert work.dims.biased == section.biased
            assert (work.hidden, work.combine) == (i == 1, i + 1 == len(sections))
            assert work.short == -section.channel_rows % config.rows
        if isinstance(shape, ExpertShape):
            form = p.work.form
            limit = limit_bits(shape.limit)
            assert (form.activation, 1 << form.rows_log2) == (
                ACTIVATIONS[shape.activation].code, shape.rows_of_h)
            assert form.limit.exponent << 7 | form.limit.fraction == limit
            assert form.gate_limit.exponent << 16 | form.gate_limit.fraction == (
                gate_limit_bits(shape.gate_limit) >> 7 or limit << 9)


def test_sixteen_entries_at_most_are_asked_for_ahead():
    entries = [table_entry(LinearShape(FORMATS["mxint8"], D_OUT, D_IN, **SHAPE), 4096)] * 64
    config = TINY.replace(max_experts=64)
    _, requests = run(config, range(64), entries, take=0, expected=0)
    # One is at the output.
    assert requests == list(range(ExpertTable.ENTRIES + 1))


GATED = ExpertShape(FORMATS["int4_g32"], D_IN, 128, down_format=FORMATS["mxint8"], **SHAPE)
UNGATED = ExpertShape(FORMATS["mxint8"], D_IN, 96, gated=False, **SHAPE)
LINEAR = LinearShape(FORMATS["mxfp4"], D_OUT, D_IN, **SHAPE)
BIASED = replace(GATED, gate_up_biased=True, down_biased=True)
TOP = 1 << TINY.address_bits


def image_bytes(shape):
    return sum(section.words for section in shape.sections) * TINY.word_bytes


@pytest.mark.parametrize(("shape", "changes", "field"), [
    (GATED, {"sections": 0}, "sections"), (GATED, {"sections": 3}, "sections"),
    (GATED, {"sections": 1}, "sink0"),
    (LINEAR, {"sections": 2, "d_expert": 32}, "sink0"),
    (GATED, {"activation": len(ACTIVATIONS)}, "activation"), (LINEAR, {"activation": 9}, None),
    (GATED, {"flags": 1}, "flags"), (GATED, {"flags": 1 << 15, "format0": 99}, "flags"),
    (GATED, {"d_expert": 0}, "d_expert"), (GATED, {"d_expert": 48}, "d_expert"),
    (GATED, {"d_expert": TINY.max_dim + 32}, "d_expert"), (LINEAR, {"d_expert": 7}, None),
    (GATED, {"image_address": 4096 + 32}, "image_address"),
    (GATED, {"image_address": TOP}, "image_address"),
    (GATED, {"image_address": TOP - image_bytes(GATED)}, None),
    (GATED, {"image_address": TOP - image_bytes(GATED) + 64}, "image_address"),
    (LINEAR, {"image_address": TOP - image_bytes(LINEAR)}, None),
    (LINEAR, {"image_address": TOP - image_bytes(LINEAR) + 64, "words0": 1}, "image_address"),
    (GATED, {"format0": 5}, "format0"), (GATED, {"format1": 255}, "format1"),
    (LINEAR, {"format1": 255, "operand1": 9, "sink1": 9, "words1": 9}, None),
    (GATED, {"operand0": 1}, "operand0"), (GATED, {"operand1": 0}, "operand1"),
    (GATED, {"sink1": 0}, "sink1"), (GATED, {"sink0": 2}, "words0"),
    (GATED, {"sink0": 3}, "sink0"), (UNGATED, {}, None), (UNGATED, {"sink0": 0}, "words0"),
    (GATED, {"limit": 0x7F80}, "limit"), (GATED, {"limit": 0x7F7F}, None),
    (GATED, {"limit": 0x80E0}, "limit"), (LINEAR, {"limit": 0xFFFF}, None),
    (GATED, {"words0": 1}, "words0"), (GATED, {"words1": 0, "words0": 0}, "words0"),
    (GATED, {"words1": 1 << 31}, "words1"), (LINEAR, {"words0": 0}, "words0"),
    (GATED, {"format0": FORMATS["mxint8"].code}, "words0"),
    (GATED, {"format0": 77, "words0": 1, "d_expert": 1}, "d_expert"),
    (GATED, {"bias0": 2}, "bias0"), (GATED, {"bias1": 0x81}, "bias1"),
    (LINEAR, {"bias1": 3}, None), (GATED, {"bias0": 1}, "words0"),
    (GATED, {"bias1": 1}, "words1"), (BIASED, {}, None), (BIASED, {"bias1": 0}, "words1"),
])
def test_a_bad_entry_names_its_word(shape, changes, field):
    good = table_entry(GATED, 4096)
    entry = table_entry(shape, 4096) | changes
    found, _ = run(TINY, [0, 1, 2], [good, entry, good])
    assert [p.expert for p in found] == [0, 1, 2]
    assert (found[0].bad, found[2].bad) == (0, 0)
    assert found[1].bad == (field is not None)
    assert field is None or found[1].word == field_of(EXPERT, field).word


def test_hardware_without_biases_takes_none():
    good, biased = table_entry(GATED, 4096), table_entry(BIASED, 4096)
    found, _ = run(TINY.replace(bias=False), [0, 1], [good, biased])
    assert [p.bad for p in found] == [0, 1]
    assert found[1].word == field_of(EXPERT, "bias0").word


@pytest.mark.parametrize(("shape", "cycles"), [
    (LINEAR, 14 + (D_IN // 32).bit_length()),
    (GATED, 19 + (D_IN // 32).bit_length() + (128 // 32).bit_length()),
])
def test_latency_is_as_stated(shape, cycles):
    dut = ExpertTable(TINY)
    memory = bytearray(TABLE) + encode(EXPERT, table_entry(shape, 4096)) * 2
    cycle, asked, last_beats, offered, took = [0], [], [], [], []

    async def number_memory(ctx):
        ctx.set(dut.i_experts, 2)
        while True:
            _, _, address = await ctx.tick().sample(dut.expert_address)
            ctx.set(dut.expert_data, address)

    async def watch(ctx):
        while True:
            _, _, request, last, valid, ready = await ctx.tick().sample(
                dut.reader.request.valid & dut.reader.request.ready,
                dut.reader.valid & dut.reader.last, dut.o_expert.valid, dut.o_expert.ready)
            if request:
                asked.append(cycle[0])
            if last:
                last_beats.append(cycle[0])
            if valid and len(offered) == len(took):
                offered.append(cycle[0])
            if valid and ready:
                took.append(cycle[0])
            cycle[0] += 1

    async def scenario(ctx):
        ctx.set(dut.i_job, {
            "steps_in": D_IN // 32, "steps_out": D_OUT // 32, "table_address": TABLE})
        await ctx.tick().repeat(150)
        ctx.set(dut.o_expert.ready, 1)
        await ctx.tick().repeat(150)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    for process in (number_memory, watch, serve_reads(dut.reader, memory, TINY, random.Random(1))):
        sim.add_testbench(process, background=True)
    sim.add_testbench(scenario)
    sim.run()
    assert asked[0] == 3
    assert offered[0] - last_beats[0] == cycles
    assert offered[1] - took[0] == cycles - 3
