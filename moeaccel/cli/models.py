"""``moeaccel models``: the zoo."""

from dataclasses import asdict
from typing import Annotated

import typer

from moeaccel.cli.output import print_json


def command(
    match: Annotated[str, typer.Argument(help="Only models whose name contains this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List published MoE models: sizes, routers, and whether transformers can plug the device
    in."""
    from rich.console import Console
    from rich.table import Table

    from moeaccel.zoo import models

    found = [m for m in models().values() if match.lower() in m.name.lower()]
    if as_json:
        print_json([{"key": m.key, **asdict(m)} for m in found])
        return
    table = Table(
        "model", "layers", "d_model", "d_expert", "experts", "top-k", "router", "FFN", "dtype"
    )
    for m in found:
        table.add_row(
            m.key,
            str(m.n_moe_layers),
            str(m.d_model),
            str(m.d_expert),
            str(m.n_experts),
            str(m.top_k),
            m.router_flavour,
            f"{m.act} {m.ffn}",
            m.native_dtype,
        )
    Console().print(table)
