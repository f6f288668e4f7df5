"""``moeaccel verilog``: the accelerator for a larger system."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[str, typer.Option(help="Preset of the accelerator.")] = "small",
    output: Annotated[Path, typer.Option(help="Verilog file; the JSON goes beside it.")] = Path(
        "moeaccel.v"
    ),
    family: Annotated[str, typer.Option(help="Multipliers: generic or ecp5.")] = "generic",
) -> None:
    """Write the accelerator's Verilog, and its register map and configuration as JSON."""
    import json

    from moeaccel.config import preset
    from moeaccel.hdl.top import description, generate_verilog

    chosen = preset(config)
    output.write_text(generate_verilog(chosen, family=family))
    beside = output.with_suffix(".json")
    beside.write_text(json.dumps(description(chosen), indent=2) + "\n")
    typer.echo(f"wrote {output} and {beside}")
