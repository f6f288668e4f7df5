"""``moeaccel bench call``: what a call costs beside the device's work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moeaccel.cli.output import Status, print_json

if TYPE_CHECKING:
    from moeaccel.host.call_bench import CallCost


def call(
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a call, repeatable [1, 16, 256].")
    ] = None,
    d_model: Annotated[int, typer.Option(min=1, help="Elements of x and y.")] = 2048,
    top_k: Annotated[int, typer.Option(min=1, max=16, help="Experts of a token.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="x and y: bfloat16, float16 or float32 of torch, or numpy.")
    ] = "bfloat16",
    config: Annotated[
        str, typer.Option(help="Preset, whose limits cut calls into commands.")] = "hbm32",
    in_flight: Annotated[
        int, typer.Option(min=1, max=8, help="Calls submitted before the oldest is awaited.")] = 1,
    polling: Annotated[
        bool, typer.Option("--polling", help="Ask for completions instead of waiting for the "
                                             "interrupt.")] = False,
    calls: Annotated[int, typer.Option(min=2, help="How many are measured.")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Print verbs, bytes and microseconds of a call, by part, on a device that answers at once."""
    from moeaccel.host.call_bench import bench_call

    costs = []
    with Status(as_json) as status:
        for count in tokens or [1, 16, 256]:
            status(f"calls of {count} tokens")
            costs.append(bench_call(
                tokens=count, d_model=d_model, top_k=top_k, dtype=dtype, config=config,
                in_flight=in_flight, polling=polling, calls=calls))
    if as_json:
        print_json([cost.as_dict() for cost in costs])
    else:
        _print(costs)


def _print(costs: list[CallCost]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from moeaccel.host.call_bench import PARTS

    table = Table("", *(f"{cost.tokens:,} tokens" for cost in costs), box=SIMPLE,
                  padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, values: list[float | None], form: str = "{:.1f}") -> None:
        table.add_row(name, *("-" if value is None else form.format(value) for value in values))

    verbs = sorted({verb for cost in costs for verb in cost.verbs})
    for verb in verbs:
        row(verb, [cost.verbs.get(verb, 0.0) for cost in costs], "{:.2f}")
    row("bytes written", [cost.bytes_written for cost in costs], "{:,.0f}")
    row("bytes read", [cost.bytes_read for cost in costs], "{:,.0f}")
    row("driver, us", [cost.microseconds for cost in costs])
    row("driver, fastest tenth, us", [cost.fastest_microseconds for cost in costs])
    row("verbs of the stand-in, us", [cost.verb_microseconds for cost in costs])
    for part in PARTS:
        if any(part in cost.parts for cost in costs):
            row(f"  {part}, us", [cost.parts.get(part) for cost in costs])
    Console().print(table)
