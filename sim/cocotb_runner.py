"""Run cocotb test benches on Verilated models, from a normal pytest function.

>>> run_cocotb(verilog, "top", "tests.cocotb.top_bench", seed=1)    # doctest: +SKIP

cocotb's own runner makes every signal of the design public, which costs about half the speed; the
one below makes nothing but the ports public, so a bench sees the ports and no more. Simulators are
kept in the cache of :mod:`moeaccel.sim.cosim.verilator` under a digest of everything they were
built from.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cocotb_tools.config
from cocotb_tools.runner import SUPPORTED_RUNNERS, Verilator, get_runner

from moeaccel.sim.cosim import verilator as builder
from moeaccel.sim.cosim.sources import Design, digest as digest_of, locked
from moeaccel.sim.errors import BuildError, SimulationError
from moeaccel.toolchain import cache_folder, executing, find_compiler, using_cache

logger = logging.getLogger(__name__)

RUNNER = "moeaccel-verilator"
"""Name of the runner in cocotb's register."""

SEED_VARIABLE = "COCOTB_RANDOM_SEED"
WAVES_VARIABLE = "WAVES"

_FLAGS = ("-O3", "--x-assign", "fast", "--x-initial", "fast", "--no-timing", "--assert",
          *(f"-Wno-{name}" for name in builder.WAIVERS))
_TIMESCALE = ("1ns", "1ps")
_RUNTIME_OPTIMISE = "OPT_GLOBAL=-O2"
_OPTIMISE = {True: "OPT_FAST=-O3 -march=native", False: "OPT_FAST=-O1"}
_LOG_LINES = 40


class BenchFailure(SimulationError):
    """Tests of a bench failed, or the simulator ended without having run them.

    Attributes
    ----------
    seed : int
        Repeats the run.
    folder : pathlib.Path
        Log, results and waves of the run.
    """

    def __init__(self, message: str, *, seed: int, folder: Path) -> None:
        super().__init__(message)
        self.seed = seed
        self.folder = folder


@dataclass(frozen=True, kw_only=True)
class BenchTest:
    """One cocotb test that ran.

    Parameters
    ----------
    name : str
        As cocotb has it, parameters included.
    seconds : float
        Wall clock.
    failure : str or None
        What went wrong.
    skipped : bool
    """

    name: str
    seconds: float
    failure: str | None = None
    skipped: bool = False


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """What a run of a bench left behind.

    Parameters
    ----------
    tests : tuple of BenchTest
        In the order in which they ran.
    seed : int
    seconds : float
        Wall clock of the simulator's process, its imports included.
    folder : pathlib.Path
        Log, results, waves and whatever the bench wrote; it was the working folder.
    """

    tests: tuple[BenchTest, ...]
    seed: int
    seconds: float
    folder: Path


class PortsOnlyVerilator(Verilator):
    """cocotb's runner for Verilator without ``--public-flat-rw``.

    Attributes
    ----------
    prebuilt : tuple of str
        Object files in the build folder that make leaves as they are.
    optimise : bool
        Let the compiler take its time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log.setLevel(logging.WARNING)
        self._root = Path()
        self.prebuilt: tuple[str, ...] = ()
        self.optimise = True

    def _simulator_in_path_build_only(self) -> None:
        executable, self._root = builder._verilator()
        self.executable = str(executable)

    def _set_env_build(self) -> None:
        super()._set_env_build()
        _, root = builder._verilator()
        self.env["VERILATOR_ROOT"] = str(root)

    def _execute_cmds(self, cmds: Sequence[Any], cwd: Any, stdout: Any = None) -> None:
        for command in cmds:
            with executing(command[0]):
                super()._execute_cmds([command], cwd, stdout)

    def _build_command(self) -> list[list[str]]:
        translate, make = super()._build_command()
        makefile = (self._root / "include" / "verilated.mk").read_text(encoding="utf-8")
        # The PyPI wheel is not configured for a compiler: nothing includes the precompiled header.
        unset = re.search(r"^CFG_CXXFLAGS_PCH_I\s*=\s*$", makefile, re.MULTILINE)
        return [
            [flag for flag in translate if flag != "--public-flat-rw"],
            [*make, f"CXX={find_compiler()}", f"LINK={find_compiler()}",
             f"USER_LDLIBS={' '.join(builder.link_flags(find_compiler()))}",
             f"PYTHON3={sys.executable}", _OPTIMISE[self.optimise], "OPT_SLOW=-O1",
             _RUNTIME_OPTIMISE, *(f"-o{name}" for name in self.prebuilt),
             *(["CFG_CXXFLAGS_PCH_I=-include"] if unset else [])],
        ]


SUPPORTED_RUNNERS[RUNNER] = PortsOnlyVerilator


def run_cocotb(verilog: str | Design, top: str, test_module: str | Sequence[str], *,
               parameters: Mapping[str, object] | None = None,
               env: Mapping[str, str] | None = None, seed: int | None = None,
               waves: bool = False, optimise: bool = True, test_filter: str | None = None,
               folder: Path | None = None, cache: Path | None = None) -> BenchRun:
    """Build a simulator, or take it from the cache, and run a bench's tests in it.

    Parameters
    ----------
    verilog : str or Design
        Verilog, or what it can be made from.
    top : str
        Name of the top module; the bench's ``dut``.
    test_module : str or sequence of str
        Python modules with cocotb tests.
    parameters : mapping, optional
        Parameters of the top module.
    env : mapping, optional
        Environment variables of the bench.
    seed : int, optional
        Else ``$COCOTB_RANDOM_SEED``, or a random one; it is logged, and part of every failure.
    waves : bool
        Write ``dump.vcd`` into `folder`. The environment variable WAVES, where it is set, decides
        instead.
    optimise : bool
        False for a simulator that is built in about half the time and is slower by itself: right
        for short benches, most of whose time is Python's.
    test_filter : str, optional
        Regular expression: run only the tests whose full name has a match.
    folder : pathlib.Path, optional
        Working folder of the simulator. Else a temporary one, which stays after a failure or when
        there are waves.
    cache : pathlib.Path, optional
        Instead of :func:`moeaccel.toolchain.cache_folder`.

    Raises
    ------
    BenchFailure
        If a test failed, no test ran, or the simulator crashed (as it does when an assertion of
        the RTL fails).
    BuildError
        If Verilator or the C++ compiler refuses the design.
    """
    waves = _wanted_waves(waves)
    if seed is None:
        named = os.environ.get(SEED_VARIABLE)
        seed = int(named) if named else random.SystemRandom().randrange(1 << 31)
    home = build_simulator(verilog, top, parameters=parameters, waves=waves, optimise=optimise,
                           cache=cache)
    keep = folder is not None or waves
    folder = folder or Path(tempfile.mkdtemp(prefix="moeaccel-cocotb."))
    folder.mkdir(parents=True, exist_ok=True)
    names = test_module if isinstance(test_module, str) else ",".join(test_module)
    logger.info("running %s with seed %d in %s", names, seed, folder)

    log, results = folder / "simulation.log", folder / "results.xml"
    runner = get_runner(RUNNER)
    begin = time.monotonic()
    try:
        runner.test(
            test_module=test_module, hdl_toplevel=top, hdl_toplevel_lang="verilog", seed=seed,
            build_dir=home, test_dir=folder, results_xml=str(results.resolve()),
            log_file=log.resolve(), waves=waves, test_filter=test_filter,
            extra_env={"COCOTB_ANSI_OUTPUT": "0", **(env or {})})
        crash = ""
    except SystemExit as error:
        crash = f"exit status {error.code}"
    except RuntimeError as error:  # how cocotb's runner reports a simulator that died
        crash = str(error)
    seconds = time.monotonic() - begin

    tests = _read_results(results)
    failed = [test for test in tests if test.failure is not None]
    what = f"{names}, seed {seed} (repeat with {SEED_VARIABLE}={seed}), log {log}"
    if failed:
        lines = [f"{len(failed)} of {len(tests)} tests failed: {what}"]
        for test in failed:
            lines += [f"--- {test.name}", *(test.failure or "").rstrip().splitlines()]
        lines += _model_errors(log)
        raise BenchFailure("\n".join(lines), seed=seed, folder=folder)
    if crash or not any(not test.skipped for test in tests):
        why = f"The simulator died ({crash})" if crash else "No test ran"
        raise BenchFailure(f"{why}: {what}\n{_tail(log)}", seed=seed, folder=folder)
    for test in tests:
        logger.info("%s: %s in %.2f s", test.name, "skipped" if test.skipped else "passed",
                    test.seconds)
    if not keep:
        shutil.rmtree(folder)
    return BenchRun(tests=tests, seed=seed, seconds=seconds, folder=folder)


def build_simulator(verilog: str | Design, top: str, *,
                    parameters: Mapping[str, object] | None = None, waves: bool = False,
                    optimise: bool = True, cache: Path | None = None) -> Path:
    """Build the simulator that :func:`run_cocotb` runs, and return its folder in the cache.

    Raises
    ------
    BuildError
        If Verilator or the C++ compiler refuses the design.
    """
    waves = _wanted_waves(waves)
    design = Design.of(verilog)
    compiler = find_compiler()
    _, root = builder._verilator()
    tools = (f"waves={waves}", builder._compiler_identity(compiler),
             builder._verilator_identity(root))
    folder = cache or cache_folder()
    with using_cache(folder):
        name = design.name(folder / "verilog")
    digest = digest_of(
        name, top, *_FLAGS, *_TIMESCALE, _OPTIMISE[optimise], _RUNTIME_OPTIMISE, *tools,
        json.dumps(dict(parameters or {}), sort_keys=True, default=str),
        importlib.metadata.version("cocotb"), str(cocotb_tools.config.libs_dir))
    runtime_digest = digest_of(*_FLAGS, _RUNTIME_OPTIMISE, *tools)
    parent = folder / "cocotb"
    home = parent / digest
    runtime = parent / "runtime" / runtime_digest
    if (home / top).is_file():
        return home
    with using_cache(parent.parent):
        parent.mkdir(parents=True, exist_ok=True)
        with locked(parent / f"{digest}.lock"):
            if (home / top).is_file():  # another process built it meanwhile
                return home
            work = Path(tempfile.mkdtemp(prefix=f"{digest}.", suffix=".part", dir=parent))
            try:
                _build(design.verilog(), top, dict(parameters or {}), waves=waves,
                       optimise=optimise, work=work, runtime=runtime)
            except BuildError as error:
                failed = parent / f"{digest}.failed"
                shutil.rmtree(failed, ignore_errors=True)
                work.rename(failed)
                raise BuildError(f"{error}\nThe whole log: {failed / error.log.name}",
                                 log=failed / error.log.name) from None
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(home, ignore_errors=True)
            work.rename(home)
    return home


def _build(verilog: str, top: str, parameters: Mapping[str, object], *, waves: bool,
           optimise: bool, work: Path, runtime: Path) -> None:
    objects = work / "obj"
    objects.mkdir()
    source, ports, log = work / "top.v", work / "ports.vlt", work / "build.log"
    source.write_text(verilog, encoding="utf-8")
    ports.write_text(_public_ports(verilog, top), encoding="utf-8")
    # Verilator's run time is the same for every model, and a third of the work for a small one.
    kept = sorted(runtime.glob("verilated*.o"))
    for one in kept:
        shutil.copy2(one, objects)
    begin = time.monotonic()
    runner = PortsOnlyVerilator()
    runner.prebuilt = tuple(one.name for one in kept)
    runner.optimise = optimise
    try:
        runner.build(
            sources=[ports, source], hdl_toplevel=top, parameters=parameters, build_args=_FLAGS,
            build_dir=objects, timescale=_TIMESCALE, waves=waves, log_file=log)
    except RuntimeError as error:
        raise BuildError(f"The simulator cannot be built: {error}\n{_tail(log)}",
                         log=log) from None
    if not kept:
        with tempfile.TemporaryDirectory(dir=runtime.parent.parent) as place:
            for one in objects.glob("verilated*.o"):
                shutil.copy2(one, place)
            runtime.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another process was first
                shutil.copytree(place, runtime)
    (objects / top).rename(work / top)
    shutil.rmtree(objects)
    logger.info("built %s in %.1f s", top, time.monotonic() - begin)


def _public_ports(verilog: str, top: str) -> str:
    """Return the control file that shows a module's ports to cocotb, and nothing else."""
    match = re.search(rf"^module\s+\\?{re.escape(top)}\s*[(#;].*?^endmodule", verilog,
                      re.DOTALL | re.MULTILINE)
    if match is None:
        raise SimulationError(f"Verilog text must contain a module named {top!r}")
    names = [name for line in re.findall(r"^\s*(?:input|output)\b[^;]*;", match[0], re.MULTILINE)
             for name in re.findall(r"(\w+)\s*;", line)]
    return "\n".join([
        "`verilator_config",
        *(f'public_flat_rw -module "{top}" -var "{name}"' for name in dict.fromkeys(names)), ""])


def _wanted_waves(waves: bool) -> bool:
    """Return what cocotb's runner makes of `waves`: the environment decides."""
    named = os.environ.get(WAVES_VARIABLE, "")
    return waves if not named else named.lower() in ("1", "true", "yes", "on", "y", "enable")


def _tail(log: Path) -> str:
    if not log.is_file():
        return "There is no log."
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])


def _model_errors(log: Path) -> list[str]:
    """Return what the model itself complained about: assertions of the RTL."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if "%Error" in line][:_LOG_LINES]


def _read_results(path: Path) -> tuple[BenchTest, ...]:
    """Return the tests of a results file; none when it is missing or was cut off."""
    try:
        root = ElementTree.parse(path).getroot()
    except (FileNotFoundError, ElementTree.ParseError):
        return ()
    tests = []
    for case in root.iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        text = "\n".join(
            (child.text or child.get("message") or child.get("type") or child.tag).strip()
            for child in bad)
        tests.append(BenchTest(
            name=case.get("name", "?"), seconds=float(case.get("time") or 0),
            failure=text if bad else None, skipped=case.find("skipped") is not None))
    return tuple(tests)
