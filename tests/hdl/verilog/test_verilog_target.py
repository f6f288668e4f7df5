"""Equal parts are one Verilog module; elsewhere they are what they are."""

import re

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

from moeaccel.hdl.verilog.verilog_target import add_replicas, generate


class Counter(wiring.Component):
    i_step: In(2)
    o_count: Out(8)

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.o_count.eq(self.o_count + self.i_step)
        return m


class Counters(wiring.Component):
    i_step: In(2)
    o_total: Out(10)

    def elaborate(self, platform):
        m = Module()
        counters = add_replicas(m, platform, "counter", Counter, range(1, 4))
        m.d.comb += [
            *(counter.i_step.eq(self.i_step) for counter in counters),
            self.o_total.eq(sum(counter.o_count for counter in counters)),
        ]
        return m


def test_the_text_is_there_once():
    text = generate(Counters(), "top")
    assert re.findall(r"^module (\w+)", text, re.MULTILINE)[:2] == ["top", "moeaccel_counter"]
    assert re.findall(r"moeaccel_counter (counter\d)", text) == ["counter1", "counter2", "counter3"]
    # Clock and reset of their domain are ports.
    assert len(re.findall(r"\.rst\(", text)) == 3


def test_elsewhere_they_are_submodules():
    dut = Counters()

    async def testbench(ctx):
        ctx.set(dut.i_step, 3)
        await ctx.tick().repeat(5)
        assert ctx.get(dut.o_total) == 45

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(testbench)
    sim.run()


class Enabled(wiring.Component):
    i_en: In(1)
    i_value: In(signed(8))
    o_value: Out(signed(16))

    def elaborate(self, platform):
        m = Module()
        with m.If(self.i_en):
            m.d.sync += self.o_value.eq(self.i_value)
        return m


def test_for_simulation_registers_have_enables():
    register = r"if \(rst\) o_value <= 16'h0000;\s*else if \(i_en\) o_value <= "
    assert re.search(register, generate(Enabled(), "top", simulation=True))
    assert not re.search(register, generate(Enabled(), "top"))
