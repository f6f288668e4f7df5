"""ExpertBuffer against the list of moeaccel.golden, request by request."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.cycles.expert_buffer import REQUEST_CYCLES
from moeaccel.golden import expert_buffer
from moeaccel.hdl.weights.expert_buffer import ExpertBuffer
from moeaccel.interface.registers import BUFFER_COUNTERS

TINY = PRESETS["tiny"].replace(name="buffered", channels=2, buffer_slots=3, buffer_beats=64)
CONFIGS = {
    "three slots": TINY,
    "one slot": TINY.replace(buffer_slots=1, buffer_beats=8),
    "sections one by one": TINY.replace(y_banks=2, hidden_banks=2, channels=1),
    "a beat is a word": PRESETS["wide512"].replace(buffer_slots=5, buffer_beats=32),
}


def expected(config, buffer, image, first, words, fill):
    """Return what a request for ``words`` from word ``first`` of an image becomes, or None."""
    port, per_word = config.port_bytes, config.beats_per_word
    size, before = words * config.word_bytes, first * config.word_bytes
    if fill:
        held = buffer.has(image, size)
        moved = buffer.load(image, size)
        return (image + held, moved // port, 1, 0, held // port) if moved else None
    there = buffer.has(image, before + size)
    if not first:
        buffer.use(image, size)
    held = min(max(0, there - before), size)
    if first:
        buffer.counts.hit_bytes += held
    return (image + before + held, (size - held) // port, 0, held // port, first * per_word)


def counted(config, counts):
    channels = config.channels
    return dict(zip(BUFFER_COUNTERS, (
        counts.hits + counts.partial, counts.misses,
        *(channels * value // config.port_bytes for value in (
            counts.hit_bytes, counts.fetched_bytes, counts.wasted_bytes))), strict=True))


def run(config, requests, *, stall, seed=0):
    """Make requests, (image, first word, words, fill) or None to forget; hold all to the model."""
    dut = ExpertBuffer(config)
    rng = np.random.default_rng(seed)
    buffer = expert_buffer.ExpertBuffer(
        config.buffer_slots, config.buffer_beats * config.port_bytes, unit=config.port_bytes)
    found, wanted, places, waits = [], [], [], []
    totals = dict.fromkeys(BUFFER_COUNTERS, 0)

    async def ask(ctx):
        at = dut.i_request
        for request in requests:
            while rng.random() < stall:
                await ctx.tick()
            if request is None:
                ctx.set(dut.i_forget, 1)
                await ctx.tick()
                ctx.set(dut.i_forget, 0)
                buffer.forget()
                continue
            image, first, words, fill = request
            ctx.set(at.p.address, image + first * config.word_bytes)
            ctx.set(at.p.words, words)
            ctx.set(at.p.fill, int(fill))
            if config.hidden_banks > 1:
                ctx.set(at.p.before, first)
            ctx.set(at.valid, 1)
            await ctx.tick().until(at.ready)
            ctx.set(at.valid, 0)
            answer = expected(config, buffer, image, first, words, fill)
            if answer is not None:
                wanted.append(answer)
                if not stall:
                    cycles = 1
                    while not ctx.get(dut.o_request.valid):
                        await ctx.tick()
                        cycles += 1
                    waits.append(cycles)
            assert not ctx.get(dut.o_idle)
        # The last one, or what is forgotten, takes its time.
        await ctx.tick().repeat(60)
        assert ctx.get(dut.o_idle)

    async def answer(ctx):
        out = dut.o_request
        while True:
            ready = rng.random() >= stall
            ctx.set(out.ready, int(ready))
            _, _, valid, address, beats, fill, held, place = await ctx.tick().sample(
                out.valid, out.p.address, out.p.beats, out.p.fill, out.p.held, out.p.place)
            if valid and ready:
                found.append((address, beats, fill, held))
                places.append(place)

    async def count(ctx):
        names = [f"count_{name}" for name in BUFFER_COUNTERS]
        while True:
            _, _, *values = await ctx.tick().sample(*(getattr(dut, name) for name in names))
            for name, value in zip(BUFFER_COUNTERS, values, strict=True):
                totals[name] += value

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(ask)
    simulator.add_testbench(answer, background=True)
    simulator.add_testbench(count, background=True)
    simulator.run()
    assert found == [answer[:4] for answer in wanted]
    check_places(config, wanted, places)
    assert totals == counted(config, buffer.counts)
    return waits


def check_places(config, wanted, places):
    """What is held is where it was brought; experts that are there have slots of their own."""
    slots = {}  # what each slot has: image and beats
    port = config.port_bytes
    for (address, beats, fill, held, first), place in zip(wanted, places, strict=True):
        slot, beat = divmod(place, config.buffer_beats)
        assert slot < config.buffer_slots
        if fill:
            image = address - first * port
            assert beat == first
            assert not first or slots[slot] == (image, first)
            slots[slot] = image, first + beats
        elif held:
            image = address - (first + held) * port
            assert beat == first
            assert slots[slot][0] == image
            assert first + held <= slots[slot][1]


def draw(config, rng, count):
    """Return requests as a dispatcher makes them; a layer may give an image another length."""
    images = {0x10000 * (i + 1) + 64: int(rng.integers(1, 3 * config.buffer_beats))
              for i in range(2 * config.buffer_slots)}
    requests = []
    for _ in range(count):
        image = int(rng.choice(list(images)))
        words = max(1, images[image] // config.beats_per_word)
        if rng.random() < 0.1:
            words = int(rng.integers(1, 2 * words + 1))
        kind = rng.random()
        if kind < 0.06:
            requests.append(None)
        elif kind < 0.5:
            requests.append((image, 0, words, True))
        elif config.hidden_banks > 1 and words > 1 and kind < 0.85:
            first = int(rng.integers(1, words))
            requests += [(image, 0, first, False), (image, first, words - first, False)]
        else:
            requests.append((image, 0, words, False))
    return requests


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stall", [0.0, 0.6])
def test_it_is_the_models_list(name, stall):
    config = CONFIGS[name]
    requests = draw(config, np.random.default_rng(len(name)), 60)
    waits = run(config, requests, stall=stall)
    assert stall or set(waits) == {REQUEST_CYCLES}


def test_the_latest_stay():
    """Used or filled: what was longest ago goes first."""
    a, b, c, d = (0x1000 * i for i in range(1, 5))
    brought = [(image, 0, 4, True) for image in (a, b, c)]
    uses = [(image, 0, 4, False) for image in (a, d, b, c, a)]
    run(TINY, [*brought, uses[0], (d, 0, 4, True), *uses, None, *uses], stall=0.0)


def test_constructor():
    config = TINY.replace(buffer_slots=0, buffer_beats=0)
    with pytest.raises(ValueError, match="must have buffer_slots, and 'buffered' has none"):
        ExpertBuffer(config)
