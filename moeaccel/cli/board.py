"""``moeaccel board``: a simulated board at a serial port."""

from typing import Annotated

import typer

from moeaccel.cli.output import Status

_CHANCE = "Chance, for each byte on the line, that "


def command(
    config: Annotated[str, typer.Option(help="Preset of the accelerator.")] = "ulx3s",
    cycles_per_bit: Annotated[
        int, typer.Option(help="Clock cycles of a bit on the serial line, at least 4.", min=4)
    ] = 4,
    flip: Annotated[
        float, typer.Option(help=_CHANCE + "one of its bits is flipped.", min=0, max=0.99)
    ] = 0.0,
    lose: Annotated[float, typer.Option(help=_CHANCE + "it is lost.", min=0, max=0.99)] = 0.0,
    repeat: Annotated[float, typer.Option(help=_CHANCE + "it comes twice.", min=0, max=0.99)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 1,
) -> None:
    """Simulate the whole board, serial line and SDRAM included, until Ctrl-C.

    It appears as a pseudo-terminal that any program opens like the port of a real board. Time
    stands still while nobody asks anything of it.
    """
    from rich.console import Console

    from moeaccel.sim.board.board import Board, LineNoise

    console = Console()
    with Status(as_json=False) as status:
        status("building the board; the first time takes some minutes")
        board = Board(config, cycles_per_bit=cycles_per_bit,
                      noise=LineNoise(flip=flip, lose=lose, repeat=repeat, seed=seed))
    console.print(f'open_device("serial:{board.port}", config="{config}")', highlight=False)
    try:
        board.serve()
    except KeyboardInterrupt:
        state = board.state
        console.print(f"\n{state.cycles:,} cycles; {state.bytes_received:,} bytes received, "
                      f"{state.bytes_sent:,} sent; {state.flipped:,} bytes flipped, "
                      f"{state.lost:,} lost, {state.repeated:,} repeated; SDRAM violations: "
                      f"{state.violation.lower()}", highlight=False)
    finally:
        board.close()
