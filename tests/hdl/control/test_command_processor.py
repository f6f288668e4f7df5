"""CommandProcessor: with models of port and engine, then with the real port and registers."""

import itertools

import pytest
from amaranth import *
from amaranth.lib import wiring
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.control.command_processor import CommandProcessor
from moeaccel.hdl.control.register_file import RegisterFile
from moeaccel.hdl.memory.memory_port import MemoryPort
from moeaccel.interface.commands import (
    COMPLETION,
    COUNT_MAX,
    ENTRY_BYTES,
    LAYER,
    SUBMISSION,
    ElementType,
    NonFinite,
    Opcode,
    Status,
    decode,
    encode,
)
from moeaccel.interface.registers import REGISTERS
from tests.support.axi_memory import AxiMemory
from tests.support.command_bench import (
    CQ,
    GEMM,
    GOOD_LAYER,
    GOOD_SUBMISSION,
    LAYER_AT,
    SIZE,
    SQ,
    TINY,
    Bench,
    job_of,
)


@pytest.mark.parametrize("preset", ["tiny", "peer256", "small"])
@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_jobs_and_completions(preset, stall):
    bench = Bench(PRESETS[preset], stall=stall, seed=1)
    other = {"tokens": 5, "y_type": ElementType.BFLOAT16}

    async def testbench(ctx):
        assert await bench.run_one(ctx) | {"cycles": 0} == {
            "tag": 0x1234, "status": Status.OK, "detail": 0, "address": 0, "cycles": 0,
            "underflows": 0}
        assert (await bench.run_one(ctx, **GEMM, tag=9))["tag"] == 9
        bench.put_layer()
        for opcode in (Opcode.NOP, Opcode.FENCE):
            entry = await bench.run_one(ctx, opcode=opcode, tag=7, tokens=0, x_address=1)
            assert (entry["tag"], entry["status"]) == (7, Status.OK)
        await bench.run_one(ctx, **other)
        assert ctx.get(bench.dut.sq_head) == ctx.get(bench.dut.cq_tail) == 5 % 4
        await ctx.tick().repeat(20)
        assert not ctx.get(bench.dut.busy)

    bench.run(testbench)
    expected = [
        job_of(GOOD_SUBMISSION, GOOD_LAYER),
        job_of(GOOD_SUBMISSION | GEMM, GOOD_LAYER),
        job_of(GOOD_SUBMISSION | other, GOOD_LAYER)]
    assert [{name: job[name] for name in expected[0]} for job in bench.jobs] == expected
    assert not any(job.get("route") or job.get("continues") for job in bench.jobs)
    assert bench.log == ["done", "irq"] * 5  # acknowledged, then the interrupt
    assert bench.counts == [
        (1, 3, 0, 0), (1, 3, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0), (1, 5, 0, 0)]


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
    assert bench.counts == [(1, 0, 0, 0)]


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
        ("request", 2), ("request", 5), ("job", 5 + 3), ("write", 2), ("irq", 1)]


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
