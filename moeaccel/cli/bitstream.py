"""``moeaccel bitstream``: a bitstream for a board, with open tools."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moeaccel.cli.output import Status, print_json, writing
from moeaccel.errors import ClockRateError


def command(
    board: Annotated[
        str, typer.Option(help="Name of the board; a wrong one lists them.")
    ] = "ulx3s",
    config: Annotated[
        str | None, typer.Option(help="Preset of the accelerator; the board's when left out.")
    ] = None,
    clock: Annotated[
        float | None, typer.Option(help="Clock in MHz; the board's when left out.")
    ] = None,
    baud: Annotated[
        int | None, typer.Option(help="Rate of the serial line; the board's when left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the placement.", min=0)] = 1,
    seeds: Annotated[
        int, typer.Option(help="Try so many seeds, from --seed on, and take the fastest.", min=1)
    ] = 1,
    folder: Annotated[Path, typer.Option(help="Where builds are kept.")] = Path("build/bitstream"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Build a board's bitstream; print its resources, its routed clock, and how to load it.

    Synthesis and each seed's placement are kept under a digest of everything that goes in, so a
    second call takes seconds. A design that does not reach its clock gives no bitstream, and exit
    status 2.
    """
    from moeaccel.fpga.bitstream import build_bitstream

    with Status(as_json) as status, writing(folder):
        built = build_bitstream(board, config=config, clock_mhz=clock, baud=baud, seed=seed,
                                seeds=seeds, folder=folder,
                                progress=lambda text: status(f"{board}: {text}"))
    if as_json:
        print_json(built.as_dict())
    else:
        _show(built)
    if not built.reached:
        raise ClockRateError(
            f"clock must be at most the {built.fmax_mhz} MHz that was routed, not "
            f"{built.clock_mhz:g} MHz; slowest path: {' -> '.join(built.critical_path)}. Try more "
            "seeds (make bitstream SEEDS=4) or a lower clock (CLOCK=...)")


def _show(built: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("resource", "used", "available", "",
                  title=f"{built.part}, config {built.config}, {built.tools}", title_style="")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (used, available) in built.resources.items():
        table.add_row(name, f"{used:,}", f"{available:,}", f"{used / available:.0%}")
    console.print(table)
    for routed in built.tried:
        console.print(f"seed {routed.seed}: {routed.fmax_mhz} MHz routed in {routed.seconds:.0f} s",
                      highlight=False)
    console.print(f"slowest path of seed {built.seed}: {' -> '.join(built.critical_path)}",
                  highlight=False, markup=False)
    console.print(f"clock {built.clock_mhz:g} MHz, {built.baud:,} baud, digest {built.digest}, "
                  f"{built.seconds:.0f} s in all", highlight=False)
    if built.path:
        console.print(f"bitstream: {built.path}", highlight=False, soft_wrap=True)
        console.print(f"load it:   {'  or  '.join(built.program)}", highlight=False, soft_wrap=True)
        console.print(f'drive it:  open_device("{built.transport}", config="{built.config}")',
                      highlight=False, soft_wrap=True)
