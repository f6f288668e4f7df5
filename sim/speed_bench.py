"""cocotb bench of :mod:`moeaccel.sim.speed`: runs one prepared command and times it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import cocotb
import numpy as np
from cocotb.utils import get_sim_time

from moeaccel.sim import bfm
from moeaccel.sim.memory import StallModel


@cocotb.test(timeout_time=10, timeout_unit="sec")
async def one_command(dut: Any) -> None:
    """Load memory and registers, ring the doorbell, wait for the interrupt."""
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    stalls, seed = StallModel(**job["stalls"]), job["seed"]
    memory = bfm.MemoryBus(dut, stalls=stalls, seed=seed)
    registers = bfm.RegisterBus(dut, stalls=stalls, seed=seed + 1)
    with np.load("memory.npz") as pieces:
        for address in pieces.files:
            memory.write(int(address), pieces[address].tobytes())
    await bfm.start(dut)
    for address, value in job["start"]:
        await registers.write(address, value)
    first = get_sim_time("ns")
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for address, value in job["doorbell"]:
        await registers.write(address, value)
    await bfm.wait_high(dut, dut.irq, max_cycles=job["max_cycles"])
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    last = get_sim_time("ns")
    read = {name: memory.read(*where).hex() for name, where in job["read"].items()}
    Path("result.json").write_text(json.dumps({
        "cycles": round((last - first) / bfm.CLOCK_NS), "seconds": seconds,
        "cpu_seconds": cpu_seconds, "read": read,
    }), encoding="utf-8")
