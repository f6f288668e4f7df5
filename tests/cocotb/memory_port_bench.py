"""cocotb bench of the memory port: runs inside the simulator, started by test_memory_port.py."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge, gather

from moeaccel.config import preset
from moeaccel.sim import bfm
from moeaccel.sim.cosim.memory import StallModel

CONFIG = preset(os.environ["BENCH_CONFIG"])
READERS = int(os.environ["BENCH_READERS"])
WRITERS = int(os.environ["BENCH_WRITERS"])
SEED = cocotb.RANDOM_SEED

BEAT = CONFIG.port_bytes
BLOCK = CONFIG.max_burst_beats * BEAT
BASE, LIMIT = 0x10_0000, 0x20_0000
READ_REGION = (BASE, BASE + 0x4000)
WRITE_REGION = (BASE + 0x8000, LIMIT)

STALLS = {
    "none": None,
    "light": StallModel.uniform(0.1, length=2),
    "heavy": StallModel.uniform(0.5, length=8),
}


@dataclass(frozen=True)
class Burst:
    """Beats of a request that stay within one aligned block."""

    address: int
    beats: int

    @property
    def inside(self) -> bool:
        """Whether the window allows it."""
        return BASE <= self.address and self.address + self.beats * BEAT <= LIMIT


def bursts(address: int, beats: int) -> Iterator[Burst]:
    """Yield the bursts that a request must become."""
    while beats:
        now = min(beats, (BLOCK - address % BLOCK) // BEAT)
        yield Burst(address, now)
        address, beats = address + now * BEAT, beats - now


class Driver:
    """Sends the payloads of one stream, with random pauses."""

    def __init__(self, dut, name, draw, pause):
        self._clk = dut.clk
        self._valid, self._ready, self._payload = (
            getattr(dut, f"{name}__{member}") for member in ("valid", "ready", "payload"))
        self._draw, self._pause = draw, pause
        self._valid.value = 0

    async def send(self, payload):
        while self._draw.random() < self._pause:
            await RisingEdge(self._clk)
        self._valid.value = 1
        self._payload.value = payload
        await RisingEdge(self._clk)
        while not self._ready.value:
            await RisingEdge(self._clk)
        self._valid.value = 0


class Reader:
    """One reader: driver of its requests, monitor of its beats, in-order checker."""

    def __init__(self, bench, index):
        dut = bench.dut
        self._bench, self._index = bench, index
        self._requests = Driver(dut, f"reader{index}__request", bench.draw, bench.pause)
        self._valid, self._data, self._last = (
            getattr(dut, f"reader{index}__{member}") for member in ("valid", "data", "last"))
        self.expected: deque[tuple[int, int]] = deque()
        self.received = 0

    async def request(self, address, beats):
        """Ask for beats, and expect the memory's bytes, or zeros for suppressed bursts."""
        left = beats
        for burst in bursts(address, beats):
            for beat in range(burst.beats):
                data = self._bench.memory.read(burst.address + beat * BEAT, BEAT)
                left -= 1
                self.expected.append(
                    (int.from_bytes(data, "little") if burst.inside else 0, int(left == 0)))
        await self._requests.send(address | beats << CONFIG.address_bits)

    async def monitor(self):
        """Compare every beat."""
        while True:
            await RisingEdge(self._bench.dut.clk)
            if self._valid.value:
                assert self.expected, f"reader {self._index}: a beat that nobody asked for"
                got = self._data.value.to_unsigned(), int(self._last.value)
                want = self.expected.popleft()
                assert got == want, f"reader {self._index}, beat {self.received}: {got} != {want}"
                self.received += 1

    async def drained(self):
        """Wait for all that was asked for."""
        for _ in range(100_000):
            if not self.expected:
                return
            await RisingEdge(self._bench.dut.clk)
        raise AssertionError(f"reader {self._index}: {len(self.expected)} beats never came")


class Writer:
    """One writer: its requests, its data, its acknowledgement."""

    def __init__(self, bench, index):
        dut = bench.dut
        self._bench, self._index = bench, index
        self._requests = Driver(dut, f"writer{index}__request", bench.draw, bench.pause)
        self._data = Driver(dut, f"writer{index}__data", bench.draw, bench.pause)
        self._done = getattr(dut, f"writer{index}__done")

    async def write(self, address, beats):
        """Write random beats; return when they are acknowledged, checked against the memory."""
        data = bytes(self._bench.draw.randrange(256) for _ in range(beats * BEAT))
        before = self._bench.memory.read(address, len(data))
        expected = bytearray(before)
        for burst in bursts(address, beats):
            place = burst.address - address
            if burst.inside:
                size = burst.beats * BEAT
                expected[place:place + size] = data[place:place + size]
        acknowledged = cocotb.start_soon(self._wait_done())
        await self._requests.send(address | beats << CONFIG.address_bits)
        for beat in range(beats):
            assert not acknowledged.done(), "done came before the data"
            await self._data.send(
                int.from_bytes(data[beat * BEAT:(beat + 1) * BEAT], "little"))
        await acknowledged
        # Acknowledged means in memory, at this very moment.
        assert self._bench.memory.read(address, len(data)) == bytes(expected)

    async def _wait_done(self):
        for _ in range(100_000):
            await RisingEdge(self._bench.dut.clk)
            if self._done.value:
                return
        raise AssertionError(f"writer {self._index}: done never came")


class Testbench:
    """Memory behind the port, readers and writers in front of it."""

    __test__ = False  # not a test class for pytest

    def __init__(self, dut, *, stalls="none", pause=0.0):
        self.dut = dut
        self.draw = random.Random(f"{SEED} {stalls} {pause}")
        self.pause = pause
        self.memory = bfm.MemoryBus(dut, stalls=STALLS[stalls], seed=SEED)
        self.memory.write(READ_REGION[0] - BLOCK, self.draw.randbytes(
            READ_REGION[1] - READ_REGION[0] + BLOCK))
        self.memory.write(LIMIT - BLOCK, self.draw.randbytes(2 * BLOCK))
        self.readers = [Reader(self, i) for i in range(READERS)]
        self.writers = [Writer(self, i) for i in range(WRITERS)]

    async def start(self):
        self.dut.window_base.value = BASE
        self.dut.window_limit.value = LIMIT
        self.dut.flush.value = 0
        self.dut.forget.value = 0
        self.dut.clear_faults.value = 0
        for reader in self.readers:
            cocotb.start_soon(reader.monitor())
        await bfm.start(self.dut)
        await ClockCycles(self.dut.clk, 4)

    def place(self, region, most=150):
        """Return a random (address, beats) within a region."""
        beats = self.draw.choice((1, self.draw.randint(1, 8), self.draw.randint(1, most)))
        first, behind = region
        address = self.draw.randrange(first, behind - beats * BEAT + 1, BEAT)
        return address, beats

    async def read_some(self, reader, count):
        for _ in range(count):
            await reader.request(*self.place(READ_REGION))
        await reader.drained()

    async def write_some(self, writer, count):
        size = (WRITE_REGION[1] - WRITE_REGION[0] - BLOCK) // WRITERS // BLOCK * BLOCK
        first = WRITE_REGION[0] + size * writer._index
        for _ in range(count):
            await writer.write(*self.place((first, first + size), most=80))

    async def settle(self):
        """Wait until the port says that nothing is unfinished."""
        await bfm.wait_high(self.dut, self.dut.idle, max_cycles=100_000)
        await ClockCycles(self.dut.clk, 4)

    def faults(self):
        """Return (window, bus, address)."""
        dut = self.dut
        return (int(dut.fault_window.value), int(dut.fault_bus.value),
                dut.fault_address.value.to_unsigned())

    async def clear_faults(self):
        self.dut.clear_faults.value = 1
        await RisingEdge(self.dut.clk)
        self.dut.clear_faults.value = 0
        await ClockCycles(self.dut.clk, 2)
        assert self.faults()[:2] == (0, 0)

    def check_window(self):
        """Nothing outside the window was touched."""
        low, high = self.memory.touched
        assert low >= BASE, f"touched {low:#x}"
        assert high <= LIMIT, f"touched {high - 1:#x}"


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(stalls=list(STALLS), pause=[0.0, 0.5])
async def all_clients_at_once(dut, stalls, pause):
    """Data of every reader in order, writes in memory when acknowledged, whatever pauses."""
    bench = Testbench(dut, stalls=stalls, pause=pause)
    await bench.start()
    await gather(*(bench.read_some(reader, 12) for reader in bench.readers),
                 *(bench.write_some(writer, 6) for writer in bench.writers))
    await bench.settle()
    assert bench.faults()[:2] == (0, 0)
    bench.check_window()


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(stalls=["none", "heavy"])
async def suppressed_reads_are_zeros_in_order(dut, stalls):
    """Requests across both ends of the window, between others that are inside."""
    bench = Testbench(dut, stalls=stalls, pause=0.2)
    await bench.start()
    reader = bench.readers[0]
    others = [cocotb.start_soon(bench.read_some(other, 8)) for other in bench.readers[1:]]
    across = [
        (BASE - 3 * BEAT, 5), (LIMIT - 2 * BEAT, 4), (BASE - BLOCK, 1), (LIMIT, 3),
        (LIMIT - BLOCK - BEAT, 2 * CONFIG.max_burst_beats), ((1 << CONFIG.address_bits) - BEAT, 1),
    ]
    for address, beats in across:
        await reader.request(*bench.place(READ_REGION))
        await reader.request(address, beats)
        await reader.request(*bench.place(READ_REGION))
        await reader.drained()
        await bench.settle() if not bench.readers[1:] else await ClockCycles(dut.clk, 4)
        first = next(burst for burst in bursts(address, beats) if not burst.inside)
        assert bench.faults() == (1, 0, first.address)
        await bench.clear_faults()
    for other in others:
        await other
    await bench.settle()
    assert bench.faults()[:2] == (0, 0)
    bench.check_window()


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(stalls=["none", "heavy"])
async def suppressed_writes_are_swallowed(dut, stalls):
    """A writer's request across the window is acknowledged, and nothing outside changes."""
    bench = Testbench(dut, stalls=stalls, pause=0.2)
    await bench.start()
    writer = bench.writers[0]
    for address, beats in [(BASE - 2 * BEAT, 6), (LIMIT - BEAT, 3), (LIMIT + BLOCK, 2)]:
        await writer.write(address, beats)
        first = next(burst for burst in bursts(address, beats) if not burst.inside)
        assert bench.faults() == (1, 0, first.address)
        await bench.clear_faults()
        await writer.write(*bench.place((WRITE_REGION[0], WRITE_REGION[1] - BLOCK)))
        assert bench.faults()[:2] == (0, 0)
    await bench.settle()
    bench.check_window()


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(stalls=["none", "heavy"])
async def errors_of_memory_are_faults(dut, stalls):
    """SLVERR sets fault_bus with the burst's address (0 for writes), and nothing stops."""
    bench = Testbench(dut, stalls=stalls)
    await bench.start()
    reader, writer = bench.readers[-1], bench.writers[-1]
    bad = READ_REGION[0] + 2 * BLOCK + 3 * BEAT
    bench.memory.write(bad, bytes(BEAT))  # the slave answers zeros
    bench.memory.inject_error(bad, BEAT)
    await reader.request(READ_REGION[0] + BLOCK, 3 * CONFIG.max_burst_beats)
    await reader.drained()
    await ClockCycles(dut.clk, 4)
    assert bench.faults() == (0, 1, READ_REGION[0] + 2 * BLOCK)
    await bench.clear_faults()
    bench.memory.clear_errors()

    bench.memory.inject_error(LIMIT - BLOCK, BLOCK)
    bench.memory.write(LIMIT - BLOCK, bytes(BLOCK))
    waiting = cocotb.start_soon(writer._wait_done())
    await writer._requests.send(LIMIT - BLOCK | 2 << CONFIG.address_bits)
    await writer._data.send(1)
    await writer._data.send(2)
    await waiting
    await ClockCycles(dut.clk, 4)
    assert bench.faults() == (0, 1, 0)
    assert bench.memory.read(LIMIT - BLOCK, BLOCK) == bytes(BLOCK)
    await bench.clear_faults()
    bench.memory.clear_errors()
    await gather(bench.read_some(reader, 3), bench.write_some(writer, 2))
    assert bench.faults()[:2] == (0, 0)


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(stalls=["none", "light", "heavy"])
async def flush_at_any_time(dut, stalls):
    """What was accepted is forgotten, the bus is finished, and everything works again."""
    bench = Testbench(dut, stalls=stalls)
    await bench.start()
    for _ in range(6):
        work = [cocotb.start_soon(bench.read_some(reader, 50)) for reader in bench.readers]
        work += [cocotb.start_soon(bench.write_some(writer, 50)) for writer in bench.writers]
        await ClockCycles(dut.clk, bench.draw.randint(3, 300))
        dut.flush.value = 1
        for task in work:
            task.cancel()
        for reader in bench.readers:
            reader._requests._valid.value = 0
        for writer in bench.writers:
            writer._requests._valid.value = writer._data._valid.value = 0
        await ClockCycles(dut.clk, 2)  # flush is seen a cycle late
        for reader in bench.readers:
            reader.expected.clear()
        await bench.settle()
        dut.flush.value = 0
        await ClockCycles(dut.clk, 2)
        await gather(*(bench.read_some(reader, 2) for reader in bench.readers),
                     *(bench.write_some(writer, 2) for writer in bench.writers))
        await bench.settle()
    assert bench.faults()[:2] == (0, 0)
    bench.check_window()
