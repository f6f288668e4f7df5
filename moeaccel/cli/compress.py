"""``moeaccel compress``: passes over the experts of the demo model, and what they cost it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeaccel.cli.output import Status, print_json

if TYPE_CHECKING:
    from moeaccel.host.demo.compression import Compressed


def command(
    method: Annotated[
        list[str] | None, typer.Option(help="Pass, repeatable; all when left out. --list names "
                                            "them.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, repeatable, for the passes that have it: "
                                            "share=0.5, pattern=1:4, bits=5.")] = None,
    weight_format: Annotated[
        str, typer.Option(help="Of experts for which a pass chooses none.")] = "int4_g32",
    prompts: Annotated[int, typer.Option(min=1, help="Of each task, to be answered.")] = 64,
    calibration_texts: Annotated[
        int, typer.Option(min=1, help="That passes look at.")] = 64,
    config: Annotated[str, typer.Option(help="Preset whose cycles are stated.")] = "small",
    seed: Annotated[int, typer.Option(min=0, help="Of texts, prompts and searches.")] = 0,
    list_methods: Annotated[
        bool, typer.Option("--list", help="List the passes and their options.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compress the experts of the demo model, pass by pass, and mark it on its tasks.

    Each pass gives layers that the device runs; bytes and decode cycles are those of the device,
    answers are computed in torch with the device's integers, scales and block floats.
    """
    from moeaccel.formats import weight_format as find_format
    from moeaccel.host.compress.method import method as find_method, methods

    known = methods()
    if list_methods:
        _list(as_json)
        return
    find_format(weight_format)
    chosen = [find_method(name) for name in method] if method else list(known.values())
    given = [_option(text) for text in option or ()]
    runs = [(m.name, {name: _as(m.options[name], name, text) for name, text in given
                      if name in m.options}) for m in chosen]
    for name, _ in given:
        if not any(name in m.options for m in chosen):
            _refuse(f"option must be one of a chosen pass, not {name!r}; --list names them")
    for each, (_, options) in zip(chosen, runs, strict=True):
        each.check(options)
    from moeaccel.config import preset
    from moeaccel.host.demo.compression import compress_demo

    preset(config)

    with Status(as_json) as status:
        rows = compress_demo(runs, weight_format=weight_format, prompts_per_task=prompts,
                             calibration_texts=calibration_texts, config=config, seed=seed,
                             progress=status)
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    _print(rows, prompts)


def _refuse(message: str) -> None:
    from moeaccel.host.errors import InvalidOption

    raise InvalidOption(message)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        _refuse(f"option must be NAME=VALUE, as share=0.5, not {text!r}")
    return name, value


def _as(default: Any, name: str, text: str) -> Any:
    """Return a value of the kind of a default."""
    try:
        return type(default)(text)
    except ValueError:
        _refuse(f"{name} must be a value such as {default!r}, not {text!r}")


def _list(as_json: bool) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    from moeaccel.host.compress.method import methods

    known = methods().values()
    if as_json:
        print_json([{"method": m.name, "source": m.source, "text": m.text, "options": m.options}
                    for m in known])
        return
    table = Table(Column("pass", no_wrap=True), "what it does", "options", box=SIMPLE,
                  padding=(0, 1, 0, 0))
    for m in known:
        table.add_row(m.name, m.text, ", ".join(f"{k}={v}" for k, v in m.options.items()) or "-")
    console = Console()
    console.print(table)
    for m in known:
        if m.source:
            console.print(f"{m.name}: {m.source}", highlight=False)


def _print(rows: "list[Compressed]", prompts: int) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    numbers = ("experts", "kB", "cycles", "a token", "error", "right")
    table = Table(Column("pass", no_wrap=True),
                  *(Column(name, justify="right") for name in numbers), box=SIMPLE,
                  padding=(0, 1, 0, 0))
    for row in rows:
        r = row.report
        table.add_row(row.method, str(r.experts), f"{r.stored_bytes / 1e3:.1f}",
                      f"{r.decode_cycles:,.0f}", f"{r.experts_per_token:.2f}",
                      f"{r.device_error:.1%}", f"{row.mean_accuracy:.1%}")
    console = Console()
    console.print(table)
    console.print(f"experts of all layers; cycles of all for a token; a token: experts of a layer; "
                  f"error of outputs on the calibration's tokens, with weights as the device has "
                  f"them ({rows[0].weight_format}); right: of {prompts} prompts of each task",
                  highlight=False)
