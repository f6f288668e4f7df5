"""How fast the simulators are: the same RTL and the same command in each."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeaccel import golden
from moeaccel.commands import COMPLETION, ENTRY_BYTES, SUBMISSION, Opcode, Status, decode, encode
from moeaccel.config import AcceleratorConfig
from moeaccel.hdl.top import generate_verilog
from moeaccel.sim.accelerator import accelerator_verilog
from moeaccel.sim.cocotb_runner import build_simulator, run_cocotb
from moeaccel.sim.cosim import CoSimulation
from moeaccel.sim.errors import SimulationError
from moeaccel.sim.memory import MemoryModel, StallModel
from moeaccel.sim.verilator import build_model
from moeaccel.sim.workload import Layout, random_experts, register_writes, start_writes

MAX_CYCLES = 100_000_000

# What the co-simulation runs at least, repeating the command: one run is over before the clock
# and the caches have settled.
_LEAST_SECONDS = 1.0
_READ_LATENCY = 4  # about that of the cocotb memory
_NO_STALLS = StallModel()


@dataclass(frozen=True, kw_only=True)
class SimulatorSpeed:
    """One simulator's figures.

    Parameters
    ----------
    simulator : str
    cycles : int
        Clock cycles from the doorbell to the interrupt, of one command.
    seconds : float
        Wall clock of the same, of one command on average; without build, start and loading.
    cpu_seconds : float
        The same of the process's own time: less at the mercy of what else the machine does.
    runs : int
        Commands that were timed.
    cycles_per_second : float
    """

    simulator: str
    cycles: int
    seconds: float
    cpu_seconds: float
    runs: int
    cycles_per_second: float


@dataclass(frozen=True, kw_only=True)
class SpeedComparison:
    """Figures of each simulator, and how many times faster the first is than the second."""

    config: str
    command: str
    simulators: tuple[SimulatorSpeed, ...]
    ratio: float

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One command in memory, and what must come of it."""

    pieces: list[tuple[int, bytes]]
    start: list[tuple[int, int]]
    completion: int
    submission: bytes
    submissions: int
    y_address: int
    y: npt.NDArray[np.float32]

    def check(self, completion: bytes, y: bytes) -> None:
        status = Status(decode(COMPLETION, completion)["status"])
        if status != Status.OK:
            raise SimulationError(f"The command must complete with OK, not {status.name}")
        if y != self.y.tobytes():
            raise SimulationError("The command must give the golden model's bits, but does not")


def compare(config: AcceleratorConfig, *, experts: int = 8, tokens: int = 4, d_model: int = 512,
            d_expert: int = 256, weight_format: str = "int4_g32", planes: int = 2,
            stalls: StallModel = _NO_STALLS, seed: int = 0) -> SpeedComparison:
    """Run one expert layer in the in-process co-simulation and under cocotb, and time both.

    Both results are compared with the golden model.

    Parameters
    ----------
    config : AcceleratorConfig
    experts, tokens, d_model, d_expert, weight_format, planes
        The layer; every token goes to two experts, and every expert is used if tokens suffice.
        Dimensions are reduced to ``config.max_dim``.
    stalls : StallModel
        Random pauses of every channel of both buses, as tests have them, in both simulators.
    seed : int
        Of weights, activations and pauses.

    Raises
    ------
    SimulationError
        If a simulator gives other bits.
    """
    d_model, d_expert = min(d_model, config.max_dim), min(d_expert, config.max_dim)
    experts = min(experts, config.max_experts)
    job = _prepare(config, experts, tokens, d_model, d_expert, weight_format, planes, seed)
    fast = _run_cosim(accelerator_verilog(config), job, stalls, seed)
    slow = _run_cocotb(generate_verilog(config), job, stalls, seed)
    return SpeedComparison(
        config=config.name,
        command=f"EXPERTS, {tokens} tokens, top-2 of {experts}, d_model {d_model}, d_expert "
                f"{d_expert}, {weight_format}, a{8 * planes}"
                + (", random pauses of every channel" if stalls != _NO_STALLS else ""),
        simulators=(fast, slow), ratio=fast.cycles_per_second / slow.cycles_per_second)


def _prepare(config: AcceleratorConfig, experts: int, tokens: int, d_model: int, d_expert: int,
             weight_format: str, planes: int, seed: int) -> _Job:
    draw = np.random.default_rng(seed)
    layout = Layout(config, limit=0x1000_0000)
    submissions, completions = layout.reserve(2 * ENTRY_BYTES), layout.reserve(2 * ENTRY_BYTES)
    layer = random_experts(draw, experts, d_model, d_expert, weight_format)
    x = draw.standard_normal((tokens, d_model)).astype(np.float32)
    ids = (np.arange(2 * tokens) % experts).reshape(tokens, 2)
    weights = draw.random((tokens, 2)).astype(np.float32)
    fields = layout.place_command(layout.place_experts(layer, planes=planes), x, ids, weights)
    return _Job(
        pieces=layout.take(),
        start=start_writes(layout, submissions=submissions, completions=completions, ring_log2=1),
        completion=completions, submissions=submissions,
        submission=encode(SUBMISSION, {"opcode": Opcode.EXPERTS, **fields}),
        y_address=fields["y_address"],
        y=golden.experts(x, ids, weights, layer, planes=planes).y)


def _speed(simulator: str, cycles: int, seconds: float, cpu: float, runs: int) -> SimulatorSpeed:
    return SimulatorSpeed(
        simulator=simulator, cycles=cycles // runs, seconds=seconds / runs, cpu_seconds=cpu / runs,
        runs=runs, cycles_per_second=cycles / seconds)


def _run_cosim(verilog: str, job: _Job, stalls: StallModel, seed: int) -> SimulatorSpeed:
    model = build_model(verilog)
    cycles, seconds, cpu, runs = 0, 0.0, 0.0, 0
    memory = dataclasses.replace(MemoryModel.ideal(_READ_LATENCY), stalls=stalls,
                                 never_refuse=stalls == _NO_STALLS)
    with CoSimulation(model, memory=memory, register_stalls=stalls, seed=seed) as cosim:
        for address, data in job.pieces:
            cosim.mem_write(address, data)
        for address, value in job.start:
            cosim.reg_write(address, value)
        while seconds < _LEAST_SECONDS:
            entry = runs % 2  # of rings with two entries
            cosim.mem_write(job.submissions + ENTRY_BYTES * entry, job.submission)
            cosim.mem_write(job.y_address, bytes(job.y.nbytes))
            first, begin, cpu_begin = cosim.cycle, time.perf_counter(), time.process_time()
            for address, value in register_writes(SQ_TAIL=entry ^ 1):
                cosim.reg_write(address, value)
            cosim.wait_irq(max_cycles=MAX_CYCLES)
            seconds += time.perf_counter() - begin
            cpu += time.process_time() - cpu_begin
            cycles += cosim.cycle - first
            runs += 1
            where = job.completion + ENTRY_BYTES * entry
            job.check(cosim.mem_read(where, ENTRY_BYTES).tobytes(),
                      cosim.mem_read(job.y_address, job.y.nbytes).tobytes())
            for address, value in register_writes(IRQ_STATUS=1, CQ_HEAD=entry ^ 1):
                cosim.reg_write(address, value)
    return _speed("in-process co-simulation", cycles, seconds, cpu, runs)


def _run_cocotb(verilog: str, job: _Job, stalls: StallModel, seed: int) -> SimulatorSpeed:
    build_simulator(verilog, "top", waves=False)
    with tempfile.TemporaryDirectory(prefix="moeaccel-speed.") as name:
        folder = Path(name)
        pieces = {str(address): np.frombuffer(data, np.uint8) for address, data in job.pieces}
        pieces[str(job.submissions)] = np.frombuffer(job.submission, np.uint8)
        np.savez(folder / "memory.npz", **pieces)  # type: ignore[arg-type]
        (folder / "job.json").write_text(json.dumps({
            "start": job.start, "doorbell": register_writes(SQ_TAIL=1), "max_cycles": MAX_CYCLES,
            "stalls": asdict(stalls), "seed": seed,
            "read": {"completion": (job.completion, ENTRY_BYTES),
                     "y": (job.y_address, job.y.nbytes)},
        }), encoding="utf-8")
        run_cocotb(verilog, "top", "moeaccel.sim.speed_bench", seed=1, folder=folder)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    job.check(bytes.fromhex(result["read"]["completion"]), bytes.fromhex(result["read"]["y"]))
    return _speed("cocotb", result["cycles"], result["seconds"], result["cpu_seconds"], 1)
