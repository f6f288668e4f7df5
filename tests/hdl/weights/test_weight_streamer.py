"""WeightStreamer against a memory of any latency."""

from collections import deque

import numpy as np
import pytest
from amaranth.hdl import Module, Signal
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.weights.weight_streamer import WeightStreamer

NARROW = PRESETS["tiny"].replace(read_ahead_beats=256)  # 8 beats a word, bursts of 64
WIDE = PRESETS["wide512"]  # a beat is a word


def beat_of(address):
    """Return the contents of one beat: not periodic in anything the streamer counts."""
    return address * 0x9E3779B97F4A7C15 & (1 << 64) - 1


def run(config, requests, *, latency, stall=0.0, word_stall=0.0, seed=0, hold=0):
    """Serve requests [(address, words)]; return (bursts, cycle of each word, cycle of each beat).

    ``latency``: cycles from an accepted burst to its first beat; memory brings one beat a cycle.
    ``hold``: cycles before the first word is accepted.
    """
    m = Module()
    m.submodules.dut = dut = WeightStreamer(config)
    cycle = Signal(32)
    m.d.sync += cycle.eq(cycle + 1)
    memory_rng, word_rng, request_rng = (np.random.default_rng((seed, i)) for i in range(3))
    bursts, words, beats = [], [], []
    queue = deque()  # (cycle from which it may come, address, last)

    def now(ctx):
        return ctx.get(cycle)

    async def ask(ctx):
        for address, count in requests:
            while request_rng.random() < stall:
                await ctx.tick()
            ctx.set(dut.i_request.p.address, address)
            ctx.set(dut.i_request.p.words, count)
            ctx.set(dut.i_request.valid, 1)
            await ctx.tick().until(dut.i_request.ready)
            ctx.set(dut.i_request.valid, 0)

    async def accept_bursts(ctx):
        request = dut.reader.request
        while True:
            ready = int(memory_rng.random() >= stall)
            ctx.set(request.ready, ready)
            _, _, valid, address, count = await ctx.tick().sample(
                request.valid, request.p.address, request.p.beats)
            if not (ready and valid):
                continue
            bursts.append((address, count))
            for i in range(count):
                queue.append((now(ctx) + latency - 1, address + i * config.port_bytes,
                              i == count - 1))

    async def bring_beats(ctx):
        while True:
            if queue and queue[0][0] <= now(ctx) and memory_rng.random() >= stall:
                _, address, last = queue.popleft()
                ctx.set(dut.reader.valid, 1)
                ctx.set(dut.reader.data, beat_of(address))
                ctx.set(dut.reader.last, int(last))
                beats.append(now(ctx))
            else:
                ctx.set(dut.reader.valid, 0)
            await ctx.tick()

    async def accept_words(ctx):
        await ctx.tick().repeat(hold + 2)
        assert not ctx.get(dut.o_idle)
        for address, count in requests:
            for i in range(count):
                while word_rng.random() < word_stall:
                    await ctx.tick()
                ctx.set(dut.o_word.ready, 1)
                payload, = await ctx.tick().sample(dut.o_word.payload).until(dut.o_word.valid)
                ctx.set(dut.o_word.ready, 0)
                words.append(now(ctx))
                first = address + i * config.word_bytes
                for part in range(config.beats_per_word):
                    bits = 8 * config.port_bytes
                    beat = payload >> bits * part & (1 << bits) - 1
                    assert beat == beat_of(first + part * config.port_bytes)
        await ctx.tick().repeat(3)
        assert ctx.get(dut.o_idle)
        assert ctx.get(dut.o_outstanding) == 0

    sim = Simulator(m)
    sim.add_clock(1e-8)
    sim.add_testbench(ask)
    sim.add_testbench(accept_bursts, background=True)
    sim.add_testbench(bring_beats, background=True)
    sim.add_testbench(accept_words)
    sim.run()
    return bursts, words, beats


def check_bursts(config, requests, bursts):
    """Bursts cover the requests in order, as long as possible, to multiples of the longest."""
    longest = config.max_burst_beats * config.port_bytes
    expected = []
    for address, words in requests:
        end = address + words * config.word_bytes
        while address < end:
            stop = min(end, (address // longest + 1) * longest)
            expected.append((address, (stop - address) // config.port_bytes))
            address = stop
    assert bursts == expected


@pytest.mark.parametrize("config", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("latency", [1, 7, 40, 120])
@pytest.mark.parametrize(("stall", "word_stall"), [(0.0, 0.7), (0.4, 0.0), (0.3, 0.3)])
def test_random_requests(config, latency, stall, word_stall):
    rng = np.random.default_rng(latency)
    requests = [(int(rng.integers(1 << 20)) * config.word_bytes, int(rng.integers(1, 60)))
                for _ in range(8)]
    bursts, _, _ = run(config, requests, latency=latency, stall=stall, word_stall=word_stall)
    check_bursts(config, requests, bursts)


@pytest.mark.parametrize("latency", [1, 2, 40, 100, 200, 300])
def test_one_word_per_cycle(latency):
    """Every cycle brings a word, also from one request to the next."""
    most = WIDE.read_ahead_beats - 2 * WIDE.max_burst_beats
    requests = [(0x100000 + 64, 300), (0x204000, 65), (0x300FC0, 1), (0x300FC0, 2), (0x400000, 700)]
    bursts, words, beats = run(WIDE, requests, latency=latency)
    check_bursts(WIDE, requests, bursts)
    assert latency <= most
    assert np.all(np.diff(beats) == 1)
    assert np.all(np.diff(words) == 1)


@pytest.mark.parametrize("latency", [1, 60, 128])
def test_one_beat_per_cycle(latency):
    """The gearbox adds no gap: a word every beats_per_word cycles."""
    requests = [(0x1000 + 64, 50), (0x8000, 1), (0x9000, 60)]
    assert latency <= NARROW.read_ahead_beats - 2 * NARROW.max_burst_beats
    _, words, beats = run(NARROW, requests, latency=latency)
    assert np.all(np.diff(beats) == 1)
    assert np.all(np.diff(words) == NARROW.beats_per_word)
    assert words[0] - beats[NARROW.beats_per_word - 1] == 4


def test_reads_ahead_while_nothing_is_taken():
    """The second request is fetched while words wait, up to the FIFO's depth and never beyond."""
    requests = [(0, 100), (0x10000, 500)]
    bursts, _, beats = run(WIDE, requests, latency=20, hold=1200)
    before = [b for b in beats if b < 1200]
    assert WIDE.read_ahead_beats - WIDE.max_burst_beats < len(before) <= WIDE.read_ahead_beats + 1
    check_bursts(WIDE, requests, bursts)


def test_constructor():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 'tiny'"):
        WeightStreamer("tiny")
