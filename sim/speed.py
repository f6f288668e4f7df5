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
from moeaccel.config import AcceleratorConfig
from moeaccel.interface.commands import (
    COMPLETION,
    ENTRY_BYTES,
    SUBMISSION,
    Opcode,
    Status,
    decode,
    encode,
)
from moeaccel.sim.cocotb_runner import build_simulator, run_cocotb
from moeaccel.sim.cosim.accelerator import build_accelerator_model, shipped_design
from moeaccel.sim.cosim.memory import MemoryModel, StallModel
from moeaccel.sim.cosim.simulation import CoSimulation
from moeaccel.sim.cosim.sources import Design
from moeaccel.sim.cosim.verilator import Model
from moeaccel.sim.errors import SimulationError
from moeaccel.sim.workload import Layout, random_experts, register_writes, start_writes

MAX_CYCLES = 100_000_000
RING_ENTRIES = 2

# The command is repeated for as long and as often in each round, and the fastest run counts, as in
# timeit: what else a machine does makes runs slower, never faster. The simulators take turns, so
# that a slow time of the machine does not fall on one of them alone.
ROUNDS = 3
LEAST_SECONDS = 1.5
LEAST_RUNS = 2
_READ_LATENCY = 4  # about that of the cocotb memory
_NO_STALLS = StallModel()

Run = tuple[int, float, float]  # cycles, seconds, CPU seconds


@dataclass(frozen=True, kw_only=True)
class SimulatorSpeed:
    """One simulator's figures.

    Parameters
    ----------
    simulator : str
    runs : int
        Commands that were timed.
    cycles : int
        Clock cycles from the doorbell to the interrupt, of the fastest.
    seconds : float
        Wall clock of the same; without build, start and loading.
    cpu_seconds : float
        The process's own time of the same.
    cycles_per_second : float
    """

    simulator: str
    runs: int
    cycles: int
    seconds: float
    cpu_seconds: float
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
    model, design = build_accelerator_model(config), shipped_design(config)
    build_simulator(design, "top", waves=False)
    in_process: list[Run] = []
    under_cocotb: list[Run] = []
    for _ in range(ROUNDS):
        in_process += _run_cosim(model, job, stalls, seed)
        under_cocotb += _run_cocotb(design, job, stalls, seed)
    fast, slow = _speed("in-process co-simulation", in_process), _speed("cocotb", under_cocotb)
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
    submissions, completions = (layout.reserve(RING_ENTRIES * ENTRY_BYTES) for _ in range(2))
    layer = random_experts(draw, experts, d_model, d_expert, weight_format)
    x = draw.standard_normal((tokens, d_model)).astype(np.float32)
    ids = (np.arange(2 * tokens) % experts).reshape(tokens, 2)
    weights = draw.random((tokens, 2)).astype(np.float32)
    fields = layout.place_command(layout.place_experts(layer, planes=planes), x, ids, weights)
    return _Job(
        pieces=layout.take(),
        start=start_writes(layout, submissions=submissions, completions=completions,
                           ring_log2=RING_ENTRIES.bit_length() - 1),
        completion=completions, submissions=submissions,
        submission=encode(SUBMISSION, {"opcode": Opcode.EXPERTS, **fields}),
        y_address=fields["y_address"],
        y=golden.experts(x, ids, weights, layer, planes=planes).y)


def again(runs: list[Run]) -> bool:
    """Return whether there is to be one run more, after these."""
    return len(runs) < LEAST_RUNS or sum(seconds for _, seconds, _ in runs) < LEAST_SECONDS


def _speed(simulator: str, runs: list[Run]) -> SimulatorSpeed:
    cycles, seconds, cpu_seconds = max(runs, key=lambda run: run[0] / run[1])
    return SimulatorSpeed(simulator=simulator, runs=len(runs), cycles=cycles, seconds=seconds,
                          cpu_seconds=cpu_seconds, cycles_per_second=cycles / seconds)


def _run_cosim(model: Model, job: _Job, stalls: StallModel, seed: int) -> list[Run]:
    runs: list[Run] = []
    memory = dataclasses.replace(MemoryModel.ideal(_READ_LATENCY), stalls=stalls,
                                 never_refuse=stalls == _NO_STALLS)
    with CoSimulation(model, memory=memory, register_stalls=stalls, seed=seed) as cosim:

        def write_registers(**values: int) -> None:
            for address, value in register_writes(**values):
                cosim.reg_write(address, value)

        for address, data in job.pieces:
            cosim.mem_write(address, data)
        for address, value in job.start:
            cosim.reg_write(address, value)
        while again(runs):
            entry = len(runs) % RING_ENTRIES
            following = (entry + 1) % RING_ENTRIES
            cosim.mem_write(job.submissions + ENTRY_BYTES * entry, job.submission)
            cosim.mem_write(job.y_address, bytes(job.y.nbytes))
            first, begin, cpu_begin = cosim.cycle, time.perf_counter(), time.process_time()
            write_registers(SQ_TAIL=following)
            cosim.wait_irq(max_cycles=MAX_CYCLES)
            runs.append((cosim.cycle - first, time.perf_counter() - begin,
                         time.process_time() - cpu_begin))
            where = job.completion + ENTRY_BYTES * entry
            job.check(cosim.mem_read(where, ENTRY_BYTES).tobytes(),
                      cosim.mem_read(job.y_address, job.y.nbytes).tobytes())
            write_registers(IRQ_STATUS=1, CQ_HEAD=following)
    return runs


def _run_cocotb(design: Design, job: _Job, stalls: StallModel, seed: int) -> list[Run]:
    with tempfile.TemporaryDirectory(prefix="moeaccel-speed.") as name:
        folder = Path(name)
        pieces = {str(address): np.frombuffer(data, np.uint8) for address, data in job.pieces}
        np.savez(folder / "memory.npz", **pieces)  # type: ignore[arg-type]
        (folder / "job.json").write_text(json.dumps({
            "stalls": asdict(stalls), "seed": seed, "start": job.start,
            "submissions": job.submissions, "submission": job.submission.hex(),
            "completion": job.completion, "y": (job.y_address, job.y.nbytes),
        }), encoding="utf-8")
        run_cocotb(design, "top", "moeaccel.sim.speed_bench", seed=1, folder=folder)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for completion, y in result["read"]:
        job.check(bytes.fromhex(completion), bytes.fromhex(y))
    return [tuple(run) for run in result["runs"]]
