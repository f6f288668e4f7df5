"""Synthesis, placement and routing with open tools, each step done once for what goes into it.

Of the tools on PATH and the YoWASP ones of this environment the newer are used; every figure names
them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moeaccel.errors import ToolFailedError, ToolMissingError
from moeaccel.fpga import netlist, yowasp
from moeaccel.toolchain import is_as_new

__all__ = ["Build", "CELLS", "Routed", "Tool", "find_tool", "run_tool", "run_yosys"]

CELLS = {
    "multipliers": ("MULT18X18D",),
    "lut4": ("LUT4",),
    "carry": ("CCU2C",),
    "block_rams": ("DP16KD",),
    "lut_rams": ("TRELLIS_DPR16X4",),
    "flip_flops": ("TRELLIS_FF",),
}
"""Columns of a table of resources: cells as Yosys names them."""

SYNTHESIS = (
    "delete t:$print",
    "synth_ecp5 -top top -run begin:coarse",
    "proc",
    "flatten",
    "opt_clean -purge",
    "synth_ecp5 -top top -run coarse:map_ffs",
    "opt_clean",
    ("dfflegalize -cell $_DFF_?_ 01 -cell $_DFF_?P?_ r -cell $_SDFF_?P?_ r "
     "-cell $_DFFE_??_ 01 -cell $_DFFE_?P??_ r -cell $_SDFFE_?P??_ r -minsrst 100 -mince 5"),
    "synth_ecp5 -top top -run map_ffs:map_luts",
    "splitnets",
    "synth_ecp5 -top top -run map_luts:",
)
"""Yosys commands from Verilog to cells.

A slice shares its enable and its reset: a few registers with an enable of their own, or a reset of
fewer than 100, become logic, or they would be torn from their neighbours. What assertions print is
nothing that hardware has; Yosys would keep the logic in front of it. Names of ports that are gone
once the design is flat go with them: every pass walks through them, for a fifth of the time. Nets
are split into bits before they are mapped: ABC9's result may name one bit like another net, and
Yosys then stops (https://github.com/YosysHQ/yosys/issues/4349).
"""

ALGORITHMS = ("--placer", "static", "--router", "router1")
"""Flags of nextpnr for every design. For the core, with its floorplan, the static placer needs less
wire than the default one, and router2 leaves a few nets of many readers with long detours, which
router1 does not."""

THREADS = ("--threads", str(os.cpu_count() or 1))
"""Of nextpnr, for which more than there are processors is slow; results do not depend on it."""


@dataclass(frozen=True)
class Tool:
    """A program: how it is called, and what identifies it."""

    command: tuple[str, ...]
    identity: str


def find_tool(name: str, *, package: str | None = None) -> Tool:
    """Return the native tool or the YoWASP one, whichever is newer; the native one if both are.

    Parameters
    ----------
    name : str
        Of the native program; YoWASP's is called ``yowasp-`` and that.
    package : str, optional
        YoWASP's package, when it is not called like the program: that of another program, with
        which this one comes, so that it is taken from where that one is.

    Raises
    ------
    ToolMissingError
        If there is none.
    """
    native, shipped = _native(name), _shipped(name, package)
    if native is None:
        if shipped is None:
            raise ToolMissingError(f"Synthesis needs {name}, and there is none on PATH: install "
                                   "it, or 'pip install moeaccel[fpga]'")
        return shipped
    if shipped is None:
        return native
    if package is None:
        take_native = is_as_new(native.identity, shipped.identity)
    else:
        main = package.removeprefix("yowasp-")
        take_native = find_tool(main) == _native(main)
    return native if take_native else shipped


def _native(name: str) -> Tool | None:
    path = shutil.which(name)
    if path is None:
        return None
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    line = (version.stdout + version.stderr).strip().splitlines()[0]
    return Tool((path,), line.replace(path, name).replace(f'"{name}" -- ', ""))


def _shipped(name: str, package: str | None) -> Tool | None:
    other = f"yowasp-{name}"
    if not importlib.metadata.entry_points(group="console_scripts", name=other):
        return None
    return Tool((sys.executable, "-m", yowasp.__name__, other),
                f"{other} {importlib.metadata.version(package or other)}")


def run_tool(tool: Tool, arguments: Sequence[str], folder: Path, log: str) -> None:
    """Run a tool in the folder of its inputs (YoWASP's see nothing else).

    Parameters
    ----------
    tool : Tool
    arguments : sequence of str
    folder : pathlib.Path
    log : str
        File there for what the tool prints, unless the arguments have it write that itself
        (``-l``): YoWASP's Yosys prints nothing more once ABC has failed.

    Raises
    ------
    ToolFailedError
        With the end of the log.
    """
    path = folder / log
    path.unlink(missing_ok=True)  # that of a run before would speak of other things
    result = subprocess.run([*tool.command, *arguments], cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, check=False)
    if not path.exists():
        path.write_text(result.stdout, encoding="utf-8")
    if result.returncode != 0:
        lines = path.read_text(encoding="utf-8").splitlines()[-20:]
        name = Path(tool.command[-1]).name
        what = f"{name} failed with exit status {result.returncode}; see {path}"
        raise ToolFailedError("\n".join([what, *lines]))


def run_yosys(yosys: Tool, folder: Path) -> None:
    """Run ``synth.ys`` in its folder, with ``yosys.log``.

    Raises
    ------
    ToolFailedError
        With the end of its log.
    """
    run_tool(yosys, ["-q", "-l", "yosys.log", "-s", "synth.ys"], folder, "yosys.log")


@dataclass(frozen=True, kw_only=True)
class Routed:
    """One placement and its routes.

    Parameters
    ----------
    seed : int
        Of the placement.
    fmax_mhz : float
        Routed clock rate.
    critical_path : list of str
        Start and end of the slowest path.
    seconds : float
        Time that it took.
    """

    seed: int
    fmax_mhz: float
    critical_path: list[str]
    seconds: float


class Build:
    """A design in a folder of its own, named by a digest of everything that goes in.

    It is synthesised once, and placed and routed once for each seed.

    Parameters
    ----------
    name : str
        For the folder's name.
    verilog : str
        Text with the module ``top``.
    script : str
        Yosys commands between reading ``top.v`` and `SYNTHESIS`.
    sites : mapping of str to str
        Sites of cells: see :func:`~moeaccel.fpga.netlist.place`.
    route : sequence of str
        Flags of nextpnr, beside `ALGORITHMS`.
    constraints : str, optional
        Text of ``top.lpf``.
    folder : pathlib.Path
        Folder of all builds.

    Raises
    ------
    ToolMissingError
        If there is no Yosys or no nextpnr-ecp5.
    """

    def __init__(self, *, name: str, verilog: str, script: str = "",
                 sites: Mapping[str, str] | None = None, route: Sequence[str],
                 constraints: str | None = None, folder: Path) -> None:
        self._yosys, self._nextpnr = find_tool("yosys"), find_tool("nextpnr-ecp5")
        self._inputs: Mapping[str, str] = {
            "top.v": verilog,
            "synth.ys": "\n".join([
                "read_verilog -sv -noassert top.v", script, *SYNTHESIS, "write_json top.json",
                ""]),
            **({"top.lpf": constraints} if constraints is not None else {}),
        }
        files = ("--lpf", "top.lpf") if constraints is not None else ()
        self._sites = sites or {}
        self._route = (*ALGORITHMS, *route, *files)
        self.tools = f"{self._yosys.identity}, {self._nextpnr.identity}"
        self.digest = hashlib.sha256("\0".join(
            [*self._inputs.values(), json.dumps(self._sites), inspect.getsource(netlist),
             *self._route, self.tools]
        ).encode()).hexdigest()[:16]
        self.home = folder / f"{name}-{self.digest}"

    def synthesise(self) -> float:
        """Map the design onto cells, unless it was done before; return how long it took.

        Raises
        ------
        ToolFailedError
        """
        done = self.home / "synthesised.json"
        if not done.exists():
            self.home.mkdir(parents=True, exist_ok=True)
            for name, text in self._inputs.items():
                (self.home / name).write_text(text, encoding="utf-8")
            begin = time.monotonic()
            run_yosys(self._yosys, self.home)
            path = self.home / "top.json"
            mapped = json.loads(path.read_text(encoding="utf-8"))
            netlist.absorb_output_registers(mapped)
            netlist.place(mapped, self._sites)
            path.write_text(json.dumps(mapped), encoding="utf-8")
            cells = {name: Counter(cell["type"] for cell in module["cells"].values())
                     for name, module in mapped["modules"].items()}
            self._write(done, {"seconds": round(time.monotonic() - begin, 1), "cells": cells})
        return json.loads(done.read_text(encoding="utf-8"))["seconds"]

    def route(self, seed: int) -> Routed:
        """Place and route what was synthesised, unless it was done before.

        Raises
        ------
        ToolFailedError
        """
        done = self.home / f"routed-{seed}.json"
        if not done.exists():
            begin = time.monotonic()
            log = f"nextpnr-{seed}.log"
            run_tool(self._nextpnr, [
                "--json", "top.json", "--report", f"report-{seed}.json",
                "--textcfg", f"top-{seed}.config", "--seed", str(seed), *THREADS, "-q",
                "-l", log, *self._route], self.home, log)
            report = json.loads((self.home / f"report-{seed}.json").read_text(encoding="utf-8"))
            self._write(done, asdict(Routed(
                seed=seed, **_timing(report), seconds=round(time.monotonic() - begin, 1))))
        return Routed(**json.loads(done.read_text(encoding="utf-8")))

    def cells(self, module: str) -> dict[str, int]:
        """Return the cells of a module, without those below it, by the columns of `CELLS`."""
        done = json.loads((self.home / "synthesised.json").read_text(encoding="utf-8"))
        found = done["cells"][module]
        return {column: sum(found.get(cell, 0) for cell in cells)
                for column, cells in CELLS.items()}

    def utilisation(self, seed: int) -> dict[str, tuple[int, int]]:
        """Return what is used of what the device has, by nextpnr's names."""
        report = json.loads((self.home / f"report-{seed}.json").read_text(encoding="utf-8"))
        return {name: (count["used"], count["available"])
                for name, count in report["utilization"].items()}

    @staticmethod
    def _write(path: Path, values: dict) -> None:
        """Write a file that is there only when all that it stands for is."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def _timing(report: dict) -> dict:
    """Return clock rate and slowest path from nextpnr's report of a design with one clock."""
    ((clock, rate),) = report["fmax"].items()
    for path in report["critical_paths"]:
        if clock in path["from"] and clock in path["to"]:
            ends = [path["path"][0]["from"]["cell"], path["path"][-1]["to"]["cell"]]
            break
    else:
        ends = []
    return {"fmax_mhz": round(rate["achieved"], 1), "critical_path": ends}
