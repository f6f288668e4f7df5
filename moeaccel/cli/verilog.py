"""``moeaccel verilog``: the accelerator for a larger system, or for a data-centre card."""

from pathlib import Path
from typing import Annotated

import typer

from moeaccel.cli.output import writing


def command(
    config: Annotated[str, typer.Option(help="Preset of the accelerator.")] = "small",
    output: Annotated[Path, typer.Option(
        help="Verilog file, or a folder for moeaccel.v; the others go beside it.")] = Path(
            "moeaccel.v"),
    family: Annotated[str | None, typer.Option(
        help="Multipliers: generic, ecp5 or xilinx; when left out generic, or the board's.")
    ] = None,
    board: Annotated[str | None, typer.Option(
        help="Also write a Vivado project for this card; a wrong name lists them.")] = None,
    core_mhz: Annotated[float | None, typer.Option(
        help="Clock of the accelerator on the card, in MHz.")] = None,
) -> None:
    """Write the accelerator's Verilog, its register map as JSON and as a C header.

    With vendors' multipliers also their models for simulators; with a board everything that Vivado
    needs for a bitstream, which was written without Vivado and never run.
    """
    from moeaccel.config import preset
    from moeaccel.errors import ConfigurationError
    from moeaccel.hdl.array.multiplier import FAMILIES
    from moeaccel.hdl.verilog.emission import emit

    chosen = preset(config)
    card = None
    if board is not None:
        from moeaccel.fpga.boards import ProjectBoard, board as find_board

        card = find_board(board, ProjectBoard)
    family = family or (card.family if card else "generic")
    if family not in FAMILIES or (card and family != card.family):
        known = card.family if card else ", ".join(FAMILIES)
        raise ConfigurationError(f"family must be one of {known}, not {family!r}")
    if core_mhz is not None and not card:
        raise ConfigurationError(f"core_mhz must come with a board, not alone ({core_mhz:g})")
    if output.suffix != ".v":
        output = output / "moeaccel.v"
    files: dict[str, str] = {}
    if card:
        files = card.project(chosen, name=output.stem,
                             core_mhz=card.clock_hz / 1e6 if core_mhz is None else core_mhz)
    with writing(output):  # first: the rest takes a while
        output.parent.mkdir(parents=True, exist_ok=True)
    files = emit(chosen, family=family, name=output.stem) | files
    with writing(output):
        for name, text in files.items():
            (output.parent / name).write_text(text, encoding="utf-8")
    typer.echo(f"wrote {', '.join(str(output.parent / name) for name in files)}")
