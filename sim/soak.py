"""The RTL beside the golden model for as long as one likes, with memories that are out for trouble.

Every case is another configuration, shape, routing, memory: drawn from a seed (:mod:`cases`), run
on both, and made as small as it goes when they differ.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig
from moeaccel.errors import MoeAccelError
from moeaccel.host import open_device
from moeaccel.host.device import Device
from moeaccel.host.errors import CommandAborted, CommandFailed
from moeaccel.host.moe import LOGIT_GRID, Moe
from moeaccel.host.transports.rtl import RtlTransport
from moeaccel.host.weights import load_router_weight
from moeaccel.image import Expert
from moeaccel.interface.commands import Status
from moeaccel.interface.registers import COUNTERS
from moeaccel.sim.cases import HARD_RESETS, MEMORY_BYTES, Call, Case, draw_case, shrink
from moeaccel.sim.cosim.accelerator import build_accelerator_model
from moeaccel.sim.cosim.simulation import CoSimulation
from moeaccel.sim.cosim.verilator import Model
from moeaccel.sim.routed import LogitRoutes

BUDGET = {"tiny": 400_000, "small": 120_000}
"""Cycles of a case, by configuration: about a second."""

OTHER_BUDGET = 60_000

WATCHDOG_CYCLES = 1 << 18
"""Longer than any drawn memory lets a command wait for anything."""

TIMEOUT_S = 8.0
"""Simulated: 8 million cycles."""

SHRINK_SECONDS = 120.0
MOST_FAILURES = 5

TIME = ("busy", "starved_weights", "starved_activations", "stalled_output", "idle")
"""Counters of cycles: each cycle is in one of them."""

_WORK = tuple(name for name, _ in COUNTERS if name not in TIME)

Outcome = NDArray[np.float32] | str
"""y, or how a command ended."""

_ABORTED = "ABORTED"


# -- one case --------------------------------------------------------------------------------------
def check(case: Case, model: Model, config: AcceleratorConfig | None = None) -> str | None:
    """Run a case on both and return what is wrong with the RTL, or None.

    Parameters
    ----------
    case : Case
    model : Model
        Of its configuration.
    config : AcceleratorConfig, optional
        What the model was built from, if it is not what the case says.

    Raises
    ------
    MoeAccelError
        If the golden model refuses the case.
    """
    config = config or case.parameters
    with open_device("golden", config=config, memory_bytes=MEMORY_BYTES) as golden:
        expected = _run(golden, replace(case, calls=tuple(
            replace(call, end="") for call in case.calls)), None)
        work = golden.counters()
    simulation = CoSimulation(model, memory=case.memories)
    transport = RtlTransport(config, simulation=simulation)
    try:
        rtl = open_device(transport, config=config, timeout_s=TIMEOUT_S,
                          watchdog_cycles=WATCHDOG_CYCLES)
        before, begin = _times(rtl), simulation.cycle
        found = _run(rtl, case, simulation)
        after = _times(rtl)
        passed = simulation.cycle - begin
        wrong = _compare(case, found, expected)
        if wrong is None and all(call.end in ("", "abort") for call in case.calls):
            counted = sum(after.values()) - sum(before.values())
            if counted != passed:
                wrong = f"the counters of cycles say {counted} of {passed} cycles"
        if wrong is None and not any(call.end for call in case.calls):
            counters = rtl.counters()
            differ = {n: (counters[n], work[n]) for n in _WORK if counters[n] != work[n]}
            if differ:
                wrong = f"counters (RTL, golden) differ: {differ}"
        simulation.check()
    except MoeAccelError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        # The simulation first: nothing waits for a device that hangs.
        transport.close()
    return wrong


def _times(device: Device) -> dict[str, int]:
    """Return the counters of cycles of a device that rests; idle is read last."""
    values = device.counters()
    return {name: values[name] for name in TIME}


def _run(device: Device, case: Case, simulation: CoSimulation | None) -> list[Outcome]:
    layers, handles = [], []
    for at, call in enumerate(case.calls):
        layers.append(_load(device, case.seed, at, call))
    for at, (call, layer) in enumerate(zip(case.calls, layers, strict=True)):
        handles.append(layer.submit(*_operands(case.seed, at, call)))
        if call.end and simulation is not None:
            simulation.run(call.after, until_irq=False)
            if call.end in HARD_RESETS:
                simulation.reset(memory=call.end == "hard reset with memory")
            device.abort() if call.end == "abort" else device.reset()
    return [_outcome(layer, handle) for layer, handle in zip(layers, handles, strict=True)]


def _load(device: Device, seed: int, at: int, call: Call) -> Any:
    rng = np.random.default_rng((seed, at, 0))
    options: dict[str, Any] = {
        "activation_bits": call.activation_bits, "grid_exponent": call.grid_exponent}
    if call.routed is not None and call.routed.only:
        return LogitRoutes(device, call.routed.router(call.experts, None, rng))
    if not call.experts:
        matrix = rng.standard_normal((call.d_other, call.d_in)).astype(np.float32)
        return device.load_linear(matrix, weight_format=call.weight_format, **options)
    layer = []
    for expert in call.every_expert:
        kind = call.kind_of(expert)
        gate_up = rng.standard_normal(((1 + kind.gated) * kind.d_expert, call.d_in))
        gate_up /= np.sqrt(call.d_in)
        down = rng.standard_normal((call.d_in, kind.d_expert)) / np.sqrt(kind.d_expert)
        biases = [rng.standard_normal(len(rows)) if kind.biases & bit else None
                  for bit, rows in ((1, gate_up), (2, down))]
        layer.append(Expert.quantise(
            gate_up, down, kind.weight_format, down_format=kind.down_format,
            activation=kind.activation, limit=kind.limit, gate_up_bias=biases[0],
            down_bias=biases[1]))
    if call.routed is None:
        return device.load_quantised(layer, **options)
    loaded = device.load_quantised(
        layer[: call.experts], shared=layer[call.experts :], **options)
    weight = rng.standard_normal((call.experts, call.d_in)).astype(np.float32)
    plane = load_router_weight(device, weight, grid_exponent=LOGIT_GRID)
    return Moe(device, [call.routed.router(call.experts, weight, rng)], [plane], loaded)


def _operands(seed: int, at: int, call: Call) -> tuple[NDArray[Any], ...]:
    rng = np.random.default_rng((seed, at, 1))
    ids = np.array(call.ids, np.int64)
    routed = call.routed
    width = call.experts if routed is not None and routed.only else call.d_in
    x = rng.standard_normal((len(ids), width)).astype(np.float32)
    if 0 <= call.nan < len(x):
        x[call.nan, width // 2] = np.nan
    if not call.experts or routed is not None:
        return (x,)
    return x, ids, rng.standard_normal(ids.shape).astype(np.float32)


def _outcome(layer: Any, handle: Any) -> Outcome:
    try:
        return layer.sync(handle)
    except CommandAborted:
        return _ABORTED
    except CommandFailed as error:
        status = Status(error.status).name
        return f"{status}, detail {error.detail:#x}, address {error.address:#x}"


def _compare(case: Case, found: Sequence[Outcome], expected: Sequence[Outcome]) -> str | None:
    """Say what differs; what was ended may be, but nothing that was submitted later."""
    ends = [(at, call.end) for at, call in enumerate(case.calls) if call.end]
    aborted = [at for at, outcome in enumerate(found)
               if isinstance(outcome, str) and outcome == _ABORTED]
    allowed = len(ends) if all(end == "abort" for _, end in ends) else len(found)
    if len(aborted) > allowed or any(at > max(e for e, _ in ends) for at in aborted if ends):
        return f"commands {aborted} were aborted, though {ends or 'nothing'} was asked for"
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        if at in aborted:
            continue
        if isinstance(one, str) or isinstance(other, str):
            ends_as = [way if isinstance(way, str) else "OK" for way in (one, other)]
            if ends_as[0] != ends_as[1]:
                return f"command {at} ends with {ends_as[0]} instead of {ends_as[1]}"
            continue
        differ = one.view(np.uint32) != other.view(np.uint32)
        if differ.any():
            first = tuple(int(i) for i in np.argwhere(differ)[0])
            return (f"command {at}: {int(differ.sum())} of {differ.size} elements differ, status "
                    f"OK; first {first}: {one[first]!s} instead of {other[first]!s}")
    return None


# -- many ------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case that failed, and the smallest that was found of it."""

    seed: int
    what: str
    case: str
    smallest: str
    smallest_what: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a soak has done.

    Parameters
    ----------
    first_seed, cases : int
        Cases have consecutive seeds.
    seconds : float
        Without the builds.
    failures : tuple of Failure
    interrupted : bool
        By Ctrl-C.
    """

    first_seed: int
    cases: int
    seconds: float
    failures: tuple[Failure, ...]
    interrupted: bool


class Soak:
    """Draws cases and runs them.

    Parameters
    ----------
    targets : sequence of (str, int)
        Presets and numbers of channels; cases take turns.
    seed : int
        Of the first case.
    progress : callable
        Called with what goes on.
    """

    def __init__(self, targets: Sequence[tuple[str, int]], *, seed: int,
                 progress: Callable[[str], None]) -> None:
        self._targets = tuple(targets)
        self._seed = seed
        self._progress = progress
        self._models: dict[AcceleratorConfig, Model] = {}

    def build(self) -> None:
        """Build every model that is not there."""
        for config, channels in self._targets:
            self.model(Case(config=config, channels=channels,
                            memories=Case().memories * channels))

    def model(self, case: Case) -> Model:
        """Return the model of a case's configuration."""
        config = case.parameters
        if config not in self._models:
            self._progress(f"building {config.name}")
            self._models[config] = build_accelerator_model(config)
        return self._models[config]

    def draw(self, seed: int) -> Case:
        """Return the case of a seed."""
        config, channels = self._targets[seed % len(self._targets)]
        return draw_case(seed, config, channels, budget=BUDGET.get(config, OTHER_BUDGET))

    def check(self, case: Case) -> str | None:
        """Return what is wrong with a case, or None."""
        return check(case, self.model(case))

    def run(self, seconds: float) -> Report:
        """Run cases until the time is over, MOST_FAILURES have failed, or Ctrl-C."""
        failures: list[Failure] = []
        cases = 0
        interrupted = False
        begin = time.monotonic()
        try:
            self.build()
            begin = time.monotonic()
            while time.monotonic() - begin < seconds and len(failures) < MOST_FAILURES:
                seed = self._seed + cases
                case = self.draw(seed)
                self._progress(f"case {cases + 1:,} (seed {seed}, {case.parameters.name}), "
                               f"{len(failures)} failed")
                what = self.check(case)
                cases += 1
                if what is None:
                    continue
                failures.append(Failure(
                    seed=seed, what=what, case=case.to_json(), smallest=case.to_json(),
                    smallest_what=what, seconds=round(time.monotonic() - begin, 1)))
                for smallest, what in self.shrink(case):  # whatever interrupts it: the best so far
                    failures[-1] = replace(
                        failures[-1], smallest=smallest.to_json(), smallest_what=what)
        except KeyboardInterrupt:
            interrupted = True
        return Report(first_seed=self._seed, cases=cases,
                      seconds=round(time.monotonic() - begin, 1), failures=tuple(failures),
                      interrupted=interrupted)

    def shrink(self, case: Case) -> Iterator[tuple[Case, str]]:
        """Yield ever smaller cases that fail, and how, as long as SHRINK_SECONDS allow."""
        end = time.monotonic() + SHRINK_SECONDS
        tried = 0

        def fails(other: Case) -> str | None:
            nonlocal tried
            if time.monotonic() > end or other.parameters not in self._models:
                return None
            tried += 1
            self._progress(f"making a failing case smaller: {tried} tried")
            with contextlib.suppress(MoeAccelError):  # the golden model refuses it
                return self.check(other)
            return None

        return shrink(case, fails)
