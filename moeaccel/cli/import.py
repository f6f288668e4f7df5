"""``moeaccel import``: the experts of a checkpoint, quantised once, in a file."""

from pathlib import Path
from typing import Annotated

import typer

from moeaccel.cli.output import print_json


def command(
    checkpoint: Annotated[Path, typer.Argument(
        help="Folder with safetensors files, one such file, or a GGUF file.")],
    output: Annotated[Path, typer.Option(help="File to write.")],
    weight_format: Annotated[str, typer.Option(help="Weight format of the device.")] = "int4_g32",
    quantiser: Annotated[str, typer.Option(
        help="For what the format cannot hold as it is: search (scales of little squared error) "
             "or amax.")] = "search",
    config: Annotated[str, typer.Option(
        help="Preset whose arrays the images are for; devices of others can load the file, but "
             "encode it again each time.")] = "small",
    exact: Annotated[bool, typer.Option(
        "--exact", help="Refuse what the format cannot hold as it is.")] = False,
    layer: Annotated[list[int] | None, typer.Option(
        help="Layer, as the checkpoint counts; may be given several times. All when left out.")
    ] = None,
    drop_biases: Annotated[bool, typer.Option(
        "--drop-biases", help="Leave out biases, for a device that has none.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bring the experts of a checkpoint into a weight format of the device, and write them down.

    Integers and scales are taken over exactly where the format can hold them; what it cannot hold
    is quantised, counted and measured. Pickles are not read. The file holds images as device memory
    does, and is mapped when it is loaded:

    with open_quantised(FILE) as file: experts = device.load_quantised(file.layers[0])
    """
    import sys
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from moeaccel.host.importers import import_checkpoint, open_checkpoint

    begin = time.monotonic()
    shown = not as_json and sys.stderr.isatty()
    with open_checkpoint(checkpoint) as opened, Progress(
            TextColumn("layer {task.fields[layer]}"), BarColumn(),
            TextColumn("{task.completed}/{task.total} experts"), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("import", layer="", total=None)

        def say(index: int, done: int, count: int) -> None:
            progress.update(task, layer=index, completed=done, total=count)

        fits = import_checkpoint(
            opened, output, weight_format, config=config, layers=layer or None, exact=exact,
            quantiser=quantiser, drop_biases=drop_biases, progress=say)
        layers = [(opened.layers[index], fit) for index, fit in fits.items()]
    seconds = time.monotonic() - begin
    weights = sum(3 * found.num_experts * found.d_model * found.d_expert for found, _ in layers)
    if as_json:
        print_json({
            "output": str(output), "weight_format": weight_format, "config": config,
            "seconds": seconds,
            "weights": weights, "bytes": output.stat().st_size, "layers": [{
                "layer": found.index, "stored_as": found.families, "experts": found.num_experts,
                "d_model": found.d_model, "d_expert": found.d_expert, "groups": fit.groups,
                "requantised": fit.requantised, "coarsened": fit.coarsened,
                "relative_error": fit.relative_error} for found, fit in layers]})
        return
    table = Table("layer", "experts", "stored as", "quantised again", "scales coarsened", "error")
    for found, fit in layers:
        table.add_row(
            str(found.index), f"{found.num_experts} of {found.d_model} x {found.d_expert}",
            ", ".join(found.families), f"{fit.requantised / fit.groups:.1%}",
            f"{fit.coarsened / fit.groups:.2%}", f"{fit.relative_error:.2%}")
    console = Console()
    console.print(table)
    console.print(f"{weights:,} weights in {weight_format} for {config}, "
                  f"{output.stat().st_size:,} bytes in {output}, {seconds:.1f} s")
