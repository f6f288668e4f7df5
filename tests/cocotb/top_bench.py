"""cocotb bench of the whole accelerator: runs inside the simulator, started by test_top.py.

The accelerator is seen from outside only: AXI4-Lite, AXI4, interrupt. Everything it reads was put
into the memory before; everything it writes is compared with the golden model, bit for bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import cocotb
import numpy as np
import torch
from cocotb.triggers import ClockCycles, FallingEdge

from moeaccel import golden
from moeaccel.config import preset
from moeaccel.formats import FORMATS, quantise
from moeaccel.golden import DeviceResult
from moeaccel.interface.commands import (
    COMPLETION,
    ENTRY_BYTES,
    LAYER,
    SUBMISSION,
    NonFinite,
    Opcode,
    Status,
    decode,
    encode,
)
from moeaccel.interface.registers import COUNTERS, ID_VALUE, REGISTERS, VERSION_VALUE
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


# -- registers -------------------------------------------------------------------------------------
@cocotb.test(**TIMEOUT)
async def registers(dut):
    """Identity, storage, and answers while nothing runs."""
    bench = await started(dut)
    assert await bench.read_register("ID") == ID_VALUE
    assert await bench.read_register("VERSION") == VERSION_VALUE
    assert await bench.read_register("CONFIG_HASH") == CONFIG.digest
    for name, value in [("SQ_BASE_LO", 0x1234_5640), ("CQ_BASE_HI", 0x12), ("WATCHDOG", 77),
                        ("WINDOW_LIMIT_LO", 0xFEDC_B000)]:
        await bench.write_registers(register_writes(**{name: value}))
        assert await bench.read_register(name) == value, name
    await bench.set_up()
    await bench.write_registers(register_writes(WATCHDOG=0))
    await bench.run(Work({"opcode": Opcode.NOP}))
    assert await bench.read_register("SQ_HEAD") == 1
    assert await bench.read_register("CQ_TAIL") == 1
    await bench.end()


# -- arithmetic ------------------------------------------------------------------------------------
@cocotb.test(**TIMEOUT)
@cocotb.parametrize(weight_format=list(FORMATS), planes=[1, 2])
async def formats(dut, weight_format, planes):
    """Every weight format and activation precision; a short last group for int4_g128."""
    bench = await started(dut)
    layer = bench.layer(experts=3, d_model=160, d_expert=64, weight_format=weight_format,
                        planes=planes)
    await bench.run(bench.experts(layer, [[0, 2], [1, 0], [2, 1]]))
    await bench.end()


# Keys have at most ten characters, so that cocotb shows them in the names of the tests.
ROUTINGS = {
    "one_token": [[2, 0]],
    "lanes_1": [[1]] * (LANES + 1),
    "slots_1": [[0, 3]] * (SLOTS + 1),
    "repeated": [[1, 1, 1], [0, 2, 0], [3, 3, 1]],
    "foreign": [[-1, 4], [0, -(1 << 31)], [(1 << 31) - 1, 3], [2, 7]],
    "nothing": [[-1], [99]],
    "sparse": [[-1], [2], [-1], [2], [-1], [0], [2]],
}


@cocotb.test(**TIMEOUT)
@cocotb.parametrize(routing=list(ROUTINGS), planes=[1, 2])
async def routings(dut, routing, planes):
    """Routings that stress the dispatcher, and the counters that follow from them."""
    bench = await started(dut)
    layer = bench.layer(planes=planes)
    ids = np.array(ROUTINGS[routing])
    before = await bench.counters()
    await bench.run(bench.experts(layer, ids))
    after = await bench.counters()
    used = (ids >= 0) & (ids < 4)
    slots = SLOTS // planes
    passes = sum(-(-int((ids[used] == e).sum()) // slots) for e in range(4))
    counted = {name: after[name] - before[name] for name in after}
    wanted = {"tokens": len(ids), "assignments": int(used.sum()), "expert_passes": passes,
              "commands": 1, "overflows": 0}
    assert {name: counted[name] for name in wanted} == wanted
    await bench.end()


SHAPES = {"one": (1, 64, 32), "wide": (5, 32, 128), "many": (2 * SLOTS + 1, 64, 64)}


@cocotb.test(**TIMEOUT)
@cocotb.parametrize(shape=list(SHAPES), weight_format=["mxint8", "int4_g128", "mxfp4"],
                    planes=[1, 2])
async def gemm(dut, shape, weight_format, planes):
    """Linear layers, wide and tall, more tokens than slots."""
    bench = await started(dut)
    await bench.run(bench.gemm(*SHAPES[shape], weight_format=weight_format, planes=planes))
    await bench.end()


@cocotb.test(**TIMEOUT)
@cocotb.parametrize(planes=[1, 2])
async def random_layers(dut, planes):
    """Random shapes, scales, routings and grids."""
    bench = await started(dut)
    draw = bench.draw
    for _ in range(3):
        experts, top_k = int(draw.integers(2, 7)), int(draw.integers(1, 6))
        tokens = int(draw.integers(1, min(40, CONFIG.max_tokens, CONFIG.max_assignments // top_k)))
        d_model, d_expert = (32 * int(draw.integers(1, 5)) for _ in range(2))
        layer = bench.layer(
            experts=experts, d_model=d_model, d_expert=d_expert, planes=planes, spread=24,
            weight_format=list(FORMATS)[draw.integers(len(FORMATS))],
            grid_exponent=int(draw.integers(-34, -20)))
        ids = draw.integers(-1, experts + 1, (tokens, top_k))
        await bench.run(bench.experts(layer, ids))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def largest_dimensions(dut):
    """Every step of the longest rows, and top-k of 16."""
    bench = await started(dut)
    most = min(CONFIG.max_dim, 16 * CONFIG.port_bytes)
    layer = bench.layer(experts=2, d_model=most, d_expert=most, weight_format="mxfp4")
    await bench.run(bench.experts(layer, np.arange(32).reshape(2, 16) % 3 - 1))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def nonfinite_overflow_and_underflow(dut):
    """NaN and infinity name the first token that is used; what the grid has no room for is
    counted; all give y."""
    bench = await started(dut)
    layer = bench.layer()
    x = bench.x(4, 64)
    x[0, 7], x[2, 40], x[3, 1] = np.nan, -np.inf, np.inf
    work = bench.experts(layer, [[-1], [1], [1], [2]], x=x)
    assert work.status is Status.NONFINITE
    assert work.detail == 2  # token 0 is routed nowhere
    await bench.run(work)
    weights = np.array([[np.nan], [1], [np.inf], [-np.inf]], np.float32)
    work = bench.experts(layer, [[-1], [1], [1], [2]], weights=weights)
    assert (work.status, work.detail, work.address) == (
        Status.NONFINITE, 2, NonFinite.ROUTING_WEIGHT)
    await bench.run(work)
    before = (await bench.counters())["underflows"]
    small = bench.experts(layer, [[0, 3], [1, 2]],
                          weights=np.array([[1e-8, 1e-45], [1e-9, 0]], np.float32))
    assert small.result.underflows > 64
    await bench.run(small)
    assert (await bench.counters())["underflows"] == before + small.result.underflows
    big = bench.experts(layer, [[0], [3]], x=bench.x(2, 64) + np.float32(1e12))
    assert big.status is Status.OVERFLOW
    await bench.run(big)
    assert (await bench.counters())["overflows"] == big.detail
    await bench.run(bench.experts(layer, [[0]]))
    await bench.end()


# -- mistakes --------------------------------------------------------------------------------------
BAD_FIELDS = {
    "tokens_zero": ({"tokens": 0}, 1),
    "tokens_many": ({"tokens": CONFIG.max_tokens + 1}, 1),
    "tokens_huge": ({"tokens": (1 << 32) - 1}, 1),
    "top_k_zero": ({"top_k": 0}, 2),
    "top_k_17": ({"top_k": 17}, 2),
    "assignments": ({"tokens": CONFIG.max_tokens,
                     "top_k": CONFIG.max_assignments // CONFIG.max_tokens + 1}, 2),
    "layer_address": ({"layer_address": 0x1020}, 4),
    "x_address": ({"x_address": 0x1001}, 6),
    "ids_address": ({"ids_address": 0x1004}, 8),
    "weights_address": ({"weights_address": 0x1010}, 10),
    "y_address": ({"y_address": 0x1008}, 12),
    "y_too_high": ({"y_address": 1 << CONFIG.address_bits}, 12),
    "workspace_address": ({"workspace_address": 0x1030}, 14),
    "first_one_counts": ({"y_address": 1, "x_address": 1}, 6),
}


@cocotb.test(**TIMEOUT)
async def bad_fields(dut):
    """Each bad field is named, nothing is computed, and the next command runs."""
    bench = await started(dut)
    layer = bench.layer(experts=2)
    good = bench.experts(layer, [[0], [1]])
    for name, (change, word) in BAD_FIELDS.items():
        dut._log.info("bad field: %s", name)
        await bench.run(Work({**good.fields, **change}, Status.BAD_FIELD, word))
    await bench.run(Work({**good.fields, "opcode": 200}, Status.BAD_OPCODE, 200))
    y = good.fields["y_address"]
    assert bench.memory.read(y, good.result.y.nbytes) == b"\xff" * good.result.y.nbytes
    await bench.run(good)
    await bench.end()


BAD_LAYERS = {
    "kind": ({"kind": 1}, 0),
    "kind_unknown": ({"kind": 7}, 0),
    "format": ({"format": 1 + max(f.code for f in FORMATS.values())}, 0),
    "planes_zero": ({"planes": 0}, 0),
    "planes_three": ({"planes": 3}, 0),
    "activation": ({"activation": 1}, 0),
    "num_experts_zero": ({"num_experts": 0}, 1),
    "num_experts_many": ({"num_experts": CONFIG.max_experts + 1}, 1),
    "d_in": ({"d_in": 48}, 2),
    "d_in_zero": ({"d_in": 0}, 2),
    "d_in_many": ({"d_in": CONFIG.max_dim + 32}, 2),
    "d_expert": ({"d_expert": 33}, 3),
    "d_out": ({"d_out": 1 << 31}, 4),
    "grid_low": ({"grid_exponent": -101}, 5),
    "grid_high": ({"grid_exponent": 61}, 5),
    "stride": ({"stride": 32}, 6),
    "image_address": ({"image_address": 0x1008}, 8),
    "first_one_counts": ({"image_address": 1, "d_out": 1}, 4),
}


@cocotb.test(**TIMEOUT)
async def bad_layers(dut):
    """The same for layer descriptors."""
    bench = await started(dut)
    layer = bench.layer(experts=2)
    good = bench.experts(layer, [[0], [1]])
    for name, (change, word) in BAD_LAYERS.items():
        dut._log.info("bad layer: %s", name)
        descriptor = bench.layout.place(encode(LAYER, {**layer[0], **change}))
        await bench.run(Work({**good.fields, "layer_address": descriptor}, Status.BAD_LAYER, word))
    await bench.run(good)
    await bench.end()


WINDOWED = ("layer_address", "x_address", "ids_address", "weights_address", "y_address")


@cocotb.test(**TIMEOUT)
@cocotb.parametrize(side=["below", "behind"])
async def window_violations(dut, side):
    """Whatever points outside: WINDOW with the first byte, nothing touched, the next one runs."""
    bench = await started(dut)
    layer = bench.layer(experts=2)
    good = bench.experts(layer, [[0], [1]])
    outside = 0x0 if side == "below" else bench.layout.limit
    canary = bench.draw.bytes(0x1000)
    bench.memory.write(outside, canary)
    for name in WINDOWED:
        dut._log.info("outside: %s", name)
        work = Work({**good.fields, name: outside}, Status.WINDOW, None, outside)
        await bench.run(work)
    image = bench.layout.place(encode(LAYER, {**layer[0], "image_address": outside}))
    await bench.run(Work({**good.fields, "layer_address": image}, Status.WINDOW, None, outside))
    assert bench.memory.read(outside, len(canary)) == canary
    await bench.run(bench.experts(layer, [[0], [1]]))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def errors_of_memory(dut):
    """SLVERR ends a command with BUS_ERROR; the next one runs."""
    bench = await started(dut)
    layer = bench.layer(experts=2)
    for name, address in (("x_address", None), ("weights_address", None), ("y_address", 0)):
        work = bench.experts(layer, [[0], [1]])
        bench.memory.inject_error(work.fields[name], 4)
        work.ends_with(Status.BUS_ERROR,
                       address=work.fields[name] if address is None else address)
        await bench.run(work)
        bench.memory.clear_errors()
        await bench.run(bench.experts(layer, [[1], [0]]))
    await bench.end()


# -- rings -----------------------------------------------------------------------------------------
@cocotb.test(**TIMEOUT)
@cocotb.parametrize(ring_log2=[1, 2])
async def back_to_back(dut, ring_log2):
    """Commands of all kinds one after another, several in flight, round the rings several times."""
    bench = await started(dut, ring_log2=ring_log2)
    small = bench.layer(experts=2, d_model=32, d_expert=32, planes=1, weight_format="mxfp4")
    large = bench.layer(experts=3, d_model=96, d_expert=64, planes=2, weight_format="int4_g128")
    works = []
    for _ in range(3):
        works += [
            bench.experts(small, [[0], [1]]),
            Work({"opcode": Opcode.NOP}),
            bench.experts(large, [[2, 0], [2, 1], [0, 1]]),
            Work({"opcode": 99}, Status.BAD_OPCODE, 99),
            bench.gemm(3, 64, 32),
            Work({"opcode": Opcode.FENCE}),
        ]
    while works or bench.in_flight:
        now = int(bench.draw.integers(1, bench.entries))
        room = bench.entries - 1 - len(bench.in_flight)
        await bench.submit(*works[:min(now, room)])
        del works[:min(now, room)]
        await bench.finish(int(bench.draw.integers(0 if room > now and works else 1,
                                                   len(bench.in_flight) + 1)))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def completion_ring_full(dut):
    """The device waits while completions are not taken, and goes on when they are."""
    bench = await started(dut, ring_log2=1)
    await bench.submit(Work({"opcode": Opcode.NOP}))
    await bfm.wait_high(dut, dut.irq, max_cycles=COMMAND_CYCLES)
    await bench.write_registers(register_writes(IRQ_STATUS=1))
    # The submission ring has room again, the completion ring has not.
    await bench.submit(Work({"opcode": Opcode.NOP}), at_most=2)
    await ClockCycles(dut.clk, 1000)
    assert not dut.irq.value
    second = bench.memory.read(bench.completions + ENTRY_BYTES, ENTRY_BYTES)
    assert second == bytes(ENTRY_BYTES)
    assert bench.accept(await bench.read_register("CQ_TAIL")) == 1
    await bench.write_registers(register_writes(CQ_HEAD=bench.head))
    await bench.finish()
    await bench.end()


@cocotb.test(**TIMEOUT)
async def interrupt_follows_enable(dut):
    """A completion without IRQ_ENABLE stays pending and shows when it is enabled."""
    bench = await started(dut)
    await bench.write_registers(register_writes(IRQ_ENABLE=0))
    await bench.submit(Work({"opcode": Opcode.NOP}))
    for _ in range(200):
        if await bench.read_register("IRQ_STATUS") & 1:
            break
    else:
        raise AssertionError("IRQ_STATUS never showed the completion")
    assert not dut.irq.value
    await bench.write_registers(register_writes(IRQ_ENABLE=1))
    await ClockCycles(dut.clk, 4)
    assert dut.irq.value
    await bench.finish()
    await bench.end()


@cocotb.test(**TIMEOUT)
async def abort(dut):
    """An aborted command says so; the one behind it gives its bits."""
    bench = await started(dut)
    layer = bench.layer()
    for _ in range(3):
        victim = bench.experts(layer, [[0, 1], [2, 3], [1, 0]])
        victim.ends_with(Status.ABORTED)
        await bench.submit(victim, bench.experts(layer, [[3], [1]]))
        await ClockCycles(dut.clk, int(bench.draw.integers(150, 900)))
        await bench.write_registers(register_writes(CONTROL=2))
        await bench.finish()
    await bench.end()


@cocotb.test(**TIMEOUT)
async def soft_reset(dut):
    """A soft reset at any time drains the bus, says so, and everything works again."""
    bench = await started(dut)
    layer = bench.layer()
    for _ in range(4):
        await bench.submit(bench.experts(layer, [[0, 1], [2, 3], [1, 0]]))
        await ClockCycles(dut.clk, int(bench.draw.integers(1, 1500)))
        await bench.write_registers(register_writes(IRQ_ENABLE=2, CONTROL=1))
        await bfm.wait_high(dut, dut.irq, max_cycles=COMMAND_CYCLES)
        bench.restart()
        await bench.write_registers(register_writes(IRQ_STATUS=3))
        if dut.irq.value:
            await FallingEdge(dut.irq)
        await bench.set_up()
        await bench.run(bench.experts(layer, [[3, 1]]))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def watchdog(dut):
    """A watchdog that is shorter than memory's pause ends the command; the next one runs."""
    bench = await started(dut)
    layer = bench.layer()
    await bench.write_registers(register_writes(WATCHDOG=300))
    work = bench.experts(layer, [[0, 1]])
    work.ends_with(Status.WATCHDOG)
    bench.memory.set_stalls(StallModel(ar=0.999, length=2000))
    await bench.submit(work)
    await ClockCycles(dut.clk, 3000)
    bench.memory.set_stalls(STALLS, seed=SEED)
    await bench.finish()
    await bench.write_registers(register_writes(WATCHDOG=0))
    await bench.run(bench.experts(layer, [[0, 1]]))
    await bench.end()
