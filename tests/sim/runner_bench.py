"""cocotb bench of the runner's own tests, on the stand-in; started by test_cocotb_runner.py."""

import os
from pathlib import Path

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from moeaccel.sim import bfm
from moeaccel.sim.cosim.memory import StallModel
from moeaccel.sim.errors import RegisterResponseError
from tests.sim import copy_engine as engine

SEED = cocotb.RANDOM_SEED


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(probability=[0.0, 0.2, 0.6])
async def copies(dut, probability):
    stalls = StallModel.uniform(probability, length=5)
    memory = bfm.MemoryBus(dut, stalls=stalls, seed=SEED)
    registers = bfm.RegisterBus(dut, stalls=stalls, seed=SEED)
    await bfm.start(dut)
    assert await registers.read(engine.ID) == engine.ID_VALUE
    data = bytes(range(256)) * 5
    source, target, beats = 0x12_0000, 0x7_0000_1000, len(data) * 8 // len(dut.axi_mem__wdata)
    memory.write(source, data)
    for register, value in ((engine.SOURCE, source), (engine.TARGET, target)):
        await registers.write(register, value & 0xFFFF_FFFF)
        await registers.write(register + 4, value >> 32)
    await registers.write(engine.BEATS, beats)
    await registers.write(engine.CONTROL, 1)
    await bfm.wait_high(dut, dut.irq, max_cycles=50_000)
    assert memory.read(target, len(data)) == data
    assert memory.touched == (source, target + len(data))
    with pytest.raises(RegisterResponseError, match="SLVERR"):
        await registers.read(engine.NOTHING)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def errors(dut):
    memory, registers = bfm.MemoryBus(dut), bfm.RegisterBus(dut)
    await bfm.start(dut)
    memory.inject_error(8, 1)
    await registers.write(engine.BEATS, 2)
    await registers.write(engine.TARGET, 0x1000)
    await registers.write(engine.CONTROL, 1)
    await bfm.wait_high(dut, dut.irq, max_cycles=5000)
    assert await registers.read(engine.STATUS) == engine.STATUS_DONE | engine.STATUS_READ_ERROR


@cocotb.test
async def says_hello(dut):
    Path("hello.txt").write_text(f"{os.environ['HELLO']} {SEED}", encoding="utf-8")


@cocotb.test
async def fails(dut):
    answer = 41
    assert answer == 42, "the answer is wrong"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def trips_an_assertion(dut):
    registers = bfm.RegisterBus(dut)
    await bfm.start(dut)
    await registers.write(engine.TRAP, 1)
    await ClockCycles(dut.clk, 10)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def breaks_the_bus(dut):
    bfm.MemoryBus(dut)
    registers = bfm.RegisterBus(dut)
    await bfm.start(dut)
    await registers.write(engine.FAULT, engine.Fault.WLAST_MISSING)
    await registers.write(engine.BEATS, 4)
    await registers.write(engine.CONTROL, 1)
    await ClockCycles(dut.clk, 500)
