"""A bench for the command processor: models of port and engine, and the jobs that it must give."""

import random

from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.control.command_processor import CommandProcessor
from moeaccel.interface.commands import (
    COMPLETION,
    ENTRY_BYTES,
    LAYER,
    MOE_BLOCK,
    SUBMISSION,
    ElementType,
    Opcode,
    decode,
    encode,
)

TINY = PRESETS["tiny"]
SIZE = 1 << 16
SQ, CQ, LAYER_AT = 0x1000, 0x2000, 0x3000

GOOD_SUBMISSION = {
    "opcode": Opcode.EXPERTS, "tag": 0x1234, "tokens": 3, "top_k": 2, "layer_address": LAYER_AT,
    "x_address": 0x4000, "ids_address": 0x5000, "weights_address": 0x6000, "y_address": 0x7000,
    "workspace_address": 0x8000,
}
GOOD_LAYER = {
    "planes": 2, "num_experts": 4, "d_in": 64, "d_out": 128, "grid_exponent": -28,
    "table_address": 0x9040,
}
GEMM = {"opcode": Opcode.GEMM, "top_k": 1}


class Bench:
    """A command processor; clients' ends of a memory port, and an engine, as models.

    ``engine`` is called with each job but products of a MOE, and returns what comes with
    ``i_done``, or None for never.
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
        entry[14:16] = b"\xff" * 2
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
                assert v[2] * width in (ENTRY_BYTES, ENTRY_BYTES * len(MOE_BLOCK))
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
        wait, result = None, {}
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
                if self.jobs[-1].get("precedes") and not self.jobs[-1]["route"]:
                    continue  # a product: what becomes of it is known with its route
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


def job_of(submission, layer):
    """Return the job that a good submission must give."""
    return {
        "routed": submission["opcode"] == Opcode.EXPERTS,
        "two_planes": layer["planes"] == 2,
        "x_narrow": submission.get("x_type", ElementType.FLOAT32) == ElementType.BFLOAT16,
        "y_narrow": submission.get("y_type", ElementType.FLOAT32) == ElementType.BFLOAT16,
        "steps_in": layer["d_in"] // 32,
        "steps_out": layer["d_out"] // 32,
        **{name: layer[name] for name in ("num_experts", "grid_exponent", "table_address")},
        **{name: submission[name] for name in (
            "tokens", "top_k", "x_address", "ids_address", "weights_address", "y_address",
            "workspace_address")},
    }


def word_of(structure, name):
    return next(f.word for f in structure if f.name == name)
