"""What the accelerator takes of an UltraScale+ device, block by block, and whether it fits a board.

``python -m moeaccel.fpga.xilinx --config hbm32 --save``

Yosys maps the whole accelerator (``synth_xilinx -family xcup``) with the named blocks kept apart.
Equal parts, such as the cores of the channels, are mapped once and counted as often as they are
there. PCIe, HBM controller and SmartConnects, which Vivado adds, are not in it, and nothing is
placed or routed: for that there is only Vivado. Large memories are UltraRAM here, as Yosys chooses
them, and lane buffers in any case; whether Vivado chooses the same is not known.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.fpga.boards import Board, ProjectBoard, board as find_board
from moeaccel.fpga.flow import find_tool, run_yosys
from moeaccel.hdl.top import generate_verilog

__all__ = ["RESOURCES", "Usage", "map_blocks"]

RESOURCES = ("lut", "flip_flop", "dsp", "block_ram", "ultra_ram")
"""What is counted; block RAMs of 36 kbit."""

REPORTS = Path(__file__).resolve().parent / "reports"

KEPT = ("engine", "combiner", "dispatcher", "hidden", "loader", "sequencer", "commands", "counters",
        "port", "registers", "route", "moeaccel_port", "moeaccel_core", "activation", "array",
        "x_lanes", "h_lanes", "serialiser", "streamer", "sums", "tiles")
"""Last parts of the names of modules that stay modules."""

_WEIGHTS: dict[str, dict[str, float]] = {
    "lut": {
        **{f"LUT{n}": 1 for n in range(1, 7)}, "INV": 1, "SRL16E": 1, "SRLC32E": 1,
        "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4, "RAM256X1D": 8, "RAM32M": 4, "RAM64M": 4,
        "RAM32M16": 8, "RAM64M8": 8, "RAM512X1S": 8,
    },
    "flip_flop": dict.fromkeys(("FDRE", "FDSE", "FDCE", "FDPE"), 1),
    "dsp": {"DSP48E2": 1},
    "block_ram": {"RAMB36E2": 1, "RAMB18E2": 0.5},
    "ultra_ram": {"URAM288": 1},
}
_FLAGS = "-family xcup -top top -flatten -noiopad -noclkbuf -uram"

_MAP_LUTS = (
    "opt_expr -mux_undef -noclkinv", "abc -luts 2:2,3,6:5,10,20", "clean",
    "xilinx_srl -fixed -minlen 3",
    "techmap -map +/xilinx/lut_map.v -map +/xilinx/cells_map.v -D LUT_WIDTH=6", "xilinx_dffopt",
    "opt_lut_ins -tech xilinx", "clean",
)
"""The last steps of synth_xilinx with abc for abc9, on which Yosys 0.70 fails (an assertion) where
modules with DSP48E2 are kept."""

_STYLES = {"buffer.beats.mem": "ultra", "capacity.pairs.mem": "block", "lane*.mem": "ultra"}
"""What memories are made of. Of the first two Yosys 0.70 would make LUT RAM: they are deep, and one
port reads and writes. It takes RAM512X1S to have 16 bits of address (lutrams_xcu.txt), and fails.
Lane buffers of h would be block RAM, of which there is less than of UltraRAM."""

_FREE = ("CARRY4", "CARRY8", "MUXF7", "MUXF8", "MUXF9", "$scopeinfo")
"""Cells beside LUTs that take none of what is counted."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one block takes, those below it included.

    Parameters
    ----------
    block : str
    times : int
        How often it is there.
    resources : dict of str to float
        Of each of them, by the names of :data:`RESOURCES`.
    """

    block: str
    times: int
    resources: dict[str, float]


def _is_kept(module: str) -> bool:
    return module.rpartition(".")[2].partition("$")[0] in KEPT


def _count(modules: dict[str, dict[str, int]]) -> list[Usage]:
    """Return the usage of every module from its cells by type, the top first."""
    totals: dict[str, dict[str, float]] = {}

    def total(name: str) -> dict[str, float]:
        if name not in totals:
            sums = dict.fromkeys(RESOURCES, 0.0)
            for cell, count in modules[name].items():
                if cell in modules:
                    for resource, amount in total(cell).items():
                        sums[resource] += count * amount
                    continue
                if cell not in _FREE and not any(cell in w for w in _WEIGHTS.values()):
                    raise ValueError(f"cell must be one that this table knows, not {cell}")
                for resource, weights in _WEIGHTS.items():
                    sums[resource] += count * weights.get(cell, 0)
            totals[name] = sums
        return totals[name]

    times = dict.fromkeys(modules, 0)

    def visit(name: str, often: int) -> None:
        times[name] += often
        for cell, count in modules[name].items():
            if cell in modules:
                visit(cell, often * count)

    visit("top", 1)
    return [Usage(block=name, times=times[name], resources=total(name))
            for name in sorted(modules, key=lambda n: (n != "top", n)) if times[name]]


def map_blocks(config: AcceleratorConfig, *,
               folder: Path = Path("build/synth")) -> tuple[list[Usage], str]:
    """Map the accelerator, or take the result of an earlier run; return usages and the tool.

    Raises
    ------
    ToolMissingError
        If there is no Yosys.
    ToolFailedError
        If it fails.
    """
    yosys = find_tool("yosys")
    text = generate_verilog(config, family="xilinx")
    modules = re.findall(r"^module \\?(\S+?) ?\(", text, re.MULTILINE)
    script = "\n".join([
        "read_verilog -sv -noassert top.v", "proc", "delete */t:$print",
        *(f"setattr -mod -set keep_hierarchy 1 \\{name}" for name in modules if _is_kept(name)),
        f"synth_xilinx {_FLAGS} -run begin:map_memory",
        *(f'setattr -set ram_style "{style}" */c:{memory}' for memory, style in _STYLES.items()),
        f"synth_xilinx {_FLAGS} -run map_memory:map_luts",
        *_MAP_LUTS,
        "tee -q -o stat.json stat -json", ""])
    digest = hashlib.sha256("\0".join([text, script, yosys.identity]).encode()).hexdigest()[:16]
    home = folder / f"xilinx-{config.name}-{digest}"
    done = home / "cells.json"
    if not done.exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "top.v").write_text(text, encoding="utf-8")
        (home / "synth.ys").write_text(script, encoding="utf-8")
        run_yosys(yosys, home)
        statistics = json.loads((home / "stat.json").read_text(encoding="utf-8"))
        cells = {name.lstrip("\\"): {cell.lstrip("\\"): count for cell, count in
                                     module["num_cells_by_type"].items()}
                 for name, module in statistics["modules"].items()}
        part = done.with_suffix(".part")
        part.write_text(json.dumps(cells, indent=1), encoding="utf-8")
        part.replace(done)
    return _count(json.loads(done.read_text(encoding="utf-8"))), yosys.identity


def _shown(module: str) -> str:
    """Return what a module is called in tables."""
    if module == "top":
        return "accelerator"
    for long, short in (("moeaccel_core", "core"), ("moeaccel_port", "port of a channel")):
        module = module.replace(long, short)
    return module.removeprefix("top.accelerator.").partition("$")[0]


def _rows(board: Board, usages: list[Usage]) -> list[list[str]]:
    rows = [[_shown(u.block), str(u.times), *(f"{u.resources[r]:,.10g}" for r in RESOURCES)]
            for u in usages]
    top, there = usages[0].resources, board.resources
    rows.append([board.title, "", *(f"{there[r]:,}" for r in RESOURCES)])
    rows.append(["share taken", "", *(f"{100 * top[r] / there[r]:.1f} %" for r in RESOURCES)])
    return rows


_COLUMNS = ("block", "times", "LUT", "FF", "DSP", "RAMB36", "URAM")


def _page(board: Board, config: AcceleratorConfig, usages: list[Usage], tool: str) -> str:
    """Return the committed report."""
    fits = "fits" if all(
        usages[0].resources[r] <= board.resources[r] for r in RESOURCES) else "does not fit"
    return "\n".join([
        f"# {config.name} on UltraScale+", "",
        f"Written by `python -m moeaccel.fpga.xilinx --config {config.name} --save` with {tool}.",
        "One of each block, blocks below it included; mapped, not placed. Without PCIe, HBM and",
        f"SmartConnects. By these counts it {fits} the {board.title}.", "",
        "| " + " | ".join(_COLUMNS) + " |", "|---" + "|--:" * (len(_COLUMNS) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in _rows(board, usages)), ""])


app = typer.Typer(add_completion=False)


@app.command()
def main(
    board: Annotated[str, typer.Option(help="Name of the board; a wrong one lists them.")] = "u55c",
    config: Annotated[
        str | None, typer.Option(help="Name of a configuration; the board's when left out.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("build/synth"),
    save: Annotated[bool, typer.Option("--save", help="Also write fpga/reports/.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Map the accelerator onto UltraScale+ cells; print what each block takes of a board."""
    found = find_board(board, ProjectBoard)
    chosen = preset(config or found.config)
    with Console(stderr=True).status(f"{chosen.name}: minutes, unless it was done before"):
        usages, tool = map_blocks(chosen, folder=folder)
    if save:
        REPORTS.mkdir(exist_ok=True)
        (REPORTS / f"{board}-{chosen.name}.md").write_text(
            _page(found, chosen, usages, tool), encoding="utf-8")
    if as_json:
        print(json.dumps({"tool": tool, board: found.resources, "blocks": [
            {"block": u.block, "times": u.times} | u.resources for u in usages]}, indent=1))
        return
    table = Table(title=f"{chosen.name}, UltraScale+, {tool}", title_style="")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "block" else "right", no_wrap=True)
    for row in _rows(found, usages):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    app()
