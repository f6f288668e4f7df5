"""Synthesise, place and route single blocks for the ECP5-85F, and report area and clock rate.

``python -m moeaccel.fpga.synth --block dot_array --config ulx3s``

A block's ports are folded onto a few pins (:mod:`moeaccel.fpga.fold`), Yosys maps it, nextpnr
places and routes it. Cells are those of the block, without the fold; the clock rate is routed, from
nextpnr's JSON report. Native tools are used when they are on PATH, else the YoWASP ones of this
environment. Results are kept under a digest of all that went in.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from amaranth.back import verilog
from amaranth.lib import wiring
from rich.console import Console
from rich.table import Table

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.errors import ToolMissingError
from moeaccel.fpga.fold import Fold
from moeaccel.hdl.axi_arbiter import AxiArbiter
from moeaccel.hdl.memory_port import ID_BITS
from moeaccel.hdl.sdram_controller import SdramController, SdramTiming
from moeaccel.hdl.serial_link import SerialLink
from moeaccel.hdl.verilog_target import RAM_VERILOG, VerilogTarget

__all__ = ["BLOCKS", "Report", "synthesise"]

DEVICE_FLAGS = ("--85k", "--package", "CABGA381", "--speed", "6")
TARGET_MHZ = 120
"""What nextpnr aims at; it stops improving a path that reaches it."""

Block = Callable[[AcceleratorConfig], wiring.Component]

REPORTS = Path(__file__).resolve().parent / "reports"

CELLS = {
    "multipliers": ("MULT18X18D",),
    "lut4": ("LUT4",),
    "carry": ("CCU2C",),
    "block_rams": ("DP16KD",),
    "lut_rams": ("TRELLIS_DPR16X4",),
    "flip_flops": ("TRELLIS_FF",),
}
"""Columns of the table: cells as Yosys names them."""


CORE = "core"
"""Name of the entry that is the whole accelerator."""


def _block(module: str, name: str, *arguments: Any, **options: Any) -> Block:
    """Return what makes a component of ``moeaccel.hdl``, imported when it is needed."""
    def make(config: AcceleratorConfig) -> wiring.Component:
        component = getattr(importlib.import_module(f"moeaccel.hdl.{module}"), name)
        return component(config, *arguments, **options)
    return make


def _axi_arbiter(config: AcceleratorConfig) -> wiring.Component:
    """Return what joins the accelerator's memory port with one more master."""
    return AxiArbiter(addr_width=config.address_bits, data_width=8 * config.port_bytes,
                      id_width=ID_BITS, masters=2)


def _sdram_controller(config: AcceleratorConfig) -> wiring.Component:
    """Return the ULX3S's, whatever the configuration, as it is behind an arbiter."""
    return SdramController(timing=SdramTiming.ulx3s(clock_hz=TARGET_MHZ * 1_000_000),
                           id_width=ID_BITS + 1, io_cycles=2)


def _serial_link(config: AcceleratorConfig) -> wiring.Component:
    """Return the ULX3S's, whatever the configuration."""
    return SerialLink(baud_divisor=40, id_width=ID_BITS)


BLOCKS: dict[str, Block] = {
    "dot_array": _block("dot_array", "DotArray", "ecp5", tag_width=16),
    "tile_buffer": _block("tile_buffer", "TileBuffer"),
    "weight_streamer": _block("weight_streamer", "WeightStreamer"),
    "sequencer": _block("sequencer", "Sequencer"),
    "dispatcher": _block("dispatcher", "Dispatcher"),
    "activation_loader": _block("activation_loader", "ActivationLoader"),
    "result_serialiser": _block("result_serialiser", "ResultSerialiser"),
    "activation_unit": _block("activation_unit", "ActivationUnit", "ecp5"),
    "hidden_buffer": _block("hidden_buffer", "HiddenBuffer"),
    "combiner": _block("combiner", "Combiner", "ecp5"),
    "memory_port": _block("memory_port", "MemoryPort", readers=5, writers=2),
    "command_processor": _block("command_processor", "CommandProcessor"),
    "register_file": _block("register_file", "RegisterFile"),
    "axi_arbiter": _axi_arbiter,
    "sdram_controller": _sdram_controller,
    "serial_link": _serial_link,
    CORE: _block("top", "Accelerator", "ecp5"),
}
"""Blocks by name, with how to make one."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Area and clock rate of one block.

    Parameters
    ----------
    block, config : str
    seed : int
        Of the placement.
    multipliers, lut4, carry, block_rams, lut_rams, flip_flops : int
        Cells of the block (carry: CCU2C, two bits each).
    fmax_mhz : float
        Routed.
    critical_path : list of str
        Start and end of the slowest path.
    tools : str
        Names and versions of Yosys and nextpnr.
    digest : str
        Names everything that went in.
    seconds : float
        Time that the tools took.
    """

    block: str
    config: str
    seed: int
    multipliers: int
    lut4: int
    carry: int
    block_rams: int
    lut_rams: int
    flip_flops: int
    fmax_mhz: float
    critical_path: list[str]
    tools: str
    digest: str
    seconds: float


@dataclass(frozen=True)
class _Tool:
    """A program, and what identifies it."""

    path: str
    identity: str


def _tool(name: str) -> _Tool:
    """Return the native tool, or the YoWASP one."""
    path = shutil.which(name)
    if path is not None:
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        line = (version.stdout + version.stderr).strip().splitlines()[0]
        return _Tool(path, line.replace(path, name).replace(f'"{name}" -- ', ""))
    package = f"yowasp-{name}"
    path = shutil.which(package, path=str(Path(sys.executable).parent)) or shutil.which(package)
    if path is None:
        raise ToolMissingError(f"Synthesis needs {name}, and there is none on PATH: install it, or "
                               "'pip install moeaccel[fpga]'")
    return _Tool(path, f"{package} {importlib.metadata.version(package)}")


def _run(command: list[str], folder: Path, log: str) -> None:
    """Run a tool in the folder of its inputs (YoWASP's see nothing else)."""
    with (folder / log).open("w", encoding="utf-8") as output:
        result = subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT,
                                check=False)
    if result.returncode != 0:
        lines = (folder / log).read_text(encoding="utf-8").splitlines()[-20:]
        what = (f"{Path(command[0]).name} failed with exit status {result.returncode}; "
                f"see {folder / log}")
        raise RuntimeError("\n".join([what, *lines]))


def synthesise(name: str, config: AcceleratorConfig, *, seed: int = 1,
               folder: Path = Path("build/synth")) -> Report:
    """Synthesise one block, or take the result from an earlier run.

    Parameters
    ----------
    name : str
        Key of :data:`BLOCKS`.
    config : AcceleratorConfig
    seed : int
        Of the placement.
    folder : pathlib.Path
        Where results are kept, one folder each.

    Raises
    ------
    ToolMissingError
        If there is no Yosys or no nextpnr-ecp5.
    RuntimeError
        If one of them fails.
    """
    if name not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, not {name!r}")
    yosys, nextpnr = _tool("yosys"), _tool("nextpnr-ecp5")
    text = verilog.convert(Fold(BLOCKS[name](config)), name="top", platform=VerilogTarget(),
                           emit_src=False) + RAM_VERILOG
    script = "\n".join([
        "read_verilog -sv -noassert top.v",
        "setattr -mod -set keep_hierarchy 1 \\top.block",
        "synth_ecp5 -top top -json top.json",
        "tee -q -o stat.json stat -json",
        "",
    ])
    route = ["--json", "top.json", "--report", "report.json", "--freq", str(TARGET_MHZ), "--seed",
             str(seed), "--router", "router2", "--lpf-allow-unconstrained", "--timing-allow-fail",
             *DEVICE_FLAGS]
    digest = hashlib.sha256("\0".join(
        [text, script, *route, yosys.identity, nextpnr.identity]).encode()).hexdigest()[:16]
    home = folder / f"{name}-{config.name}-{digest}"
    done = home / "result.json"
    if not done.exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "top.v").write_text(text, encoding="utf-8")
        (home / "synth.ys").write_text(script, encoding="utf-8")
        begin = time.monotonic()
        _run([yosys.path, "-q", "-s", "synth.ys"], home, "yosys.log")
        _run([nextpnr.path, *route], home, "nextpnr.log")
        report = Report(
            block=name, config=config.name, seed=seed, **_cells(home), **_timing(home),
            tools=f"{yosys.identity}, {nextpnr.identity}", digest=digest,
            seconds=round(time.monotonic() - begin, 1))
        part = done.with_suffix(".part")
        part.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        part.replace(done)
    return Report(**json.loads(done.read_text(encoding="utf-8")))


def _cells(home: Path) -> dict[str, int]:
    """Return the cells of the block, without the fold, from Yosys' statistics."""
    statistics = json.loads((home / "stat.json").read_text(encoding="utf-8"))
    found = statistics["modules"]["\\top.block"]["num_cells_by_type"]
    return {column: sum(found.get(cell, 0) for cell in cells) for column, cells in CELLS.items()}


def _timing(home: Path) -> dict:
    """Return clock rate and slowest path from nextpnr's report."""
    report = json.loads((home / "report.json").read_text(encoding="utf-8"))
    ((clock, rate),) = report["fmax"].items()
    for path in report["critical_paths"]:
        if clock in path["from"] and clock in path["to"]:
            ends = [path["path"][0]["from"]["cell"], path["path"][-1]["to"]["cell"]]
            break
    else:
        ends = []
    return {"fmax_mhz": round(rate["achieved"], 1), "critical_path": ends}


def _table(reports: list[Report]) -> Table:
    table = Table(title=f"LFE5U-85F speed 6, {reports[0].tools}", title_style="")
    columns = ("block", "config", "MULT18", "LUT4", "carry", "BRAM", "LUTRAM", "FF", "MHz")
    for column in columns:
        table.add_column(column, justify="left" if column in ("block", "config") else "right")
    for r in reports:
        table.add_row(r.block, r.config, str(r.multipliers), f"{r.lut4:,}", f"{r.carry:,}",
                      str(r.block_rams), str(r.lut_rams), f"{r.flip_flops:,}", f"{r.fmax_mhz:.1f}")
    return table


app = typer.Typer(add_completion=False)


@app.command()
def main(
    block: Annotated[list[str] | None, typer.Option(
        help=f"Block to synthesise, repeatable: {', '.join(BLOCKS)}.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every block.")] = False,
    core: Annotated[bool, typer.Option("--core", help="The whole accelerator.")] = False,
    config: Annotated[str, typer.Option(help="Name of a configuration.")] = "ulx3s",
    seed: Annotated[int, typer.Option(help="Seed of the placement.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("build/synth"),
    save: Annotated[bool, typer.Option("--save", help="Also write fpga/reports/.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Synthesise, place and route blocks; print area and routed clock rate."""
    names = list(block or ())
    if everything or not (names or core):
        names = [name for name in BLOCKS if name != CORE]
    if core:
        names.append(CORE)
    unknown = [name for name in names if name not in BLOCKS]
    if unknown:
        raise typer.BadParameter(f"must be one of {', '.join(BLOCKS)}, not {unknown[0]!r}")
    console = Console(stderr=True)
    reports = []
    for name in names:
        with console.status(f"{name}: minutes, unless it was done before"):
            reports.append(synthesise(name, preset(config), seed=seed, folder=folder))
        if save:
            REPORTS.mkdir(exist_ok=True)
            text = json.dumps(asdict(reports[-1]), indent=1) + "\n"
            (REPORTS / f"{name}-{config}.json").write_text(text, encoding="utf-8")
    if as_json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    else:
        Console().print(_table(reports))


if __name__ == "__main__":
    app()
