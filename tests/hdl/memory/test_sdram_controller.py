"""SdramController against the chip that checks it."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.memory.axi import AXI4Signature
from moeaccel.hdl.memory.axi_arbiter import AxiArbiter
from moeaccel.hdl.memory.memory_port import ID_BITS, MemoryPort
from moeaccel.hdl.memory.sdram import CHIP_BYTES, SdramTiming
from moeaccel.hdl.memory.sdram_controller import SdramController
from moeaccel.hdl.weights.weight_streamer import WeightStreamer
from moeaccel.sim.board.sdram_chip import Violation
from tests.support.axi_master import AxiMaster
from tests.support.sdram import MemorySystem, short_timing

OKAY, DECERR = 0, 3
ROW_BYTES = 1024  # of a bank
BANKS = 4


class Bench:
    """A controller with a chip and one master."""

    def __init__(self, *, clock_hz=120_000_000, io_cycles=0, rows=16, limits=None, **options):
        self.timing = short_timing(clock_hz, **(limits or {}))
        self.dut = MemorySystem(timing=self.timing, io_cycles=io_cycles, rows=rows)
        self.size = rows * BANKS * ROW_BYTES
        self.master = AxiMaster(self.dut.axi, **options)
        self.rng = random.Random(options.get("seed", 0))
        self.image = bytearray(self.size)

    def write(self, address, beats, i=0, *, strobes=False):
        """Queue a random write, in the image too; its beats may have random strobes."""
        words = [self.rng.getrandbits(64) for _ in range(beats)]
        masks = [self.rng.getrandbits(8) if strobes else 255 for _ in range(beats)]
        self.master.write(address, words, i, masks)
        for k, (word, mask) in enumerate(zip(words, masks, strict=True)):
            for byte in range(8):
                if mask >> byte & 1:
                    self.image[address + 8 * k + byte] = word >> 8 * byte & 255

    def words(self, address, beats):
        return [int.from_bytes(self.image[address + 8 * k:address + 8 * k + 8], "little")
                for k in range(beats)]

    async def settle(self, ctx):
        """Power up: let one beat through, then count from here."""
        self.master.read(0, 1)
        await self.master.until_idle(ctx)
        self.master.answers.clear()
        self.master.r_cycles.clear()
        self.master.ar_cycles.clear()

    def run(self, testbench):
        simulator = Simulator(self.dut)
        simulator.add_clock(1e-6)
        simulator.add_testbench(self.master.serve, background=True)

        async def checked(ctx):
            await testbench(ctx)
            assert ctx.get(self.dut.o_violation) == Violation.NONE

        simulator.add_testbench(checked)
        simulator.run()


def random_burst(rng, size):
    """Return address and beats of a burst within 4 KiB: short, long, of any alignment."""
    beats = rng.choice([1, 1, 2, 3, rng.randint(1, 20), 64, rng.randint(1, 256)])
    page, start = rng.randrange(size // 4096), rng.randrange(512 - beats + 1)
    return 4096 * page + 8 * start, beats


@pytest.mark.parametrize(("clock_hz", "io_cycles", "stall", "seed"), [
    (120_000_000, 0, 0.0, 1),
    (100_000_000, 2, 0.5, 2),
    (120_000_000, 3, 0.9, 3),
])
def test_random_traffic(clock_hz, io_cycles, stall, seed):
    """Bits, under stalls on all channels; reads see the writes acknowledged before them."""
    bench = Bench(clock_hz=clock_hz, io_cycles=io_cycles, seed=seed, stall=stall,
                  cycle_limit=60_000)
    rng, master = random.Random(seed), bench.master
    expected = []

    async def testbench(ctx):
        for _ in range(4):
            bursts, writes = [random_burst(rng, bench.size) for _ in range(5)], 0
            for address, beats in bursts:
                bench.write(address, beats, writes % 8, strobes=rng.random() < 0.5)
                writes += 1
            await master.until_idle(ctx)
            for address, beats in [*bursts[:3], random_burst(rng, bench.size)]:
                i = rng.randrange(8)
                master.read(address, beats, i)
                expected.append((i, bench.words(address, beats), [OKAY] * beats))
        await master.until_idle(ctx)

    bench.run(testbench)
    assert master.answers == expected
    assert master.acknowledged == [(k % 8, OKAY) for _ in range(4) for k in range(5)]


def test_reads_and_writes_at_once():
    """Streams that do not meet keep their bits, whatever the order; acknowledged in order."""
    bench = Bench(seed=5, stall=0.3, rows=2)
    rng, master, half = random.Random(6), bench.master, bench.size // 2

    async def testbench(ctx):
        bench.write(0, 256)
        bench.write(2048, 256)
        await master.until_idle(ctx)
        expected = []
        for _ in range(15):
            beats = rng.randint(1, 40)
            address = 8 * rng.randrange(512 - beats)
            master.read(address, beats, 1)
            expected.append(bench.words(address, beats))
            bench.write(half + address, beats, 2, strobes=True)
        await master.until_idle(ctx)
        assert [words for _, words, _ in master.answers] == expected
        master.answers.clear()
        master.read(half, 256)
        await master.until_idle(ctx)
        assert master.answers == [(0, bench.words(half, 256), [OKAY] * 256)]

    bench.run(testbench)


def test_a_late_writer_holds_up_nobody():
    """While a write's data is missing, reads go on; the data arrives, and is written."""
    bench = Bench()
    master = bench.master

    async def testbench(ctx):
        await bench.settle(ctx)
        bench.write(0, 64)
        late = [master.w.pop() for _ in range(4)][::-1]
        for k in range(8):
            master.read(4096 + 512 * k, 64)
        while len(master.answers) < 8:
            await ctx.tick()
        assert master.acknowledged == []
        master.w.extend(late)
        await master.until_idle(ctx)
        master.read(0, 64)
        await master.until_idle(ctx)
        assert master.answers[-1] == (0, bench.words(0, 64), [OKAY] * 64)

    bench.run(testbench)


def test_data_may_come_before_its_address():
    bench = Bench()
    master = bench.master

    async def testbench(ctx):
        bench.write(2048, 256)
        bench.write(512, 200)
        late = [master.aw.pop() for _ in range(2)][::-1]
        while master.w:
            await ctx.tick()
        master.aw.extend(late)
        await master.until_idle(ctx)
        master.read(512, 200)
        master.read(2048, 256)
        await master.until_idle(ctx)
        assert [words for _, words, _ in master.answers] == [bench.words(512, 200),
                                                             bench.words(2048, 256)]

    bench.run(testbench)


def test_a_reader_that_takes_nothing():
    """The queue of answers fills, refreshes go on, and no beat is lost."""
    bench = Bench(seed=1, stalls={"r": 1.0}, limits={"refresh_ns": 1000})
    master = bench.master

    async def testbench(ctx):
        bench.write(0, 256)
        while len(master.acknowledged) < 1:
            await ctx.tick()
        master.read(0, 256)
        await ctx.tick().repeat(3000)  # the chip would miss 25 refreshes
        assert ctx.get(bench.dut.o_violation) == Violation.NONE
        assert master.r_cycles == []
        master.stalls["r"] = 0.5
        await master.until_idle(ctx)
        assert master.answers == [(0, bench.words(0, 256), [OKAY] * 256)]

    bench.run(testbench)


def test_beyond_the_chip():
    """DECERR on every beat, in order, and nothing is written: addresses never wrap."""
    bench = Bench()
    master = bench.master

    async def testbench(ctx):
        bench.write(0, 8)
        await master.until_idle(ctx)
        for base in (CHIP_BYTES, 1 << 31):
            master.write(base, [1, 2, 3, 4, 5, 6, 7, 8], 2)
            master.read(base, 5, 1)
            master.read(0, 8, 2)
        await master.until_idle(ctx)

    bench.run(testbench)
    assert master.acknowledged == [(0, OKAY), (2, DECERR), (2, DECERR)]
    assert [(i, answers) for i, _, answers in master.answers] \
        == [(1, [DECERR] * 5), (2, [OKAY] * 8)] * 2
    assert all(words == bench.words(0, 8) for i, words, _ in master.answers if i == 2)


# -- cycles ----------------------------------------------------------------------------------------


def test_a_stream_loses_only_refreshes():
    """Every beat follows its predecessor by a frame, but for four refreshes at a time."""
    bench = Bench(limits={"refresh_ns": 2000})
    master, bursts = bench.master, 12

    async def testbench(ctx):
        await bench.settle(ctx)
        for k in range(bursts):
            master.read(512 * k, 64, k % 8)
        await master.until_idle(ctx)

    bench.run(testbench)
    gaps = [b - a for a, b in pairwise(master.r_cycles)]
    due = sum(gaps) // (bench.timing.refresh // 4 * 4)
    frames = 2 + 4 * -(-bench.timing.rfc // 4)
    assert due > 8
    assert [gap for gap in gaps if gap != 4] == [4 * (1 + frames)] * (due // 4)


@pytest.mark.parametrize(("first", "second", "frames"), [
    (0, 512, 0),                            # the same row
    (0, ROW_BYTES, 0),                      # a row in the next bank
    (ROW_BYTES, 12 * ROW_BYTES, 0),         # a row in an earlier bank
    (0, BANKS * ROW_BYTES, 2),              # another row of the same bank
])
def test_frames_lost_between_bursts(first, second, frames):
    bench = Bench(limits={"refresh_ns": 15_000})
    master = bench.master

    async def testbench(ctx):
        await bench.settle(ctx)
        master.read(first, 64)
        master.read(second, 64)
        await master.until_idle(ctx)

    bench.run(testbench)
    assert master.r_cycles[64] - master.r_cycles[63] == 4 * (1 + frames)


def test_single_beats_of_an_open_row_fill_the_bus():
    bench = Bench(limits={"refresh_ns": 15_000})
    master = bench.master

    async def testbench(ctx):
        await bench.settle(ctx)
        for _ in range(50):
            master.read(8 * bench.rng.randrange(128), 1)
        await master.until_idle(ctx)

    bench.run(testbench)
    assert master.r_cycles[-1] - master.r_cycles[0] == 4 * 49


@pytest.mark.parametrize("io_cycles", [0, 2])
def test_latency_of_a_lone_read(io_cycles):
    """Cycles from AR to R: one of four, depending on where in a frame the address comes."""
    bench = Bench(limits={"refresh_ns": 15_000}, io_cycles=io_cycles)
    master = bench.master
    open_row, other_row = [], []

    async def testbench(ctx):
        for gap in range(1, 5):
            await bench.settle(ctx)
            for seen, address in ((open_row, 8), (other_row, 4 * ROW_BYTES)):
                await ctx.tick().repeat(gap + 40)
                begin = len(master.r_cycles)
                master.read(address, 1)
                await master.until_idle(ctx)
                seen.append(master.r_cycles[begin] - master.ar_cycles[begin])

    bench.run(testbench)
    assert sorted(open_row) == [19 + io_cycles + k for k in range(4)]
    assert sorted(other_row) == [23 + io_cycles + k for k in range(4)]


class WeightPath(wiring.Component):
    """WeightStreamer, MemoryPort, AxiArbiter with a second master, MemorySystem."""

    def __init__(self, *, config, timing):
        self.streamer = WeightStreamer(config)
        self.port = MemoryPort(config, readers=1, writers=1)
        self.arbiter = AxiArbiter(addr_width=32, data_width=64, id_width=ID_BITS)
        self.memory = MemorySystem(timing=timing, id_width=ID_BITS + 1, io_cycles=2)
        super().__init__({
            "i_request": In(self.streamer.i_request.signature.flip()),
            "axi": In(AXI4Signature(32, 64, ID_BITS)),
            "o_beat": Out(1),
            "o_violation": Out(Violation),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.streamer, m.submodules.port = streamer, port = self.streamer, self.port
        m.submodules.arbiter, m.submodules.memory = arbiter, system = self.arbiter, self.memory
        wiring.connect(m, streamer=streamer.reader, port=port.reader0)
        wiring.connect(m, port=port.axi_mem, arbiter=arbiter.master0)
        wiring.connect(m, outer=wiring.flipped(self.axi), arbiter=arbiter.master1)
        wiring.connect(m, arbiter=arbiter.slave, memory=system.axi)
        wiring.connect(m, outer=wiring.flipped(self.i_request), streamer=streamer.i_request)
        m.d.comb += [
            streamer.o_word.ready.eq(1),
            port.window_limit.eq(CHIP_BYTES),
            self.o_beat.eq(streamer.reader.valid),
            self.o_violation.eq(system.o_violation),
        ]
        return m


def test_weights_come_at_the_full_rate():
    """What the accelerator asks ahead covers all latencies: beats follow each other by a frame.

    Only refreshes, and single beats of the other master, come between.
    """
    timing = short_timing(120_000_000, refresh_ns=2000)
    config = PRESETS["ulx3s"]
    dut = WeightPath(config=config, timing=timing)
    other = AxiMaster(dut.axi)
    beats = []

    async def testbench(ctx):
        other.read(0, 1)
        await other.until_idle(ctx)  # powered up
        for _ in range(4):
            other.read(0, 1)
        ctx.set(dut.i_request.p.address, 64)
        ctx.set(dut.i_request.p.words, 600 * 8 // config.word_bytes)
        ctx.set(dut.i_request.valid, 1)
        await ctx.tick()
        ctx.set(dut.i_request.valid, 0)
        for cycle in range(4000):
            if ctx.get(dut.o_beat):
                beats.append(cycle)
            await ctx.tick()
        assert ctx.get(dut.o_violation) == Violation.NONE

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(other.serve, background=True)
    simulator.add_testbench(testbench)
    simulator.run()
    assert len(beats) == 600
    assert other.idle
    gaps = [b - a for a, b in pairwise(beats)]
    refresh = 4 * (1 + 2 + 4 * -(-timing.rfc // 4))
    due = sum(gaps) // (timing.refresh // 4 * 4)
    assert gaps.count(refresh) == due // 4 > 1
    # A frame for each of the other's four beats, and two frames to each row and back.
    assert sum(gap - 4 for gap in gaps if gap != refresh) <= 4 * 4 * (1 + 2 * 2)


@pytest.mark.parametrize(("options", "message"), [
    ({"timing": SdramTiming.ulx3s(clock_hz=150_000_000)},
     "clock_hz must be low enough for rcd in 3 cycles, not 150000000: rcd takes 4 cycles of it"),
    ({"io_cycles": 5}, "io_cycles must be from 0 to 4, not 5"),
    ({"timing": replace(SdramTiming.ulx3s(clock_hz=100_000_000), ras_max_ns=40_000)},
     "ras_max must be longer than refreshes may be postponed, not 4000 cycles"),
])
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SdramController(**{"timing": short_timing(100_000_000), "id_width": 1, **options})
    with pytest.raises(TypeError, match="timing must be a SdramTiming, not 7"):
        SdramController(timing=7, id_width=1)
