"""Counters against sums of their events."""

import random

import pytest
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.control.counters import Counters, counters_of
from moeaccel.interface.registers import BUFFER_COUNTERS, COUNTERS, REGISTERS


def value(ctx, dut, name):
    return ctx.get(getattr(dut, f"ro_{name}_hi")) << 32 | ctx.get(getattr(dut, f"ro_{name}_lo"))


LARGEST = PRESETS["wide512"].replace(max_tokens=1 << 16, max_assignments=1 << 17, max_dim=32768,
                                    channels=4, buffer_slots=2, buffer_beats=64)


@pytest.mark.parametrize("config", [PRESETS["tiny"], PRESETS["small"], LARGEST],
                         ids=["tiny", "small", "largest"])
def test_sums(config):
    dut = Counters(config)
    names = counters_of(config)
    rng = random.Random(1)

    async def testbench(ctx):
        await ctx.tick()  # reset clears, a cycle later
        for _ in range(2):
            totals = dict.fromkeys(names, 0)
            for _ in range(40):
                for name in names:
                    signal = getattr(dut, name)
                    amount = rng.choice([0, rng.getrandbits(len(signal)), (1 << len(signal)) - 1])
                    ctx.set(signal, amount)
                    scale = config.port_bytes if name.startswith("bytes_") else 1
                    totals[name] += amount * scale
                await ctx.tick()
            for name in names:
                ctx.set(getattr(dut, name), 0)
            await ctx.tick()
            assert {name: value(ctx, dut, name) for name in names} == totals
            assert config is not LARGEST or totals["overflows"] > 1 << 32  # the high word is in use
            ctx.set(dut.overflows, 5)
            await ctx.tick()
            ctx.set(dut.clear, 1)
            await ctx.tick()
            ctx.set(dut.clear, 0)
            await ctx.tick()
            ctx.set(dut.overflows, 0)
            await ctx.tick()
            assert all(value(ctx, dut, name) == 0 for name in names)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(testbench)
    sim.run()


def test_amounts_are_wide_enough():
    for config in (*PRESETS.values(), LARGEST):
        dut = Counters(config)
        assert 1 << len(dut.tokens) > config.max_tokens
        assert 1 << len(dut.assignments) > config.max_assignments
        for count in (dut.overflows, dut.underflows):
            assert 1 << len(count) > config.max_assignments * config.max_dim


def test_outputs_are_registers():
    dut = Counters(LARGEST)
    for name, _ in COUNTERS:
        for half in ("lo", "hi"):
            assert f"{name}_{half}".upper() in REGISTERS
            assert len(getattr(dut, f"ro_{name}_{half}")) == 32


def test_without_a_buffer_its_counters_are_not_there():
    for config in PRESETS.values():
        dut = Counters(config)
        assert all(
            hasattr(dut, name) == (config.buffer_slots > 0) for name in BUFFER_COUNTERS)


def test_arguments():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 3"):
        Counters(3)
