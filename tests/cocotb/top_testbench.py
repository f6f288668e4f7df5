"""What drives and checks the whole accelerator under cocotb; the tests are in top_bench.py."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import cocotb
import numpy as np
import torch
from cocotb.triggers import ClockCycles

from moeaccel import golden
from moeaccel.config import preset
from moeaccel.formats import quantise
from moeaccel.golden import DeviceResult
from moeaccel.interface.commands import (
    COMPLETION,
    ENTRY_BYTES,
    EXPERT,
    LAYER,
    SUBMISSION,
    Opcode,
    Status,
    decode,
    encode,
)
from moeaccel.interface.registers import COUNTERS, REGISTERS
from moeaccel.sim import bfm
from moeaccel.sim.cosim.memory import StallModel
from moeaccel.sim.workload import Layout, random_experts, register_writes, start_writes

CONFIG = preset(os.environ["BENCH_CONFIG"])
SEED = cocotb.RANDOM_SEED
LANES, SLOTS = CONFIG.token_lanes, CONFIG.max_slots

STALLS = {
    "none": None,
    "light": StallModel.uniform(0.1, length=2),
    "heavy": StallModel.uniform(0.3, length=8),
    "reads": StallModel(ar=0.3, r=0.3, length=20),
    "writes": StallModel(aw=0.3, w=0.5, b=0.3, length=20),
}[os.environ.get("BENCH_STALLS", "none")]

TIMEOUT = {"timeout_time": 20, "timeout_unit": "ms"}
COMMAND_CYCLES = 400_000

torch.set_num_threads(1)


@dataclass
class Work:
    """A command on its way, and what must come of it."""

    fields: dict[str, int]
    status: Status = Status.OK
    detail: int | None = 0
    address: int | None = 0
    result: DeviceResult | None = None
    tag: int = -1
    completion: dict[str, int] = field(default_factory=dict)

    def ends_with(self, status, *, address=None):
        """Expect a failure that leaves nothing worth comparing; None: whatever it says."""
        self.status, self.detail, self.address, self.result = status, None, address, None


class Testbench:
    """Drivers on the ports, a memory layout, and a checker that knows the golden model."""

    __test__ = False  # not a test class for pytest

    def __init__(self, dut, *, ring_log2=2):
        self.dut = dut
        self.draw = np.random.default_rng(SEED)
        self.memory = bfm.MemoryBus(dut, stalls=STALLS, seed=SEED)
        self.registers = bfm.RegisterBus(dut, stalls=STALLS, seed=SEED + 1)
        self.layout = Layout(CONFIG)
        self.entries = 1 << ring_log2
        self.ring_log2 = ring_log2
        self.submissions = self.layout.reserve(ENTRY_BYTES * self.entries)
        self.completions = self.layout.reserve(ENTRY_BYTES * self.entries)
        self.next_tag = 0
        self.restart()

    def restart(self):
        """Empty rings, as after a reset."""
        self.tail = self.head = 0
        self.phase = 1
        self.in_flight: list[Work] = []
        self.memory.write(self.completions, bytes(ENTRY_BYTES * self.entries))

    async def write_registers(self, writes):
        for address, value in writes:
            await self.registers.write(address, value)

    async def read_register(self, name):
        return await self.registers.read(REGISTERS[name].address)

    async def set_up(self):
        await self.write_registers(start_writes(
            self.layout, submissions=self.submissions, completions=self.completions,
            ring_log2=self.ring_log2))

    async def start(self):
        await bfm.start(self.dut)
        await self.set_up()

    # -- commands ----------------------------------------------------------------------------------
    def layer(self, *, experts=4, d_model=64, d_expert=32, weight_format="int4_g32", planes=2,
              grid_exponent=-28, spread=0):
        """Place a layer of random experts; return (descriptor fields, experts)."""
        made = random_experts(self.draw, experts, d_model, d_expert, weight_format, spread=spread)
        fields = self.layout.place_experts(made, planes=planes, grid_exponent=grid_exponent)
        return fields, made

    def with_entry(self, layer, expert, **changes):
        """Place a layer that is in memory again, with one entry of its table changed."""
        size = ENTRY_BYTES * layer["num_experts"]
        table = bytearray(self.memory.read(layer["table_address"], size))
        entry = slice(ENTRY_BYTES * expert, ENTRY_BYTES * (expert + 1))
        table[entry] = encode(EXPERT, decode(EXPERT, bytes(table[entry])) | changes)
        return self.layout.place(
            encode(LAYER, {**layer, "table_address": self.layout.place(bytes(table))}))

    def x(self, tokens, d_in):
        """Return x with blocks of very different size, and zeros."""
        scale = np.exp2(self.draw.integers(-12, 4, (tokens, d_in // 32, 1)))
        scale *= self.draw.random((tokens, d_in // 32, 1)) < 0.9
        values = self.draw.standard_normal((tokens, d_in // 32, 32)) * scale
        return values.reshape(tokens, d_in).astype(np.float32)

    def experts(self, layer, ids, x=None, weights=None, **fields):
        """Place an EXPERTS command and what it must give."""
        descriptor, made = layer
        ids = np.asarray(ids)
        x = self.x(len(ids), descriptor["d_in"]) if x is None else x
        if weights is None:
            weights = self.draw.standard_normal(ids.shape).astype(np.float32)
        command = self.layout.place_command(descriptor, x, ids, weights)
        result = golden.experts(x, ids, weights, made, planes=descriptor["planes"],
                                grid_exponent=descriptor["grid_exponent"])
        return self._expect({"opcode": Opcode.EXPERTS, **command, **fields}, result)

    def gemm(self, tokens, d_in, d_out, *, weight_format="mxint8", planes=1, x=None):
        """Place a GEMM command and what it must give."""
        values = self.draw.standard_normal((d_out, d_in)).astype(np.float32)
        matrix = quantise(values, weight_format)
        descriptor = self.layout.place_linear(matrix, planes=planes)
        x = self.x(tokens, d_in) if x is None else x
        command = self.layout.place_command(descriptor, x)
        result = golden.gemm(x, matrix, planes=planes)
        return self._expect({"opcode": Opcode.GEMM, **command}, result)

    @staticmethod
    def _expect(fields, result):
        return Work(fields, *result.outcome, result)

    async def submit(self, *works, at_most=None):
        """Write submissions behind the tail and ring the doorbell once."""
        for address, data in self.layout.take():
            self.memory.write(address, data)
        for work in works:
            assert len(self.in_flight) < (at_most or self.entries - 1), "the ring is full"
            work.tag = self.next_tag
            self.next_tag = (self.next_tag + 1) & 0xFFFF
            entry = encode(SUBMISSION, {**work.fields, "tag": work.tag})
            self.memory.write(self.submissions + ENTRY_BYTES * self.tail, entry)
            self.tail = (self.tail + 1) % self.entries
            self.in_flight.append(work)
        await self.write_registers(register_writes(SQ_TAIL=self.tail))

    async def finish(self, count=None):
        """Wait for the oldest commands, all by default, and check each."""
        left = len(self.in_flight) if count is None else count
        while left:
            await bfm.wait_high(self.dut, self.dut.irq, max_cycles=COMMAND_CYCLES)
            await self.write_registers(register_writes(IRQ_STATUS=1))
            left -= self.accept(await self.read_register("CQ_TAIL"), left)
            await self.write_registers(register_writes(CQ_HEAD=self.head))

    def accept(self, tail, most=None):
        """Check the completions up to an index and return how many."""
        count = 0
        while count != most and self.head != tail:
            work = self.in_flight.pop(0)
            work.completion = self._completion()
            self.check(work)
            count += 1
        return count

    def _completion(self):
        """Return the next completion."""
        raw = self.memory.read(self.completions + ENTRY_BYTES * self.head, ENTRY_BYTES)
        values = decode(COMPLETION, raw)
        assert values.pop("phase") == self.phase
        assert not any(raw[28:]), "the rest of a completion must be zero"
        self.head = (self.head + 1) % self.entries
        self.phase ^= self.head == 0
        return values

    def check(self, work):
        """Compare a completion, and what the command wrote, with what must be."""
        got = work.completion
        assert got["tag"] == work.tag
        assert Status(got["status"]) == work.status, f"{Status(got['status'])!r}: {got}"
        assert work.detail is None or got["detail"] == work.detail, got
        assert work.address is None or got["address"] == work.address, \
            f"address {got['address']:#x}, not {work.address:#x}"
        assert got["cycles"] > 0
        assert got["underflows"] == (work.result.underflows if work.result else 0)
        if work.result is not None:
            wanted = work.result.y
            raw = self.memory.read(work.fields["y_address"], wanted.nbytes)
            y = np.frombuffer(raw, "<f4").reshape(wanted.shape)
            wrong = np.argwhere(y.view(np.uint32) != wanted.view(np.uint32))
            assert not len(wrong), (
                f"{len(wrong)} of {y.size} outputs differ, first at {wrong[0]}: "
                f"{y[tuple(wrong[0])]!r}, not {wanted[tuple(wrong[0])]!r}")

    async def run(self, *works):
        await self.submit(*works)
        await self.finish()

    async def counters(self):
        """Return the counters of a device that rests."""
        return {name: await self.read_register(f"{name.upper()}_LO") for name, _ in COUNTERS}

    async def end(self):
        """Check what holds after every test: nothing outside the window, no interrupt left."""
        await ClockCycles(self.dut.clk, 20)
        assert not self.dut.irq.value
        assert await self.read_register("STATUS") == 0
        low, high = self.memory.touched
        assert low >= self.layout.base, f"touched {low:#x}"
        assert high <= self.layout.limit, f"touched {high - 1:#x}"


async def started(dut, **options):
    bench = Testbench(dut, **options)
    await bench.start()
    return bench
