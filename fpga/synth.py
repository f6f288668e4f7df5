"""Synthesise, place and route single blocks for the ECP5-85F, and report area and clock rate.

``python -m moeaccel.fpga.synth --block dot_array --config ulx3s``

A block's ports are folded onto a few pins (:mod:`moeaccel.fpga.fold`), Yosys maps it, nextpnr
places and routes it. Cells are those of the block, without the fold; the clock rate is routed, from
nextpnr's JSON report.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from amaranth.lib import wiring
from rich.console import Console
from rich.table import Table

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.errors import ToolFailedError
from moeaccel.fpga.boards import BitstreamBoard, board
from moeaccel.fpga.boards.ulx3s import IO_CYCLES
from moeaccel.fpga.flow import Build
from moeaccel.fpga.fold import Fold
from moeaccel.hdl.boards.serial_link import SerialLink
from moeaccel.hdl.memory.axi_arbiter import AxiArbiter
from moeaccel.hdl.memory.memory_port import ID_BITS
from moeaccel.hdl.memory.sdram import SdramTiming
from moeaccel.hdl.memory.sdram_controller import SdramController
from moeaccel.hdl.router.route_unit import RouteUnit
from moeaccel.hdl.verilog.verilog_target import generate
from moeaccel.hdl.weights.expert_buffer import ExpertBuffer

__all__ = ["BLOCKS", "FOLDER", "Report", "block_build", "synthesise"]

TARGET_MHZ = 100
"""What nextpnr aims at; it stops improving a path that reaches it."""

BOARD = board("ulx3s", BitstreamBoard)
"""Of which the device is."""

ROUTE = (*BOARD.route, "--freq", str(TARGET_MHZ), "--lpf-allow-unconstrained",
         "--timing-allow-fail")

Block = Callable[[AcceleratorConfig], wiring.Component]

FOLDER = Path("build/synth")
"""Of all builds of blocks."""

REPORTS = Path(__file__).resolve().parent / "reports"

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
                           id_width=ID_BITS + 1, io_cycles=IO_CYCLES)


def _route_unit(config: AcceleratorConfig) -> wiring.Component:
    """Return the configuration's router, or the one that a small board may have."""
    return RouteUnit(config if config.router else config.replace(
        router=("softmax", "sigmoid"), router_top_k=8), "ecp5")


def _expert_buffer(config: AcceleratorConfig) -> wiring.Component:
    """Return the configuration's, or one of two slots of 16 KiB."""
    return ExpertBuffer(config if config.buffer_slots else config.replace(
        buffer_slots=2, buffer_beats=(1 << 14) // config.port_bytes))


def _serial_link(config: AcceleratorConfig) -> wiring.Component:
    """Return the ULX3S's, whatever the configuration."""
    return SerialLink(baud_divisor=40, id_width=ID_BITS)


BLOCKS: dict[str, Block] = {
    "dot_array": _block("array.dot_array", "DotArray", "ecp5", tag_width=16),
    "tile_buffer": _block("weights.tile_buffer", "TileBuffer"),
    "weight_streamer": _block("weights.weight_streamer", "WeightStreamer"),
    "expert_buffer": _expert_buffer,
    "sequencer": _block("dispatch.sequencer", "Sequencer"),
    "dispatcher": _block("dispatch.dispatcher", "Dispatcher"),
    "activation_loader": _block("activations.activation_loader", "ActivationLoader"),
    "lane_buffer": _block("activations.lane_buffer", "LaneBuffer", 2),
    "result_serialiser": _block("array.result_serialiser", "ResultSerialiser"),
    "activation_unit": _block("activations.activation_unit", "ActivationUnit", "ecp5"),
    "hidden_buffer": _block("activations.hidden_buffer", "HiddenBuffer"),
    "row_sums": _block("combine.row_sums", "RowSums", "ecp5"),
    "combiner": _block("combine.combiner", "Combiner"),
    "memory_port": _block("memory.memory_port", "MemoryPort", readers=5, writers=2),
    "command_processor": _block("control.command_processor", "CommandProcessor"),
    "register_file": _block("control.register_file", "RegisterFile"),
    "counters": _block("control.counters", "Counters"),
    "axi_arbiter": _axi_arbiter,
    "sdram_controller": _sdram_controller,
    "serial_link": _serial_link,
    "route_unit": _route_unit,
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


def block_build(name: str, config: AcceleratorConfig, *, folder: Path = FOLDER) -> Build:
    """Return what synthesises, places and routes one block, alone, as the module ``top.block``.

    Parameters
    ----------
    name : str
        Key of :data:`BLOCKS`.
    config : AcceleratorConfig
    folder : pathlib.Path
        Where results are kept, one folder each.

    Raises
    ------
    ToolMissingError
        If there is no Yosys or no nextpnr-ecp5.
    """
    if name not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, not {name!r}")
    return Build(name=f"{name}-{config.name}",
                 verilog=generate(Fold(BLOCKS[name](config), BOARD.family), "top"),
                 script="setattr -mod -set keep_hierarchy 1 \\top.block",
                 sites=BOARD.sites(config) if name == CORE else None, route=ROUTE, folder=folder)


def synthesise(name: str, config: AcceleratorConfig, *, seed: int = 1,
               folder: Path = FOLDER) -> Report:
    """Synthesise one block, or take the result from an earlier run.

    Parameters
    ----------
    name, config, folder
        As for :func:`block_build`.
    seed : int
        Of the placement.

    Raises
    ------
    ToolMissingError
        If there is no Yosys or no nextpnr-ecp5.
    ToolFailedError
        If one of them fails.
    """
    build = block_build(name, config, folder=folder)
    seconds = build.synthesise()
    routed = build.route(seed)
    return Report(
        block=name, config=config.name, seed=seed, **build.cells("top.block"),
        fmax_mhz=routed.fmax_mhz, critical_path=routed.critical_path, tools=build.tools,
        digest=build.digest, seconds=round(seconds + routed.seconds, 1))


def _table(reports: list[Report]) -> Table:
    table = Table(title=f"LFE5U-85F speed 6, {reports[0].tools}", title_style="")
    columns = ("block", "config", "MULT18", "LUT4", "carry", "BRAM", "LUTRAM", "FF", "MHz")
    for column in columns:
        table.add_column(column, justify="left" if column in ("block", "config") else "right")
    for r in reports:
        table.add_row(r.block, r.config, str(r.multipliers), f"{r.lut4:,}", f"{r.carry:,}",
                      str(r.block_rams), str(r.lut_rams), f"{r.flip_flops:,}", f"{r.fmax_mhz:.1f}")
    return table


def _save(report: Report, folder: Path = REPORTS) -> None:
    """Keep a report, and write the table of all that are kept."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(asdict(report), indent=1) + "\n"
    (folder / f"{report.block}-{report.config}.json").write_text(text, encoding="utf-8")
    kept = [Report(**json.loads(path.read_text(encoding="utf-8")))
            for path in sorted(folder.glob("*.json"))]
    lines = [
        "# Blocks on an LFE5U-85F, speed 6", "",
        "Written by `make synth` (the core) and `make synth-blocks`, `--save` of `fpga/synth.py`.",
        "Cells are those of the block alone; the clock is routed.", "",
        "| block | config | MULT18 | LUT4 | carry | BRAM | LUTRAM | FF | MHz | seed | tools |",
        "|---|---|" + "--:|" * 8 + "---|",
        *(f"| {r.block} | {r.config} | {r.multipliers} | {r.lut4} | {r.carry} | {r.block_rams} "
          f"| {r.lut_rams} | {r.flip_flops} | {r.fmax_mhz:.1f} | {r.seed} | {r.tools} |"
          for r in kept),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


app = typer.Typer(add_completion=False)


@app.command()
def main(
    block: Annotated[list[str] | None, typer.Option(
        help=f"Block to synthesise, repeatable: {', '.join(BLOCKS)}.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every block.")] = False,
    core: Annotated[bool, typer.Option("--core", help="The whole accelerator.")] = False,
    config: Annotated[str, typer.Option(help="Name of a configuration.")] = "ulx3s",
    seed: Annotated[int, typer.Option(help="Seed of the placement.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where results are kept.")] = FOLDER,
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
    reports, failed = [], False
    for name in names:
        try:
            with console.status(f"{name}: minutes, unless it was done before"):
                reports.append(synthesise(name, preset(config), seed=seed, folder=folder))
        except ToolFailedError as error:  # the others can be built all the same
            console.print(f"{name}: {error}", markup=False, style="red")
            failed = True
            continue
        if save:
            _save(reports[-1])
    if as_json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    elif reports:
        Console().print(_table(reports))
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    app()
