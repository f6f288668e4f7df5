"""cocotb bench of the SDRAM controller: runs inside the simulator, started by test_sdram.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cocotb
from cocotb.triggers import ClockCycles

from moeaccel.sim import bfm

BASE = int(os.environ["BENCH_BASE"])
REGION = int(os.environ["BENCH_REGION"])
CYCLES = int(os.environ["BENCH_CYCLES"])


async def drain(dut, *, limit=100_000):
    """Wait until nothing is under way."""
    dut.i_read.value = dut.i_write.value = 0
    for _ in range(limit // 1000):
        await ClockCycles(dut.clk, 1000)
        if not dut.o_pending.value.to_unsigned():
            return
    raise AssertionError("bursts are never finished")


async def rates(dut, *, read, write, scattered):
    """Return words read and written in a cycle, which the chip's pins could carry once."""
    dut.i_random.value = scattered
    dut.i_read.value, dut.i_write.value = read, write
    await ClockCycles(dut.clk, 5000)
    counts = []
    for _ in range(2):
        counts.append((4 * dut.o_read_beats.value.to_unsigned(),
                       4 * 64 * dut.o_written_bursts.value.to_unsigned()))
        if len(counts) == 1:
            await ClockCycles(dut.clk, CYCLES)
    await drain(dut)
    assert not dut.o_wrong.value
    assert not dut.o_violation.value.to_unsigned()
    return [round((after - before) / CYCLES, 4)
            for before, after in zip(*counts, strict=True)]


@cocotb.test(timeout_time=100, timeout_unit="ms")
async def measure(dut):
    """Fill the region, then stream and scatter reads and writes."""
    dut.i_base.value = BASE
    dut.i_read.value = dut.i_write.value = dut.i_random.value = 0
    await bfm.start(dut)
    bursts = REGION // 512
    dut.i_write.value = 1
    while dut.o_written_bursts.value.to_unsigned() < bursts:
        await ClockCycles(dut.clk, 2000)
    await drain(dut)
    figures = {}
    for name, read, write, scattered in (
        ("stream read", 1, 0, 0), ("stream written", 0, 1, 0), ("streams, both", 1, 1, 0),
        ("scattered read", 1, 0, 1), ("scattered written", 0, 1, 1), ("scattered, both", 1, 1, 1),
    ):
        figures[name] = await rates(dut, read=read, write=write, scattered=scattered)
    Path("figures.json").write_text(json.dumps(figures), encoding="utf-8")
