"""CommandProcessor: aborts, watchdog, soft resets, and completions that cannot be written."""

import pytest

from moeaccel.hdl.control.command_processor import DRAIN_CYCLES
from moeaccel.interface.commands import SUBMISSION, Opcode, Status
from tests.support.command_bench import CQ, LAYER_AT, SIZE, Bench, pulse, word_of


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
