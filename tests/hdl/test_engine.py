"""The engine as a whole: one command at a time, whatever memory does (its work: tests/system)."""

from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.engine import Engine

CONFIG = PRESETS["tiny"]
LATE_CYCLES = 300


def test_a_command_is_taken_when_the_one_before_is_acknowledged():
    """The second waits although all of the first is handed out: a row of zeros is on its way."""
    dut = Engine(CONFIG)
    events = []

    async def read(ctx):
        """Give beats of -1, which is no expert."""
        reader = dut.dispatcher
        ctx.set(reader.data, -1)
        ctx.set(reader.request.ready, 1)
        while True:
            *_, asked = await ctx.tick().sample(reader.request.valid)
            ctx.set(reader.valid, asked)
            ctx.set(reader.last, asked)

    async def write(ctx):
        writer = dut.combiner_writer
        ctx.set(writer.request.ready, 1)
        ctx.set(writer.data.ready, 1)
        since = None  # the request
        while True:
            *_, asked = await ctx.tick().sample(writer.request.valid)
            since = 0 if asked else None if since in (None, LATE_CYCLES) else since + 1
            ctx.set(writer.done, since == LATE_CYCLES)
            if since == LATE_CYCLES:
                events.append("acknowledged")

    async def scenario(ctx):
        ctx.set(dut.i_job.p, {
            "routed": 1, "num_experts": 1, "steps_in": 1, "steps_out": 1, "tokens": 1,
            "top_k": 1})
        ctx.set(dut.i_job.valid, 1)
        for _ in range(2):
            await ctx.tick().until(dut.i_job.ready)
            events.append("taken")
        ctx.set(dut.i_job.valid, 0)
        await ctx.tick().until(dut.o_done)

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    for process in (read, write):
        simulator.add_testbench(process, background=True)
    simulator.add_testbench(scenario)
    simulator.run()
    assert events == ["taken", "acknowledged"] * 2
