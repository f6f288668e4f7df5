"""cocotb bench of :mod:`moeaccel.sim.speed`: runs one prepared command again and again, timed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import cocotb
import numpy as np
from cocotb.utils import get_sim_time

from moeaccel.interface.commands import ENTRY_BYTES
from moeaccel.sim import bfm
from moeaccel.sim.cosim.memory import StallModel
from moeaccel.sim.speed import MAX_CYCLES, RING_ENTRIES, Run, again
from moeaccel.sim.workload import register_writes


@cocotb.test(timeout_time=10, timeout_unit="sec")
async def commands(dut: Any) -> None:
    """Load memory and registers; ring the doorbell and wait for the interrupt, several times."""
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    stalls, seed = StallModel(**job["stalls"]), job["seed"]
    memory = bfm.MemoryBus(dut, stalls=stalls, seed=seed)
    registers = bfm.RegisterBus(dut, stalls=stalls, seed=seed + 1)
    y_address, y_bytes = job["y"]

    async def write_registers(**values: int) -> None:
        for address, value in register_writes(**values):
            await registers.write(address, value)

    with np.load("memory.npz") as pieces:
        for address in pieces.files:
            memory.write(int(address), pieces[address].tobytes())
    await bfm.start(dut)
    for address, value in job["start"]:
        await registers.write(address, value)
    runs: list[Run] = []
    read = []
    while again(runs):
        entry = len(runs) % RING_ENTRIES
        following = (entry + 1) % RING_ENTRIES
        memory.write(job["submissions"] + ENTRY_BYTES * entry, bytes.fromhex(job["submission"]))
        memory.write(y_address, bytes(y_bytes))
        first, begin, cpu_begin = get_sim_time("ns"), time.perf_counter(), time.process_time()
        await write_registers(SQ_TAIL=following)
        await bfm.wait_high(dut, dut.irq, max_cycles=MAX_CYCLES)
        runs.append((round((get_sim_time("ns") - first) / bfm.CLOCK_NS),
                     time.perf_counter() - begin, time.process_time() - cpu_begin))
        completion = memory.read(job["completion"] + ENTRY_BYTES * entry, ENTRY_BYTES)
        read.append((completion.hex(), memory.read(y_address, y_bytes).hex()))
        await write_registers(IRQ_STATUS=1, CQ_HEAD=following)
    Path("result.json").write_text(json.dumps({"runs": runs, "read": read}), encoding="utf-8")
