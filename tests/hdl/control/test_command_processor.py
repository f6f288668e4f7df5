"""CommandProcessor: with models of port and engine, then with the real port and registers."""

import itertools
import random

import pytest
from amaranth import *
from amaranth.lib import wiring
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.formats import FORMATS
from moeaccel.hdl.control.command_processor import DRAIN_CYCLES, CommandProcessor
from moeaccel.hdl.control.register_file import RegisterFile
from moeaccel.hdl.memory.memory_port import MemoryPort
from moeaccel.image import Section
from moeaccel.interface.commands import (
    COMPLETION,
    COUNT_MAX,
    ENTRY_BYTES,
    LAYER,
    SUBMISSION,
    LayerKind,
    NonFinite,
    Opcode,
    Status,
    decode,
    encode,
)
from moeaccel.interface.registers import REGISTERS
from tests.support.axi_memory import AxiMemory

TINY = PRESETS["tiny"]
SIZE = 1 << 16
SQ, CQ, LAYER_AT = 0x1000, 0x2000, 0x3000

GOOD_SUBMISSION = {
    "opcode": Opcode.EXPERTS, "tag": 0x1234, "tokens": 3, "top_k": 2, "layer_address": LAYER_AT,
    "x_address": 0x4000, "ids_address": 0x5000, "weights_address": 0x6000, "y_address": 0x7000,
    "workspace_address": 0x8000,
}
GOOD_LAYER = {
    "kind": LayerKind.EXPERTS, "format": FORMATS["int4_g32"].code, "planes": 2, "activation": 0,
    "num_experts": 4, "d_in": 64, "d_expert": 96, "d_out": 128, "grid_exponent": -28,
    "stride": 4096, "image_address": 0x9040,
}
GEMM = {"opcode": Opcode.GEMM, "top_k": 1}
LINEAR = {"kind": LayerKind.LINEAR, "num_experts": 1, "d_expert": 64}


class Bench:
    """A command processor; clients' ends of a memory port, and an engine, as models.

    ``engine`` is called with each job and returns what comes with ``i_done``, or None for never.
    """

    def __init__(self, config=TINY, *, ring_log2=2, seed=0, stall=0.0, latency=3, engine_cycles=5,
                 engine=lambda job: {}, window=(0, SIZE), refuse=(), hold=lambda: False,
                 watchdog=0):
        self.config = config
        self.dut = CommandProcessor(config)
        self.width = config.port_bytes
        self.entries = 1 << ring_log2
        self.random = random.Random(seed)
        self.stall, self.latency, self.hold = stall, latency, hold
        self.engine, self.engine_cycles = engine, engine_cycles
        self.window, self.refuse = window, refuse
        self.inputs = {"enable": 1, "sq_base": SQ, "cq_base": CQ, "ring_log2": ring_log2,
                       "watchdog": watchdog}
        self.memory = bytearray(SIZE)
        self.outside = None  # a completion is, or memory refuses it
        self.memory[LAYER_AT:LAYER_AT + ENTRY_BYTES] = encode(LAYER, GOOD_LAYER)
        self.jobs, self.completions, self.log, self.counts = [], [], [], []
        self.tail = self.head = 0
        self.resets = self.errors = 0

    def put_layer(self, **changes):
        self.memory[LAYER_AT:LAYER_AT + ENTRY_BYTES] = encode(LAYER, GOOD_LAYER | changes)

    def submit(self, ctx, **changes):
        at = SQ + ENTRY_BYTES * self.tail
        # Reserved bits are ignored: set them.
        entry = bytearray(encode(SUBMISSION, GOOD_SUBMISSION | changes))
        entry[1] = 0xFF
        entry[12:16] = b"\xff" * 4
        self.memory[at:at + ENTRY_BYTES] = entry
        self.tail = (self.tail + 1) % self.entries
        ctx.set(self.dut.sq_tail, self.tail)

    async def completion(self, ctx, consume=True):
        """Wait for the next completion, check its place and phase, and return it."""
        seen = len(self.completions)
        for _ in range(3000):
            if self.log.count("irq") > seen:
                break
            await ctx.tick()
        else:
            raise AssertionError("no completion")
        at, raw = self.written.pop(0)
        assert at == CQ + ENTRY_BYTES * (seen % self.entries)
        entry = decode(COMPLETION, raw)
        assert entry.pop("phase") == 1 - seen // self.entries % 2
        self.completions.append(entry)
        if consume:
            self.head = (self.head + 1) % self.entries
            ctx.set(self.dut.cq_head, self.head)
        return entry

    async def run_one(self, ctx, **changes):
        self.submit(ctx, **changes)
        return await self.completion(ctx)

    async def _port(self, ctx):
        dut, rng, width = self.dut, self.random, self.width
        reads, write, faults = [], None, None
        self.written = []
        self.latch = {"fault_window": 0, "fault_bus": 0, "fault_address": 0}
        while True:
            go = [rng.random() >= self.stall and not self.hold() for _ in range(4)]
            ctx.set(dut.reader.request.ready, go[0])
            ctx.set(dut.writer.request.ready, go[1] and write is None)
            ctx.set(dut.writer.data.ready, go[2] and write is not None and not write[2])
            ctx.set(dut.idle, not reads)
            for name, value in self.latch.items():
                ctx.set(getattr(dut, name), value)
            ctx.set(dut.reader.valid, 0)
            ctx.set(dut.reader.data, rng.getrandbits(8 * width))
            ctx.set(dut.reader.last, rng.random() < 0.5)
            if reads and reads[0][0] > 0:
                reads[0][0] -= 1
            elif reads and go[3]:
                _, address, left, dropped = reads[0]
                inside = self.window[0] <= address < self.window[1]
                word = self.memory[address:address + width] if inside else b""
                if not dropped:
                    ctx.set(dut.reader.valid, 1)
                    ctx.set(dut.reader.data, int.from_bytes(word, "little"))
                    ctx.set(dut.reader.last, left == 1)
                if left == 1:
                    reads.pop(0)
                else:
                    reads[0][1:3] = [address + width, left - 1]
            ctx.set(dut.writer.done, 0)
            if write is not None and write[2]:
                write[2] -= 1
                if not write[2]:
                    ctx.set(dut.writer.done, 1)
                    if self.outside:
                        self.latch |= {self.outside: 1, "fault_address": write[0]}
                        ctx.set(getattr(dut, self.outside), 1)
                    else:
                        self.written.append((write[0], bytes(write[1])))
                    self.log.append("done")
                    write = None
            _, _, *v = await ctx.tick().sample(
                dut.reader.request.valid, dut.reader.request.payload.address,
                dut.reader.request.payload.beats, dut.writer.request.valid,
                dut.writer.request.payload.address, dut.writer.request.payload.beats,
                dut.writer.data.valid, dut.writer.data.ready, dut.writer.data.payload,
                dut.flush, dut.clear_faults, dut.writer.request.ready)
            if v[10]:
                self.latch = dict.fromkeys(self.latch, 0)
            if v[0] and go[0] and not v[9]:
                assert v[1] % ENTRY_BYTES == 0
                assert v[2] * width == ENTRY_BYTES
                reads.append([self.latency, v[1], v[2], False])
                if not self.window[0] <= v[1] < self.window[1]:
                    faults = "fault_window", v[1]
                elif v[1] in self.refuse:
                    faults = "fault_bus", v[1]
            if faults and not any(self.latch.values()):
                self.latch |= {faults[0]: 1, "fault_address": faults[1]}
                faults = None
            if v[3] and v[11]:
                assert v[5] * width == ENTRY_BYTES
                write = [v[4], b"", 0]
            if v[6] and v[7]:
                write[1] += v[8].to_bytes(width, "little")
                if len(write[1]) == ENTRY_BYTES:
                    write[2] = 2 + self.latency
            if v[9]:
                for read in reads:
                    read[3] = True
                write = None

    async def _engine(self, ctx):
        dut = self.dut
        wait = None
        while True:
            accept = wait is None and self.random.random() >= self.stall
            ctx.set(dut.o_job.ready, accept)
            ctx.set(dut.i_done, wait == 0)
            for name in dut.i_result.shape().members:
                # Without i_done they mean nothing.
                junk = self.random.getrandbits(len(dut.i_result[name]))
                ctx.set(dut.i_result[name], result.get(name, 0) if wait == 0 else junk)
            if wait == 0:
                wait = None
            elif wait is not None and wait > 0:
                wait -= 1
            _, _, valid, job, reset = await ctx.tick().sample(
                dut.o_job.valid, dut.o_job.payload, dut.o_engine_reset)
            if reset:
                wait = None
                self.resets += 1
            elif valid and accept:
                self.jobs.append({name: job[name] for name in job.shape().members})
                result = self.engine(self.jobs[-1])
                wait = -1 if result is None else self.engine_cycles

    async def _watch(self, ctx):
        dut = self.dut
        async for _, _, *v in ctx.tick().sample(
                dut.o_irq, dut.o_reset_done, dut.count_commands, dut.count_tokens,
                dut.count_overflows, dut.count_underflows, dut.o_error):
            if v[0]:
                self.log.append("irq")
            if v[1]:
                self.log.append("reset")
            if any(v[2:6]):
                self.counts.append(tuple(v[2:6]))
            # As ERROR_STATUS has it.
            self.errors |= v[6]
            ctx.set(dut.error, self.errors != 0)

    def run(self, testbench, *background):
        async def setup(ctx):
            for name, value in self.inputs.items():
                ctx.set(getattr(self.dut, name), value)
            assert ctx.get(self.dut.o_engine_reset)  # a reset resets the engine, too
            await ctx.tick().repeat(2)
            self.resets = 0
            await testbench(ctx)

        sim = Simulator(self.dut)
        sim.add_clock(1e-6)
        sim.add_testbench(setup)
        for process in (self._port, self._engine, self._watch, *background):
            sim.add_testbench(process, background=True)
        sim.run()


async def pulse(ctx, signal):
    ctx.set(signal, 1)
    await ctx.tick()
    ctx.set(signal, 0)


def words(layer, config):
    """Return what gate_up_words and down_words must be."""
    fmt = next(f for f in FORMATS.values() if f.code == layer["format"])
    linear = layer["kind"] == LayerKind.LINEAR
    rm = config.row_multipliers
    gate_up = Section(fmt, 2 * layer["d_expert"], layer["d_in"], rm, config.channels)
    down = Section(fmt, layer["d_out"], layer["d_expert"], rm, config.channels)
    return {"gate_up_words": 0 if linear else gate_up.words, "down_words": down.words}


def job_of(submission, layer, config):
    """Return the job that a good submission must give."""
    return {
        "linear": submission["opcode"] == Opcode.GEMM,
        "two_planes": layer["planes"] == 2,
        "steps_in": layer["d_in"] // 32,
        "steps_hidden": layer["d_expert"] // 32,
        "steps_out": layer["d_out"] // 32,
        **{name: layer[name] for name in (
            "format", "num_experts", "grid_exponent", "stride", "image_address")},
        **{name: submission[name] for name in (
            "tokens", "top_k", "x_address", "ids_address", "weights_address", "y_address",
            "workspace_address")},
        **words(layer, config),
    }


@pytest.mark.parametrize("preset", ["tiny", "peer256", "small"])
@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_jobs_and_completions(preset, stall):
    bench = Bench(PRESETS[preset], stall=stall, seed=1)

    async def testbench(ctx):
        assert await bench.run_one(ctx) | {"cycles": 0} == {
            "tag": 0x1234, "status": Status.OK, "detail": 0, "address": 0, "cycles": 0,
            "underflows": 0}
        bench.put_layer(**LINEAR)
        assert (await bench.run_one(ctx, **GEMM, tag=9))["tag"] == 9
        bench.put_layer()
        for opcode in (Opcode.NOP, Opcode.FENCE):
            entry = await bench.run_one(ctx, opcode=opcode, tag=7, tokens=0, x_address=1)
            assert (entry["tag"], entry["status"]) == (7, Status.OK)
        await bench.run_one(ctx, tokens=5)
        assert ctx.get(bench.dut.sq_head) == ctx.get(bench.dut.cq_tail) == 5 % 4
        await ctx.tick().repeat(20)
        assert not ctx.get(bench.dut.busy)

    bench.run(testbench)
    assert bench.jobs == [
        job_of(GOOD_SUBMISSION, GOOD_LAYER, bench.config),
        job_of(GOOD_SUBMISSION | GEMM, GOOD_LAYER | LINEAR, bench.config),
        job_of(GOOD_SUBMISSION | {"tokens": 5}, GOOD_LAYER, bench.config)]
    assert bench.log == ["done", "irq"] * 5  # acknowledged, then the interrupt
    assert bench.counts == [
        (1, 3, 0, 0), (1, 3, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0), (1, 5, 0, 0)]


@pytest.mark.parametrize(("config", "count"), [
    (TINY, 40),
    (PRESETS["wide512"], 20),
    (PRESETS["wide512"].replace(row_multipliers=16, max_dim=32768), 20),
])
def test_words_are_those_of_the_image(config, count):
    bench = Bench(config, seed=2)
    rng = random.Random(3)
    layers = []

    async def testbench(ctx):
        for i in range(count):
            dims = [32 * rng.choice([rng.randint(1, config.max_steps), 1, config.max_steps])
                    for _ in range(3)]
            layer = dict(zip(("d_in", "d_expert", "d_out"), dims, strict=True))
            layer["format"] = rng.randrange(len(FORMATS))
            if linear := i % 4 == 3:
                layer |= LINEAR | {"d_expert": layer["d_in"]}
            layers.append(GOOD_LAYER | layer)
            bench.put_layer(**layer)
            entry = await bench.run_one(ctx, **(GEMM if linear else {}))
            assert entry["status"] == Status.OK

    bench.run(testbench)
    for job, layer in zip(bench.jobs, layers, strict=True):
        assert {name: job[name] for name in ("gate_up_words", "down_words")} == words(layer, config)


def word_of(structure, name):
    return next(f.word for f in structure if f.name == name)


ADDRESSES = [f.name for f in SUBMISSION if f.name.endswith("_address")]
BAD_SUBMISSIONS = [
    ({"tokens": 0}, "tokens"), ({"tokens": TINY.max_tokens + 1, "top_k": 1}, "tokens"),
    ({"tokens": 0x8000_0001}, "tokens"),
    ({"top_k": 0}, "top_k"), ({"top_k": 17}, "top_k"), ({"top_k": 33}, "top_k"),
    ({"top_k": 0x100_0001}, "top_k"),
    ({"tokens": TINY.max_assignments // 5 + 1, "top_k": 5}, "top_k"),
    ({"opcode": Opcode.GEMM, "top_k": 2}, "top_k"),
    *(({name: value}, name) for name in ADDRESSES
      for value in (1, 0x20, 0x4020, 1 << TINY.address_bits, 1 << 63)),
    ({"y_address": 1, "x_address": 8, "workspace_address": 4}, "x_address"),  # the first one
]
NO_FORMAT = max(f.code for f in FORMATS.values()) + 1
BAD_LAYERS = [
    ({"kind": 1}, "kind"), ({"kind": 2}, "kind"), ({"format": NO_FORMAT}, "format"),
    ({"format": 0x81}, "format"), ({"planes": 0}, "planes"), ({"planes": 3}, "planes"),
    ({"activation": 1}, "activation"), ({"num_experts": 0}, "num_experts"),
    ({"num_experts": TINY.max_experts + 1}, "num_experts"),
    ({"num_experts": 0x8000_0001}, "num_experts"),
    *(({name: value}, name) for name in ("d_in", "d_expert", "d_out")
      for value in (0, 48, TINY.max_dim + 32, 0x8000_0020)),
    ({"grid_exponent": -101}, "grid_exponent"), ({"grid_exponent": 61}, "grid_exponent"),
    ({"stride": 4096 + 32}, "stride"), ({"image_address": 0x9020}, "image_address"),
    ({"image_address": 1 << TINY.address_bits}, "image_address"),
    ({"d_out": 1, "stride": 1}, "d_out"),
]
BAD_LINEAR_LAYERS = [
    ({"kind": 0}, "kind"), ({"num_experts": 2}, "num_experts"), ({"d_expert": 96}, "d_expert"),
]


def test_bad_fields_of_submissions():
    bench = Bench()

    async def testbench(ctx):
        for changes, name in BAD_SUBMISSIONS:
            entry = await bench.run_one(ctx, **changes)
            assert (entry["status"], entry["detail"]) == (
                Status.BAD_FIELD, word_of(SUBMISSION, name)), changes
        for opcode in (4, 0x81, 255):
            entry = await bench.run_one(ctx, opcode=opcode)
            assert (entry["status"], entry["detail"]) == (Status.BAD_OPCODE, opcode)
        assert not bench.jobs
        assert (await bench.run_one(ctx))["status"] == Status.OK

    bench.run(testbench)
    assert {name for _, name in BAD_SUBMISSIONS} == {f.name for f in SUBMISSION} - {"opcode", "tag"}


def test_bad_fields_of_layers():
    bench = Bench()

    async def testbench(ctx):
        for rows, submission, layer in (
                (BAD_LAYERS, {}, {}), (BAD_LINEAR_LAYERS, GEMM, LINEAR)):
            for changes, name in rows:
                bench.put_layer(**layer | changes)
                entry = await bench.run_one(ctx, **submission)
                assert (entry["status"], entry["detail"]) == (
                    Status.BAD_LAYER, word_of(LAYER, name)), changes
        assert not bench.jobs

    bench.run(testbench)
    assert {name for _, name in BAD_LAYERS} == {f.name for f in LAYER}


def test_a_format_that_the_configuration_lacks():
    bench = Bench(TINY.replace(formats=("int4_g32", "mxfp4")))

    async def testbench(ctx):
        for fmt in FORMATS.values():
            bench.put_layer(format=fmt.code)
            entry = await bench.run_one(ctx)
            assert (entry["status"], entry["detail"]) == (
                (Status.OK, 0) if fmt.name in bench.config.formats
                else (Status.BAD_LAYER, word_of(LAYER, "format"))), fmt.name

    bench.run(testbench)


def test_limits_are_allowed():
    bench = Bench()

    async def testbench(ctx):
        for changes in [
            {"tokens": TINY.max_tokens, "top_k": TINY.max_assignments // TINY.max_tokens},
            {"tokens": TINY.max_assignments // 16, "top_k": 16},
            {"tokens": TINY.max_assignments // 5, "top_k": 5},
            {"y_address": 0, "x_address": 0, "ids_address": 0},
        ]:
            assert (await bench.run_one(ctx, **changes))["status"] == Status.OK, changes
        for changes in [
            {"num_experts": TINY.max_experts, "d_in": TINY.max_dim, "d_expert": 32},
            {"grid_exponent": -100, "stride": 0},
            {"grid_exponent": 60, "planes": 1, "stride": 0xFFFF_FFC0},
        ]:
            bench.put_layer(**changes)
            assert (await bench.run_one(ctx))["status"] == Status.OK, changes

    bench.run(testbench)


def ends(submission, layer, config):
    """Return how many bytes lie behind each address that a command may touch."""
    tokens, d_in, d_out = submission["tokens"], layer["d_in"], layer["d_out"]
    pairs = 4 * tokens * submission["top_k"]
    payload = sum(words(layer, config).values()) * config.word_bytes
    return {"x_address": 4 * tokens * d_in, "ids_address": pairs, "weights_address": pairs,
            "y_address": 4 * tokens * d_out, "workspace_address": 8 * tokens * d_out,
            "image_address": (layer["num_experts"] - 1) * layer["stride"] + payload}


@pytest.mark.parametrize("config", [
    TINY, PRESETS["hbm32"], PRESETS["small"].replace(row_multipliers=2, address_bits=24),
    TINY.replace(max_dim=64, max_assignments=1024)],
    ids=["tiny", "hbm32", "24 bits", "more pairs than blocks"])
def test_everything_ends_within_the_address_space(config):
    """At the top the last byte is used, and 64 bytes on the word is named; the lowest counts."""
    bench = Bench(config, seed=6)
    rng = random.Random(7)
    top = 1 << config.address_bits

    async def testbench(ctx):
        for i in range(8):
            layer = {name: 32 * rng.randint(1, min(config.max_steps, 40))
                     for name in ("d_in", "d_expert", "d_out")}
            layer["format"] = rng.randrange(len(FORMATS))
            layer["num_experts"] = rng.choice([1, 2, rng.randint(1, config.max_experts)])
            layer["stride"] = 64 * rng.choice([0, rng.randint(1, 3000)])
            command = {"top_k": rng.choice([1, 16, rng.randint(1, 16)])}
            if linear := i % 4 == 3:
                layer |= LINEAR | {"d_expert": layer["d_in"]}
                command = dict(GEMM)
            command["tokens"] = rng.randint(
                1, min(config.max_tokens, config.max_assignments // command["top_k"]))
            sizes = ends(GOOD_SUBMISSION | command, GOOD_LAYER | layer, config)
            highest = {name: (top - size) // 64 * 64 for name, size in sizes.items()}
            layer["image_address"] = highest.pop("image_address")
            bench.put_layer(**layer)
            assert (await bench.run_one(ctx, **command | highest))["status"] == Status.OK
            names = rng.sample(list(highest), 3) if i else list(highest)
            for name in names:
                wrong = highest | {name: highest[name] + 64}
                later = rng.choice(list(highest))
                wrong[later] = max(wrong[later], highest[later] + 64 * rng.randint(0, 1))
                first = min(word_of(SUBMISSION, n) for n in wrong if wrong[n] > highest[n])
                beyond = [n for n in wrong if wrong[n] >= top]
                if beyond:
                    first = min(word_of(SUBMISSION, n) for n in beyond)
                entry = await bench.run_one(ctx, **command | wrong)
                assert (entry["status"], entry["detail"]) == (Status.BAD_FIELD, first)
            if layer["image_address"] + 64 < top:
                bench.put_layer(**layer | {"image_address": layer["image_address"] + 64})
                entry = await bench.run_one(ctx, **command | highest)
                assert (entry["status"], entry["detail"]) == (
                    Status.BAD_LAYER, word_of(LAYER, "image_address"))
                name = rng.choice([n for n in highest if highest[n] + 64 < top] or ["y_address"])
                entry = await bench.run_one(ctx, **command | {name: highest[name] + 64})
                assert entry["status"] == Status.BAD_FIELD
            assert linear == (len(bench.jobs) % 4 == 0)

    bench.run(testbench)
    assert len(bench.jobs) == 8


@pytest.mark.parametrize(("register", "bad", "good", "error"), [
    ("ring_log2", [0, 9, 15, 1 << 31], 2, 1),
    ("sq_base", [SQ + 32, SQ + 1, 1 << TINY.address_bits, SQ | 1 << 63,
                 (1 << TINY.address_bits) - 192], SQ, 2),
    ("cq_base", [CQ + 8, CQ | 1 << TINY.address_bits, (1 << TINY.address_bits) - 64], CQ, 4),
])
def test_bad_registers_of_the_rings(register, bad, good, error):
    """Nothing is fetched, the error says what is wrong, and with it mended the command runs."""
    bench = Bench()
    dut = bench.dut

    async def testbench(ctx):
        for tag, value in enumerate(bad):
            ctx.set(dut.enable, 0)
            ctx.set(getattr(dut, register), value)
            await ctx.tick().repeat(20)
            assert bench.errors == 0  # nobody has asked for anything
            ctx.set(dut.enable, 1)
            bench.submit(ctx, tag=tag)
            for _ in range(40):
                await ctx.tick()
                assert not ctx.get(dut.reader.request.valid)
            assert bench.errors == error, value
            bench.errors = 0  # as long as it is wrong that does not help
            await ctx.tick().repeat(5)
            assert bench.errors == error
            ctx.set(getattr(dut, register), good)
            await ctx.tick().repeat(20)
            assert not ctx.get(dut.busy)
            bench.errors = 0
            entry = await bench.completion(ctx)
            assert (entry["tag"], entry["status"]) == (tag, Status.OK)
            assert bench.errors == 0

    bench.run(testbench)


def test_the_last_ring_of_the_address_space():
    bench = Bench()
    top = 1 << TINY.address_bits
    bench.memory[SIZE - 256:] = bytes(256)

    async def testbench(ctx):
        ctx.set(bench.dut.sq_base, top - 256)
        ctx.set(bench.dut.cq_base, top - 256)
        await ctx.tick().repeat(20)
        assert bench.errors == 0

    bench.run(testbench)


@pytest.mark.parametrize(("fault", "error"), [("fault_window", 8), ("fault_bus", 16)])
@pytest.mark.parametrize("status", [Status.OK, Status.WINDOW, Status.BAD_FIELD, Status.ABORTED])
def test_completions_that_cannot_be_written(fault, error, status):
    """Nothing says that the command is complete; when the host says so it is written again."""
    bench = Bench(engine=lambda job: None if status == Status.ABORTED else {"overflows": 0})
    dut = bench.dut

    async def testbench(ctx):
        bench.outside = fault
        if status == Status.WINDOW:
            bench.window = 0, LAYER_AT
        bench.submit(ctx, tag=5, x_address=32 if status == Status.BAD_FIELD else 0x4000)
        if status == Status.ABORTED:
            await ctx.tick().repeat(60)
            await pulse(ctx, dut.i_abort)
        for again in range(3):
            while not bench.errors:
                await ctx.tick()
            assert bench.errors == error
            await pulse(ctx, dut.i_abort)  # ends nothing
            await ctx.tick().repeat(100)
            assert bench.log == ["done"] * (again + 1)
            assert ctx.get(dut.cq_tail) == 0
            assert ctx.get(dut.busy)
            bench.outside = fault if again < 2 else None
            bench.errors = 0
            if again == 1:
                await ctx.tick().repeat(30)
        entry = await bench.completion(ctx)
        assert (entry["tag"], entry["status"]) == (5, status)
        detail, address = {Status.BAD_FIELD: (word_of(SUBMISSION, "x_address"), 0),
                           Status.WINDOW: (0, LAYER_AT)}.get(status, (0, 0))
        assert (entry["detail"], entry["address"]) == (detail, address)
        bench.window, bench.engine = (0, SIZE), lambda job: {}
        assert (await bench.run_one(ctx, tag=6))["tag"] == 6

    bench.run(testbench)
    assert bench.errors == 0


def test_soft_reset_gives_up_a_completion():
    bench = Bench()
    dut = bench.dut

    async def testbench(ctx):
        bench.outside = "fault_window"
        bench.submit(ctx, tag=5)
        while not bench.errors:
            await ctx.tick()
        await pulse(ctx, dut.i_soft_reset)
        while "reset" not in bench.log:
            await ctx.tick()
            if ctx.get(dut.o_reset_done):
                bench.tail = bench.head = 0
                await ctx.tick()
                ctx.set(dut.sq_tail, 0)
        bench.outside, bench.errors = None, 0
        await ctx.tick().repeat(50)
        assert not ctx.get(dut.busy)
        assert bench.written == []
        bench.log.clear()
        assert (await bench.run_one(ctx, tag=3))["tag"] == 3

    bench.run(testbench)


def test_cq_base_that_turns_bad_while_a_command_runs():
    bench = Bench(engine_cycles=100)
    dut = bench.dut

    async def testbench(ctx):
        bench.submit(ctx, tag=5)
        await ctx.tick().repeat(60)
        ctx.set(dut.cq_base, CQ + 4)
        ctx.set(dut.enable, 0)
        await ctx.tick().repeat(200)
        assert bench.errors == 4
        assert bench.log == []
        ctx.set(dut.cq_base, CQ)
        await ctx.tick().repeat(5)
        bench.errors = 0
        assert (await bench.completion(ctx))["tag"] == 5

    bench.run(testbench)


def test_results_of_the_engine():
    results = [
        ({"overflows": 70000}, (Status.OVERFLOW, 70000, 0, 0)),
        ({"overflows": 9, "underflows": 65536}, (Status.OVERFLOW, 9, 0, 65536)),
        ({"nonfinite": 1, "token": 63, "overflows": 3, "underflows": 4},
         (Status.NONFINITE, 63, NonFinite.X, 4)),
        ({"nonfinite": 1, "what": NonFinite.ROUTING_WEIGHT, "token": 6},
         (Status.NONFINITE, 6, NonFinite.ROUTING_WEIGHT, 0)),
        ({}, (Status.OK, 0, 0, 0)),
        ({"token": 5, "what": 1, "underflows": 7}, (Status.OK, 0, 0, 7)),
    ]
    queue = [result for result, _ in results]
    names = "status", "detail", "address", "underflows"
    bench = Bench(engine=lambda job: queue.pop(0))

    async def testbench(ctx):
        for _, wanted in results:
            entry = await bench.run_one(ctx)
            assert tuple(entry[name] for name in names) == wanted
        entry = await bench.run_one(ctx, opcode=Opcode.NOP)  # nothing is left of the last one
        assert tuple(entry[name] for name in names) == (Status.OK, 0, 0, 0)

    bench.run(testbench)
    assert [c[2:] for c in bench.counts] == [
        (70000, 0), (9, 65536), (3, 4), (0, 0), (0, 0), (0, 7), (0, 0)]


def test_a_job_that_met_a_fault_says_nothing_of_its_numbers():
    """What it computed with is not what memory holds."""
    def engine(job):
        bench.latch |= {"fault_bus": 1, "fault_address": 0x4440}
        return {"nonfinite": 1, "overflows": 3, "underflows": 5}

    bench = Bench(engine=engine)

    async def testbench(ctx):
        entry = await bench.run_one(ctx)
        assert entry | {"cycles": 0, "tag": 0} == {
            "tag": 0, "status": Status.BUS_ERROR, "detail": 0, "address": 0x4440, "cycles": 0,
            "underflows": 0}

    bench.run(testbench)


def test_counts_of_the_largest_configuration_end_at_the_last_number():
    config = TINY.replace(max_tokens=1 << 16, max_assignments=1 << 17, max_dim=32768,
                          tile_words=1024)
    results = [{"overflows": 1 << 32, "underflows": (1 << 32) - 1}, {"underflows": 1 << 32}]
    queue = [*results]
    bench = Bench(config, engine=lambda job: queue.pop(0))

    async def testbench(ctx):
        entry = await bench.run_one(ctx)
        assert (entry["status"], entry["detail"]) == (Status.OVERFLOW, COUNT_MAX)
        assert entry["underflows"] == COUNT_MAX
        entry = await bench.run_one(ctx)
        assert (entry["status"], entry["underflows"]) == (Status.OK, COUNT_MAX)

    bench.run(testbench)
    assert [c[2:] for c in bench.counts] == [(1 << 32, (1 << 32) - 1), (0, 1 << 32)]


@pytest.mark.parametrize("ring_log2", [1, 3])
def test_rings_wrap_and_phases_invert(ring_log2):
    bench = Bench(ring_log2=ring_log2, stall=0.2, seed=4)

    async def testbench(ctx):
        for tag in range(4 * bench.entries + 1):
            assert (await bench.run_one(ctx, opcode=Opcode.NOP, tag=tag))["tag"] == tag

    bench.run(testbench)


def test_a_full_completion_ring_is_not_overwritten():
    bench = Bench(ring_log2=2)

    async def testbench(ctx):
        for tag in range(3):
            bench.submit(ctx, opcode=Opcode.NOP, tag=tag)
        for _ in range(3):
            await bench.completion(ctx, consume=False)
        bench.submit(ctx, opcode=Opcode.NOP, tag=3)
        await ctx.tick().repeat(100)
        assert bench.log.count("irq") == 3
        assert ctx.get(bench.dut.sq_head) == 3  # not even fetched
        ctx.set(bench.dut.cq_head, 1)
        assert (await bench.completion(ctx, consume=False))["tag"] == 3

    bench.run(testbench)


def test_nothing_is_fetched_unless_enabled():
    bench = Bench()
    bench.inputs["enable"] = 0

    async def testbench(ctx):
        bench.submit(ctx)
        for _ in range(30):
            assert not ctx.get(bench.dut.reader.request.valid)
            assert not ctx.get(bench.dut.busy)
            await ctx.tick()
        ctx.set(bench.dut.enable, 1)
        await bench.completion(ctx)

    bench.run(testbench)


@pytest.mark.parametrize("where", ["submission", "layer"])
@pytest.mark.parametrize("what", ["window", "bus"])
def test_faults_of_fetches(where, what):
    bench = Bench(latency=1)
    at = SQ if where == "submission" else LAYER_AT
    status = {"window": Status.WINDOW, "bus": Status.BUS_ERROR}[what]

    async def testbench(ctx):
        if what == "bus":
            bench.refuse = (at,)
        else:
            bench.window = (0, at) if where == "layer" else (LAYER_AT, SIZE)
        entry = await bench.run_one(ctx)
        assert (entry["status"], entry["address"]) == (status, at)
        bench.refuse, bench.window = (), (0, SIZE)
        assert (await bench.run_one(ctx))["status"] == Status.OK  # faults are cleared

    bench.run(testbench)
    assert len(bench.jobs) == 1


def test_cycles_are_those_of_the_command():
    bench = Bench(engine_cycles=100)
    start = {}

    async def testbench(ctx):
        cycle = 0
        bench.submit(ctx)
        while not ctx.get(bench.dut.writer.request.valid):
            if ctx.get(bench.dut.reader.request.valid):
                start.setdefault("cycle", cycle)
            await ctx.tick()
            cycle += 1
        entry = await bench.completion(ctx)
        assert entry["cycles"] == cycle - start["cycle"]
        assert 100 < entry["cycles"] < 180

    bench.run(testbench)


def test_latencies():
    """The docstring's figures."""
    bench = Bench(PRESETS["small"], latency=3, engine_cycles=0)
    dut = bench.dut
    events = {
        "request": dut.reader.request.valid, "last": dut.reader.valid & dut.reader.last,
        "job": dut.o_job.valid, "done": dut.i_done, "write": dut.writer.request.valid,
        "acknowledged": dut.writer.done, "irq": dut.o_irq}
    seen = []

    async def watch(ctx):
        cycle = 0
        async for _, _, tail, *values in ctx.tick().sample(dut.sq_tail, *events.values()):
            if tail and not seen:
                seen.append(("doorbell", cycle))
            seen.extend((n, cycle) for n, v in zip(events, values, strict=True) if v)
            cycle += 1

    async def testbench(ctx):
        await bench.run_one(ctx)
        await ctx.tick()

    bench.run(testbench, watch)
    steps = [(b[0], b[1] - a[1]) for a, b in itertools.pairwise(seen)]
    # The others are the models' own.
    assert [s for s in steps if s[0] not in ("last", "done", "acknowledged")][:5] == [
        ("request", 2), ("request", 5), ("job", 9 + 3), ("write", 2), ("irq", 1)]


@pytest.mark.parametrize("delay", [*range(2, 71, 3)])
def test_abort_at_any_time(delay):
    """Whenever it comes, every command gets one completion, and the next one runs."""
    bench = Bench(engine_cycles=20, latency=8, stall=0.2, seed=delay)

    async def testbench(ctx):
        bench.submit(ctx, tag=1)
        await ctx.tick().repeat(delay)
        busy = ctx.get(bench.dut.busy)
        await pulse(ctx, bench.dut.i_abort)
        entry = await bench.completion(ctx)
        assert entry["tag"] == 1
        if entry["status"] == Status.ABORTED:
            assert busy
            assert bench.resets >= DRAIN_CYCLES
            assert bench.counts == [(1, 0, 0, 0)]
        else:
            assert entry["status"] == Status.OK
            assert not bench.resets
            assert delay > 40
        resets = bench.resets
        assert (await bench.run_one(ctx, tag=2))["status"] == Status.OK
        assert bench.resets == resets

    bench.run(testbench)


def test_abort_while_idle_is_ignored():
    bench = Bench()

    async def testbench(ctx):
        await pulse(ctx, bench.dut.i_abort)
        await ctx.tick().repeat(3)
        assert (await bench.run_one(ctx))["status"] == Status.OK

    bench.run(testbench)
    assert not bench.resets


def test_abort_waits_for_memory():
    """A layer's read that memory does not answer: draining shows, and nothing is delivered late."""
    held = []
    bench = Bench(latency=0, hold=lambda: bool(held), engine=lambda job: None)
    dut = bench.dut

    async def testbench(ctx):
        bench.submit(ctx, tag=5)
        while ctx.get(dut.sq_head) == 0:
            await ctx.tick()
        await ctx.tick().until(dut.reader.request.valid & dut.reader.request.ready)
        held.append(1)
        await ctx.tick().repeat(5)
        await pulse(ctx, dut.i_abort)
        await ctx.tick().repeat(100)
        assert ctx.get(dut.draining)
        assert ctx.get(dut.flush)
        assert ctx.get(dut.o_engine_reset)
        assert bench.log == []
        held.clear()
        entry = await bench.completion(ctx)
        assert (entry["tag"], entry["status"]) == (5, Status.ABORTED)
        assert not ctx.get(dut.draining)

    bench.run(testbench)
    assert not bench.jobs


def test_abort_while_the_submission_is_fetched_waits_for_its_tag():
    held = [1]
    bench = Bench(hold=lambda: bool(held))
    dut = bench.dut

    async def testbench(ctx):
        bench.submit(ctx, tag=77)
        await ctx.tick().repeat(5)
        await pulse(ctx, dut.i_abort)
        await ctx.tick().repeat(30)
        assert ctx.get(dut.draining)
        assert not ctx.get(dut.flush)
        held.clear()
        entry = await bench.completion(ctx)
        assert (entry["tag"], entry["status"]) == (77, Status.ABORTED)

    bench.run(testbench)


def test_watchdog():
    hang = [True]
    bench = Bench(watchdog=50, engine=lambda job: None if hang[0] else {}, engine_cycles=200)
    dut = bench.dut

    async def testbench(ctx):
        bench.submit(ctx, tag=1)
        # As long as something moves, nothing happens.
        for k in range(400):
            ctx.set(dut.progress, k % 45 == 0)
            await ctx.tick()
        ctx.set(dut.progress, 1)
        await ctx.tick()
        ctx.set(dut.progress, 0)
        assert not bench.resets
        await ctx.tick().repeat(50)
        assert not ctx.get(dut.draining)
        await ctx.tick().repeat(5)
        assert ctx.get(dut.draining)
        entry = await bench.completion(ctx)
        assert (entry["tag"], entry["status"]) == (1, Status.WATCHDOG)
        # 0: never.
        hang[0] = False
        ctx.set(dut.watchdog, 0)
        assert (await bench.run_one(ctx))["status"] == Status.OK

    bench.run(testbench)


@pytest.mark.parametrize("delay", [1, 4, 12, 25, 40, 55, 70])
def test_soft_reset_at_any_time(delay):
    bench = Bench(engine_cycles=20, latency=5, stall=0.2, seed=delay, ring_log2=1)
    dut = bench.dut

    async def testbench(ctx):
        for _ in range(3):
            await bench.run_one(ctx, opcode=Opcode.NOP)
        bench.submit(ctx, tag=1)
        await ctx.tick().repeat(delay)
        irqs = bench.log.count("irq")
        await pulse(ctx, dut.i_soft_reset)
        assert ctx.get(dut.draining)
        while "reset" not in bench.log:
            await ctx.tick()
            # As the register file does it.
            if ctx.get(dut.o_reset_done):
                bench.tail = bench.head = 0
                await ctx.tick()
                ctx.set(dut.sq_tail, 0)
                ctx.set(dut.cq_head, 0)
        assert bench.log.count("irq") == irqs
        assert bench.resets >= DRAIN_CYCLES
        assert ctx.get(dut.sq_head) == ctx.get(dut.cq_tail) == 0
        await ctx.tick().repeat(20)
        assert not ctx.get(dut.busy)
        bench.completions, bench.written = [], []
        bench.log.clear()
        assert (await bench.run_one(ctx, tag=3))["tag"] == 3  # at entry 0, with phase 1
        assert (await bench.run_one(ctx, tag=4))["tag"] == 4

    bench.run(testbench)


class Small(wiring.Component):
    """Registers, command processor and port, joined as in the accelerator."""

    def __init__(self, config):
        self.registers = RegisterFile(config)
        self.processor = CommandProcessor(config)
        self.port = MemoryPort(config, readers=2, writers=2)
        super().__init__({})

    def elaborate(self, platform):
        m = Module()
        m.submodules.registers = r = self.registers
        m.submodules.processor = p = self.processor
        m.submodules.port = port = self.port
        wiring.connect(m, reader=p.reader, port=port.reader0)
        wiring.connect(m, writer=p.writer, port=port.writer0)
        m.d.comb += [
            port.flush.eq(p.flush), port.clear_faults.eq(p.clear_faults), p.idle.eq(port.idle),
            p.fault_window.eq(port.fault_window), p.fault_bus.eq(port.fault_bus),
            p.fault_address.eq(port.fault_address),
            port.window_base.eq(r.rw_window_base), port.window_limit.eq(r.rw_window_limit),
            p.enable.eq(r.rw_enable), p.sq_base.eq(r.rw_sq_base), p.cq_base.eq(r.rw_cq_base),
            p.ring_log2.eq(r.rw_ring_log2), p.sq_tail.eq(r.rw_sq_tail),
            p.cq_head.eq(r.rw_cq_head), p.watchdog.eq(r.rw_watchdog),
            p.i_abort.eq(r.pulse_control_abort), p.i_soft_reset.eq(r.pulse_control_soft_reset),
            r.ro_sq_head.eq(p.sq_head), r.ro_cq_tail.eq(p.cq_tail),
            r.ro_status.eq(Cat(p.busy, p.draining)),
            r.set_irq_status_completion.eq(p.o_irq),
            r.set_irq_status_reset_done.eq(p.o_reset_done), r.clear.eq(p.o_reset_done),
            p.progress.eq(port.read_beat | port.write_beat),
        ]
        return m


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_with_the_real_port_and_registers(preset):
    config = PRESETS[preset]
    dut = Small(config)
    axil = dut.registers.axil
    held = []
    memory = AxiMemory(dut.port.axi_mem, size=SIZE, max_burst=config.max_burst_beats, seed=5,
                       stall=0.3, latency=10, window=(SQ, SIZE), refuse=(0xA000,),
                       hold=lambda: bool(held))
    memory.memory[LAYER_AT:LAYER_AT + ENTRY_BYTES] = encode(LAYER, GOOD_LAYER)

    async def write(ctx, name, value):
        ctx.set(axil.awaddr, REGISTERS[name].address)
        ctx.set(axil.wdata, value)
        ctx.set(axil.wstrb, 15)
        ctx.set(axil.awvalid, 1)
        ctx.set(axil.wvalid, 1)
        ctx.set(axil.bready, 1)
        await ctx.tick()
        ctx.set(axil.awvalid, 0)
        ctx.set(axil.wvalid, 0)
        await ctx.tick().until(axil.bvalid)

    async def read(ctx, name):
        ctx.set(axil.araddr, REGISTERS[name].address)
        ctx.set(axil.arvalid, 1)
        ctx.set(axil.rready, 1)
        await ctx.tick()
        ctx.set(axil.arvalid, 0)
        value, = await ctx.tick().sample(axil.rdata).until(axil.rvalid)
        return value

    def put(index, **changes):
        at = SQ + ENTRY_BYTES * index
        memory.memory[at:at + ENTRY_BYTES] = encode(SUBMISSION, GOOD_SUBMISSION | changes)

    def completion(index):
        at = CQ + ENTRY_BYTES * index
        return decode(COMPLETION, bytes(memory.memory[at:at + ENTRY_BYTES]))

    async def interrupt(ctx):
        await ctx.tick().until(dut.registers.irq)
        await write(ctx, "IRQ_STATUS", 3)
        await ctx.tick()

    async def engine(ctx):
        p = dut.processor
        ctx.set(p.o_job.ready, 1)
        left = 0
        async for _, _, valid, job in ctx.tick().sample(p.o_job.valid, p.o_job.payload):
            ctx.set(p.i_done, left == 1)
            left = max(left - 1, 0)
            if valid and job.tokens == 3:
                left = 7

    async def testbench(ctx):
        for name, value in {
            "SQ_BASE_LO": SQ, "CQ_BASE_LO": CQ, "RING_LOG2": 3, "WINDOW_BASE_LO": SQ,
            "WINDOW_LIMIT_LO": SIZE, "IRQ_ENABLE": 3, "ENABLE": 1,
        }.items():
            await write(ctx, name, value)
        put(0, tag=1)
        put(1, tag=2, layer_address=0x40)
        put(2, tag=3, layer_address=0xA000)
        put(3, tag=4, tokens=4)
        for index, status in ((0, Status.OK), (1, Status.WINDOW), (2, Status.BUS_ERROR)):
            await write(ctx, "SQ_TAIL", index + 1)
            await interrupt(ctx)
            entry = completion(index)
            assert (entry["tag"], entry["status"], entry["phase"]) == (index + 1, status, 1)
        assert completion(1)["address"] == 0x40
        assert completion(2)["address"] == 0xA000
        await write(ctx, "SQ_TAIL", 4)
        await ctx.tick().repeat(150)
        assert await read(ctx, "STATUS") == 1
        await write(ctx, "CONTROL", 2)
        await interrupt(ctx)
        assert completion(3)["status"] == Status.ABORTED
        assert await read(ctx, "CQ_TAIL") == 4
        # Soft reset with a read that memory holds back.
        put(4, tag=5)
        await write(ctx, "SQ_TAIL", 5)
        await ctx.tick().until(dut.port.axi_mem.arvalid)
        held.append(1)
        await write(ctx, "CONTROL", 1)
        await ctx.tick().repeat(50)
        assert await read(ctx, "STATUS") & 2
        held.clear()
        await interrupt(ctx)
        for name in ("SQ_HEAD", "SQ_TAIL", "CQ_HEAD", "CQ_TAIL", "STATUS"):
            assert await read(ctx, name) == 0
        await write(ctx, "SQ_TAIL", 1)
        await interrupt(ctx)
        entry = completion(0)
        assert (entry["tag"], entry["status"], entry["phase"]) == (1, Status.OK, 1)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(testbench)
    sim.add_testbench(memory.serve, background=True)
    sim.add_testbench(engine, background=True)
    sim.run()


def test_arguments():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not None"):
        CommandProcessor(None)
