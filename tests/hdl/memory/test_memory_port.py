"""MemoryPort against a behavioural AXI4 memory."""

import itertools
import random

import pytest
from amaranth.hdl import ResetInserter, Signal
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.memory.memory_port import WRITE_AHEAD_BURSTS, MemoryPort
from tests.support.axi_memory import AxiMemory

SIZE = 1 << 16


class Bench(AxiMemory):
    """A port with a memory behind it, and what its clients saw."""

    def __init__(self, *, readers=2, writers=2, preset="tiny", window=(0, SIZE), **options):
        # Its clients may make longer requests than the preset's.
        self.config = PRESETS[preset].replace(max_assignments=1 << 14)
        self.dut = MemoryPort(self.config, readers=readers, writers=writers)
        self.reset = Signal()
        super().__init__(self.dut.axi_mem, size=SIZE, max_burst=self.config.max_burst_beats,
                         window=window, **options)
        self.readers = [getattr(self.dut, f"reader{i}") for i in range(readers)]
        self.writers = [getattr(self.dut, f"writer{i}") for i in range(writers)]
        self.got = [[] for _ in range(readers)]
        self.done = [0] * writers
        self.counted = [0] * readers
        self.written = 0

    async def _monitor(self, ctx):
        signals = [s for r in self.readers for s in (r.valid, r.data, r.last)]
        signals += [w.done for w in self.writers]
        signals += [self.dut.read_beat, self.dut.read_beat_reader, self.dut.write_beat]
        async for _, _, *values in ctx.tick().sample(*signals):
            for i, got in enumerate(self.got):
                if values[3 * i]:
                    got.append((values[3 * i + 1], values[3 * i + 2]))
            for i in range(len(self.writers)):
                self.done[i] += values[3 * len(self.readers) + i]
            beat, reader, written = values[-3:]
            if beat:
                self.counted[reader] += 1
            self.written += written

    async def request(self, ctx, client, address, beats):
        ctx.set(client.request.payload.address, address)
        ctx.set(client.request.payload.beats, beats)
        ctx.set(client.request.valid, 1)
        await ctx.tick().until(client.request.ready)
        ctx.set(client.request.valid, 0)

    async def send(self, ctx, client, words, stall=0.0):
        for word in words:
            while self.random.random() < stall:
                await ctx.tick()
            ctx.set(client.data.payload, word)
            ctx.set(client.data.valid, 1)
            await ctx.tick().until(client.data.ready)
            ctx.set(client.data.valid, 0)

    async def until(self, ctx, condition, limit=4000):
        for _ in range(limit):
            if condition():
                return
            await ctx.tick()
        raise AssertionError("nothing happened")

    async def until_done(self, ctx, i):
        before = self.done[i]
        await self.until(ctx, lambda: self.done[i] > before)

    async def until_idle(self, ctx):
        await ctx.tick().repeat(2)
        await ctx.tick().until(self.dut.idle)

    def expect(self, address, beats, zeros=()):
        return [(0 if k in zeros else self.beat(address + k * self.width), k == beats - 1)
                for k in range(beats)]

    def run(self, *testbenches):
        sim = Simulator(ResetInserter(self.reset)(self.dut))
        sim.add_clock(1e-6)
        sim.add_testbench(self.serve, background=True)
        sim.add_testbench(self._monitor, background=True)

        async def set_window(ctx):
            ctx.set(self.dut.window_base, self.window[0])
            ctx.set(self.dut.window_limit, self.window[1])

        sim.add_testbench(set_window)
        for testbench in testbenches:
            sim.add_testbench(testbench)
        sim.run()


def start(testbench):
    """Let the window settle first."""
    async def delayed(ctx):
        await ctx.tick().repeat(3)
        await testbench(ctx)
    return delayed


@pytest.mark.parametrize(("preset", "stall"), [("tiny", 0.0), ("tiny", 0.5), ("small", 0.3)])
def test_random_traffic(preset, stall):
    bench = Bench(readers=3, writers=2, preset=preset, seed=1, stall=stall, latency=7)
    width, rng = bench.width, random.Random(2)
    half = SIZE // 2 // width  # readers read the lower half, writers write the upper one
    expected = [[] for _ in bench.readers]
    image = bytearray(bench.memory)

    def reader(i):
        async def testbench(ctx):
            for _ in range(12):
                beats = rng.choice([1, 2, rng.randint(1, 200)])
                address = rng.randrange(half - beats) * width
                expected[i].extend(bench.expect(address, beats))
                await bench.request(ctx, bench.readers[i], address, beats)
                while rng.random() < stall:
                    await ctx.tick()
            await bench.until(ctx, lambda: len(bench.got[i]) >= len(expected[i]))
        return start(testbench)

    def writer(i):
        async def testbench(ctx):
            low = half + i * half // 2
            for _ in range(8):
                beats = rng.choice([1, rng.randint(1, 150)])
                address = (low + rng.randrange(half // 2 - beats)) * width
                words = [rng.getrandbits(8 * width) for _ in range(beats)]
                for k, word in enumerate(words):
                    at = address + k * width
                    image[at:at + width] = word.to_bytes(width, "little")
                await bench.request(ctx, bench.writers[i], address, beats)
                await bench.send(ctx, bench.writers[i], words, stall)
                await bench.until_done(ctx, i)
                for k, word in enumerate(words):
                    assert bench.beat(address + k * width) == word, "done before memory has it"
        return start(testbench)

    bench.run(*(reader(i) for i in range(3)), *(writer(i) for i in range(2)))
    assert bench.got == expected
    assert bench.memory == image
    assert bench.done == [8, 8]
    assert bench.counted == [len(e) for e in expected]
    assert bench.written == len(bench.w_beats)


def test_bursts_are_the_blocks_of_the_request():
    bench = Bench()
    address, beats = 4096 - 24, 3 + 64 + 64 + 5

    async def testbench(ctx):
        await bench.request(ctx, bench.readers[0], address, beats)
        await bench.until(ctx, lambda: len(bench.got[0]) == beats)

    bench.run(start(testbench))
    assert [burst[1:] for burst in bench.ar] == [
        (0, 4096 - 24, 3), (0, 4096, 64), (0, 4096 + 512, 64), (0, 4096 + 1024, 5)]


def test_latency_and_throughput_of_reads():
    bench = Bench(readers=3)
    cycles = {}

    async def testbench(ctx):
        cycles["request"] = bench.cycle
        await bench.request(ctx, bench.readers[2], 0, 640)
        await bench.until(ctx, lambda: len(bench.got[2]) == 640)

    bench.run(start(testbench))
    issued = [burst[0] for burst in bench.ar]
    assert issued[0] - cycles["request"] == 4
    assert [b - a for a, b in itertools.pairwise(issued)] == [1] * 9
    assert bench.r_cycles[-1] - bench.r_cycles[0] == 639


def test_many_single_beat_requests_are_outstanding():
    bench = Bench(readers=2, latency=250)

    async def testbench(ctx):
        for k in range(100):
            await bench.request(ctx, bench.readers[1], 8 * k, 1)
        await bench.until(ctx, lambda: len(bench.got[1]) == 100)

    bench.run(start(testbench))
    issued = [burst[0] for burst in bench.ar]
    assert issued[49] - issued[0] == 147  # one every three cycles
    assert 60 <= sum(cycle < issued[0] + 250 for cycle in issued) < 64  # then answers limit
    assert bench.got[1] == [(bench.beat(8 * k), 1) for k in range(100)]


def test_priority_is_decided_for_each_burst():
    bench = Bench(readers=3)

    def reader(i, delay, beats):
        async def testbench(ctx):
            for _ in range(delay):
                await ctx.tick()
            await bench.request(ctx, bench.readers[i], 8192 * i, beats)
            await bench.until(ctx, lambda: len(bench.got[i]) == beats)
        return start(testbench)

    bench.run(reader(2, 0, 512), reader(0, 2, 128), reader(1, 2, 128))
    order = [burst[1] for burst in bench.ar]
    assert order == [2, 2, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]


def test_writes_stream_without_gaps():
    bench = Bench()
    words = [bench.random.getrandbits(64) for _ in range(300)]
    cycles = {}

    async def testbench(ctx):
        await bench.request(ctx, bench.writers[1], 4096 - 16, 300)
        await bench.send(ctx, bench.writers[1], words)
        await bench.until_done(ctx, 1)
        cycles["done"] = bench.cycle

    bench.run(start(testbench))
    beats = [cycle for cycle, _ in bench.w_beats]
    assert beats[-1] - beats[0] == 299
    # BVALID one cycle after the last W beat, `done` two after that, seen by us one later.
    assert cycles["done"] - beats[-1] == 4
    assert [bench.beat(4096 - 16 + 8 * k) for k in range(300)] == words


def test_addresses_run_a_few_bursts_ahead_of_data():
    bench = Bench()
    words = [bench.random.getrandbits(64) for _ in range(16 * 64)]

    async def testbench(ctx):
        await bench.request(ctx, bench.writers[0], 0, len(words))
        await ctx.tick().repeat(60)
        assert WRITE_AHEAD_BURSTS < len(bench.aw) <= WRITE_AHEAD_BURSTS + 2
        await bench.send(ctx, bench.writers[0], words)
        await bench.until_done(ctx, 0)

    bench.run(start(testbench))
    assert [bench.beat(8 * k) for k in range(len(words))] == words


@pytest.mark.parametrize("latency", [0, 30])
def test_reads_outside_the_window_are_zeros_in_order(latency):
    window = (4096, 4096 + 512 + 64)
    bench = Bench(readers=2, latency=latency, window=window)
    expected = [[], []]

    async def testbench(ctx):
        # Allowed, then straddling both ends, then outside, then allowed again.
        for address, beats, zeros in [
            (4096, 64, ()), (4096 - 80, 14, range(10)), (4096 + 448, 20, range(8, 20)),
            (4096 - 8, 1, [0]), (SIZE, 70, range(70)), (4096 + 512, 8, ()), (4096 + 568, 1, ()),
            (4096 + 568, 2, range(2)), (1 << 39, 1, [0]), (4096, 1, ()),
        ]:
            expected[1].extend((0 if k in zeros else bench.beat(address + 8 * k), k == beats - 1)
                               for k in range(beats))
            await bench.request(ctx, bench.readers[1], address, beats)
        await bench.until(ctx, lambda: len(bench.got[1]) >= len(expected[1]))
        assert ctx.get(bench.dut.fault_window)
        assert not ctx.get(bench.dut.fault_bus)
        assert ctx.get(bench.dut.fault_address) == 4096 - 80
        ctx.set(bench.dut.clear_faults, 1)
        await ctx.tick()
        ctx.set(bench.dut.clear_faults, 0)
        assert not ctx.get(bench.dut.fault_window)
        await bench.request(ctx, bench.readers[1], SIZE, 1)
        expected[1].append((0, 1))
        await bench.until(ctx, lambda: len(bench.got[1]) >= len(expected[1]))
        assert ctx.get(bench.dut.fault_window)
        assert ctx.get(bench.dut.fault_address) == SIZE

    async def other(ctx):
        for k in range(20):
            expected[0].extend(bench.expect(4096 + 8 * k, 40))
            await bench.request(ctx, bench.readers[0], 4096 + 8 * k, 40)
        await bench.until(ctx, lambda: len(bench.got[0]) >= len(expected[0]))

    bench.run(start(testbench), start(other))
    for i, (got, wanted) in enumerate(zip(bench.got, expected, strict=True)):
        assert got == wanted
        assert bench.counted[i] == sum(beats for _, reader, _, beats in bench.ar if reader == i)


@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_a_port_that_only_reads(stall):
    window = (0x200, 0x600)
    bench = Bench(readers=1, writers=0, latency=9, stall=stall, window=window)

    async def testbench(ctx):
        for address, zeros in ((0x200, ()), (0x400, range(64, 128)), (0x100, range(32))):
            bench.got[0].clear()
            await bench.request(ctx, bench.readers[0], address, 128)
            await bench.until(ctx, lambda: len(bench.got[0]) == 128)
            assert bench.got[0] == bench.expect(address, 128, zeros)
            await bench.until_idle(ctx)
        assert ctx.get(bench.dut.fault_window) == 1
        assert ctx.get(bench.dut.fault_address) == 0x600
        assert not ctx.get(bench.dut.axi_mem.awvalid) and not ctx.get(bench.dut.axi_mem.wvalid)

    bench.run(start(testbench))


def test_an_empty_window_allows_nothing():
    bench = Bench(window=(0, 0))

    async def testbench(ctx):
        await bench.request(ctx, bench.readers[0], 0, 65)
        await bench.until(ctx, lambda: len(bench.got[0]) == 65)
        await bench.until_idle(ctx)

    bench.run(start(testbench))
    assert bench.got[0] == [(0, k == 64) for k in range(65)]
    assert bench.ar == []


def test_the_whole_address_space_can_be_allowed():
    """Unaligned limits count for whole beats only; addresses do not wrap past the last block."""
    top = 1 << PRESETS["tiny"].address_bits
    bench = Bench(window=(top - SIZE + 3, top))

    async def testbench(ctx):
        await bench.request(ctx, bench.readers[0], top - SIZE, 1)  # its first bytes are outside
        await bench.request(ctx, bench.readers[0], top - 16, 4)  # runs over the top, into 0
        await bench.until(ctx, lambda: len(bench.got[0]) == 5)

    bench.beat = lambda address: address & 0xFFFF
    bench.run(start(testbench))
    assert bench.got[0] == [(0, 1), (0xFFF0, 0), (0xFFF8, 0), (0, 0), (0, 1)]


@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_writes_outside_the_window_are_swallowed(stall):
    window = (4096, 8192)
    bench = Bench(stall=stall, seed=3, window=window)
    before = bytes(bench.memory)

    async def testbench(ctx):
        for address, beats in [(4096 - 16, 70), (8192 - 8, 3), (0, 130), (0, 5), (5000 & ~7, 2)]:
            words = [bench.random.getrandbits(64) for _ in range(beats)]
            await bench.request(ctx, bench.writers[0], address, beats)
            await bench.send(ctx, bench.writers[0], words, stall)
            await bench.until_done(ctx, 0)
            for k, word in enumerate(words):
                at = address + 8 * k
                if window[0] <= at < window[1]:
                    assert bench.beat(at) == word
        assert ctx.get(bench.dut.fault_window)
        assert ctx.get(bench.dut.fault_address) == 4096 - 16

    bench.run(start(testbench))
    assert bench.memory[:4096] == before[:4096]
    assert bench.memory[8192:] == before[8192:]


def test_bus_errors_are_latched_and_data_passes():
    bench = Bench(latency=20, refuse=(1024, 2048, 4096))

    async def testbench(ctx):
        dut = bench.dut
        for k in range(6):
            await bench.request(ctx, bench.readers[1], 512 * k + 256, 64)
        await bench.until(ctx, lambda: len(bench.got[1]) == 64 * 6)
        await ctx.tick()
        assert ctx.get(dut.fault_bus)
        assert not ctx.get(dut.fault_window)
        assert ctx.get(dut.fault_address) == 1024
        ctx.set(dut.clear_faults, 1)
        await ctx.tick()
        ctx.set(dut.clear_faults, 0)
        assert not ctx.get(dut.fault_bus)
        await bench.request(ctx, bench.writers[0], 4096, 2)
        await bench.send(ctx, bench.writers[0], [1, 2])
        await bench.until_done(ctx, 0)
        assert ctx.get(dut.fault_bus)
        assert ctx.get(dut.fault_address) == 0
        # Only the first fault is kept.
        await bench.request(ctx, bench.readers[0], SIZE, 1)
        await bench.until(ctx, lambda: len(bench.got[0]) == 1)
        assert ctx.get(dut.fault_bus)
        assert not ctx.get(dut.fault_window)

    bench.run(start(testbench))
    assert bench.got[1] == [
        beat for k in range(6) for beat in bench.expect(512 * k + 256, 64)]


@pytest.mark.parametrize("seed", range(8))
def test_flush_in_the_middle(seed):
    """Outstanding reads, queued requests, half a write burst, a zero fill: all are dropped."""
    held = []
    bench = Bench(readers=3, seed=seed, stall=0.3, latency=25, hold=lambda: bool(held),
                  window=(0, SIZE // 2))
    rng = random.Random(100 + seed)
    dut = bench.dut

    async def testbench(ctx):
        for r, reader in enumerate(bench.readers):
            for _ in range(rng.randint(0, 2)):
                await bench.request(ctx, reader, rng.choice([4096 * r, SIZE - 1024]), 100)
        sent = rng.randint(1, 100)
        if seed % 4:
            await bench.request(ctx, bench.writers[1], rng.choice([8192, SIZE // 2 - 600]), 130)
            await bench.send(ctx, bench.writers[1], [0xAA] * sent)
        if seed % 3 == 0:
            held.append(1)
        await ctx.tick().repeat(rng.randint(1, 30))
        ctx.set(dut.flush, 1)
        await ctx.tick()
        got = [len(g) for g in bench.got]
        aw, ar = len(bench.aw), len(bench.ar)
        for k in range(3000):
            if ctx.get(dut.idle):
                break
            assert not any(ctx.get(c.request.ready) for c in bench.readers + bench.writers)
            if k == 50:
                held.clear()
            if k == 5 and seed % 2:
                ctx.set(dut.flush, 0)  # too early: the port goes on by itself
            await ctx.tick()
        held.clear()
        assert bench.unanswered == 0, "idle must wait for memory"
        assert ctx.get(dut.idle)
        assert not ctx.get(dut.axi_mem.wvalid)
        assert not ctx.get(dut.axi_mem.awvalid)
        await ctx.tick().repeat(3)
        # What was in the output registers may still leave.
        assert len(bench.ar) <= ar + 1
        assert len(bench.aw) <= aw + 1
        ctx.set(dut.flush, 0)
        ctx.set(dut.clear_faults, 1)
        await ctx.tick()
        ctx.set(dut.clear_faults, 0)
        assert [len(g) for g in bench.got] == got, "a beat was delivered in a flush"
        assert bench.done == [0, 0]
        assert all(bench.beat(8192 + 8 * k) != 0xAA for k in range(sent, 130))
        # As after reset.
        for r, reader in enumerate(bench.readers):
            bench.got[r].clear()
            await bench.request(ctx, reader, 2048 * r + 64, 77)
        await bench.request(ctx, bench.writers[0], 16384, 66)
        await bench.send(ctx, bench.writers[0], range(66))
        await bench.until_done(ctx, 0)
        for r in range(3):
            await bench.until(ctx, lambda r=r: len(bench.got[r]) == 77)
            assert bench.got[r] == bench.expect(2048 * r + 64, 77)
        assert [bench.beat(16384 + 8 * k) for k in range(66)] == list(range(66))
        assert not ctx.get(dut.fault_window)
        await bench.until_idle(ctx)

    bench.run(start(testbench))


def test_flush_completes_a_half_sent_burst_with_strobes_off():
    bench = Bench()
    dut = bench.dut

    async def testbench(ctx):
        await bench.request(ctx, bench.writers[0], 512, 20)
        await bench.send(ctx, bench.writers[0], [7] * 5)
        await ctx.tick().repeat(2)
        ctx.set(dut.flush, 1)
        await ctx.tick().repeat(2)
        await ctx.tick().until(dut.idle)
        ctx.set(dut.flush, 0)

    before = bytes(bench.memory)
    bench.run(start(testbench))
    assert [strobes for _, strobes in bench.w_beats] == [0xFF] * 5 + [0] * 15
    assert bench.written == 5
    assert bench.memory[552:] == before[552:]


@pytest.mark.parametrize(("readers", "writers"), [(3, 2), (1, 0)])
@pytest.mark.parametrize("seed", range(5))
def test_reset_while_memory_goes_on(seed, readers, writers):
    """At any moment, more than once: nothing late is delivered, nothing half is left on the bus."""
    rng = random.Random(200 + seed)
    bench = Bench(readers=readers, writers=writers, seed=seed, stall=rng.choice([0.0, 0.3, 0.6]),
                  latency=rng.choice([0, 5, 60, 300]))
    clients = bench.readers + bench.writers

    async def busy(ctx, cycles):
        """Let every client ask for as much as it can."""
        def ask(one):
            beats = rng.choice([1, rng.randint(1, 100)])
            half = SIZE // 2 if one in bench.writers else 0
            ctx.set(one.request.payload.address, half + 8 * rng.randrange(4096 - beats))
            ctx.set(one.request.payload.beats, beats)

        for one in clients:
            ask(one)
            ctx.set(one.request.valid, 1)
        for one in bench.writers:
            ctx.set(one.data.valid, 1)
        for _ in range(cycles):
            _, _, *taken = await ctx.tick().sample(*(one.request.ready for one in clients))
            for one, ready in zip(clients, taken, strict=True):
                if ready:
                    ask(one)

    async def testbench(ctx):
        for most in (10, 40, 150):
            await busy(ctx, rng.randint(1, most))
            ctx.set(bench.reset, 1)
            await ctx.tick()
            for one in clients:
                ctx.set(one.request.valid, 0)
            for one in bench.writers:
                ctx.set(one.data.valid, 0)
            for _ in range(rng.choice([0, 1, 2, 50])):
                await ctx.tick()
            ctx.set(bench.reset, 0)
            before = len(bench.ar), len(bench.aw), [len(got) for got in bench.got], list(bench.done)
            for k, one in enumerate(bench.readers):
                ctx.set(one.request.payload.address, 8 * k)
                ctx.set(one.request.payload.beats, 1)
                ctx.set(one.request.valid, 1)
            while not any(ctx.get(one.request.ready) for one in bench.readers):
                assert [len(got) for got in bench.got] == before[2], "a late beat was delivered"
                await ctx.tick()
            # One burst may have been offered in the cycle in which the reset came.
            assert len(bench.ar) <= before[0] + 1
            assert len(bench.aw) <= before[1] + 1
            assert bench.unanswered == 0
            assert bench.done == before[3]
            for one in bench.readers:
                ctx.set(one.request.valid, 0)
            for got in bench.got:
                got.clear()
            for k, one in enumerate(bench.readers):
                await bench.request(ctx, one, 512 * k + 64, 77)
            for k, one in enumerate(bench.writers):
                words = [rng.getrandbits(64) for _ in range(66)]
                await bench.request(ctx, one, SIZE - 2048, 66)
                await bench.send(ctx, one, words)
                await bench.until_done(ctx, k)
                assert [bench.beat(SIZE - 2048 + 8 * i) for i in range(66)] == words
            for k in range(readers):
                await bench.until(ctx, lambda k=k: len(bench.got[k]) == 77, limit=9000)
                assert bench.got[k] == bench.expect(512 * k + 64, 77)
            await bench.until_idle(ctx)

    bench.run(start(testbench))


def test_reset_with_memory():
    """What is asked of a memory that is reset, too, is not waited for; nothing is offered."""
    bench = Bench(readers=1, writers=1, latency=50)
    dut, axi = bench.dut, bench.dut.axi_mem

    async def testbench(ctx):
        await bench.request(ctx, bench.readers[0], 0, 300)
        await bench.request(ctx, bench.writers[0], 4096, 300)
        await bench.send(ctx, bench.writers[0], [1] * 10)
        bench.off = True
        await ctx.tick().repeat(3)  # so that something waits on every channel
        await bench.send(ctx, bench.writers[0], [1])
        for signal in (bench.reset, dut.forget):
            ctx.set(signal, 1)
        await ctx.tick()
        assert not any(ctx.get(valid) for valid in (axi.arvalid, axi.awvalid, axi.wvalid))
        bench.got[0].clear()
        bench.off = False
        for signal in (bench.reset, dut.forget):
            ctx.set(signal, 0)
        await bench.request(ctx, bench.readers[0], 64, 77)
        await bench.request(ctx, bench.writers[0], 8192, 66)
        await bench.send(ctx, bench.writers[0], range(66))
        await bench.until_done(ctx, 0)
        await bench.until(ctx, lambda: len(bench.got[0]) == 77)
        assert bench.got[0] == bench.expect(64, 77)
        assert [bench.beat(8192 + 8 * k) for k in range(66)] == list(range(66))
        await bench.until_idle(ctx)

    bench.run(start(testbench))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"readers": 0, "writers": 1}, "readers must be from 1 to 16, not 0"),
    ({"readers": 1, "writers": 17}, "writers must be from 0 to 16, not 17"),
])
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemoryPort(PRESETS["tiny"], **arguments)
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig"):
        MemoryPort("tiny", readers=1, writers=1)
