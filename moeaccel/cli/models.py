"""``moeaccel models``: the zoo, and ``moeaccel models verify``: the zoo on the device."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moeaccel.cli.output import Status, print_json

if TYPE_CHECKING:
    from moeaccel.host.zoo.support import Support
    from moeaccel.host.zoo.verify import Verdict
    from moeaccel.zoo import Model

Json = Annotated[bool, typer.Option("--json", help="Print a JSON list.")]


class _ListByDefault(TyperGroup):
    """``moeaccel models MATCH`` is ``moeaccel models list MATCH``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] != "--help" and args[0] not in self.commands):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_ListByDefault, help=(
    "List published MoE models, and verify them on the device. `moeaccel models [MATCH]` is "
    "`moeaccel models list [MATCH]`."))


@app.command("list")
def list_models(
    match: Annotated[str, typer.Argument(
        help="Only models with this in a name of theirs; an error if there is none.")] = "",
    as_json: Json = False,
) -> None:
    """List published MoE models: sizes, routers, experts, and whether the device runs them."""
    from moeaccel.host.zoo.support import Supports
    from moeaccel.zoo import matching

    found = matching(match)
    with Supports() as supports:
        rows = [(m, supports(m)) for m in found]
    if as_json:
        print_json([_row(m, support) for m, support in rows])
    else:
        _print_models(rows)


def _row(m: "Model", support: "Support") -> dict[str, Any]:
    """Return a model for JSON."""
    row = m.as_dict()
    row["router_settings"], row["expert_settings"] = row.pop("router"), row.pop("expert")
    return row | {"router": m.router.text, "experts": m.expert.text, "runs": support.runs,
                  "missing": support.reason}


def _print_models(rows: "list[tuple[Model, Support]]") -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("model", no_wrap=True), Column("width x h", no_wrap=True),
        Column("E/k", no_wrap=True), Column("router", no_wrap=True),
        Column("experts", min_width=9), Column("runs", no_wrap=True),
        box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    missing: dict[str, list[str]] = {}
    for m, support in rows:
        widths = "\n".join(f"{d_in}x{d_expert}" for d_in, d_expert in m.expert_widths) or "?"
        table.add_row(m.key, widths, f"{m.n_experts or '?'}/{m.top_k or '?'}", m.router.text,
                      m.expert.text.replace("_", " "), support.runs)
        for reason in filter(None, (support.experts, support.router)):
            missing.setdefault(reason, []).append(m.key)
    console = Console(highlight=False)
    console.print(table)
    for m, _ in rows:
        if m.aliases:
            console.print(f"{m.key} is also {', '.join(m.aliases)}.")
    console.print(
        "width x h: input and hidden width of a routed expert; E/k: experts, and chosen of them; "
        "router: flavour, groups kept, scale (docs/models.md); runs: yes, where the device "
        "routes and computes the experts; experts, where the host routes.")
    for reason, keys in missing.items():
        console.print(f"{', '.join(keys) if len(keys) < len(rows) else 'all'}: {reason}",
                      markup=False)


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models, all when left out.", metavar="[NAME...]")
    ] = None,
    survey: Annotated[bool, typer.Option("--survey", help=(
        "Only the 25 models of the survey, and one expert of each at its true size, too: minutes."
        ))] = False,
    config: Annotated[
        str, typer.Option(help="Preset for reduced sizes; it gets a router.")] = "small",
    seed: Annotated[int, typer.Option(min=0, help="Of weights and x.")] = 0,
    as_json: Json = False,
) -> None:
    """Run routers and experts of models in float, on the golden model and on the RTL.

    Exit status 1 if one is not whole on the device, or anything differs.
    """
    from moeaccel.host import open_device
    from moeaccel.host.zoo.support import equipped
    from moeaccel.host.zoo.verify import MEMORY_BYTES, verify as run
    from moeaccel.zoo import model, models, of_survey

    chosen = [model(name) for name in names] if names else list(models().values())
    if survey:
        chosen = of_survey(chosen)
    verdicts = []
    with Status(as_json, lines=True) as status:
        status("building the RTL")
        chip = equipped(config)
        with (open_device("golden", config=chip, memory_bytes=MEMORY_BYTES) as golden,
              open_device("rtl", config=chip, memory_bytes=MEMORY_BYTES) as rtl):
            for m in chosen:
                status(f"{len(verdicts) + 1} of {len(chosen)}: {m.key}")
                verdicts.append(run(m, golden, rtl, seed=seed))
                _say_what_is_wrong(status, verdicts[-1])
        if survey:
            from moeaccel.host.zoo.true_size import TrueSizes

            with TrueSizes(seed=seed) as sizes:
                for i, m in enumerate(chosen):
                    status(f"true size, {i + 1} of {len(chosen)}: {m.key}")
                    verdicts[i] = sizes.added(verdicts[i], m)
                    _say_what_is_wrong(status, verdicts[i])
    if as_json:
        print_json([verdict.as_dict() for verdict in verdicts])
    else:
        _print_verdicts(verdicts)
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)


def _say_what_is_wrong(status: Status, verdict: "Verdict") -> None:
    """At once, and not with the table at the end."""
    if not verdict.ok:
        status(f"{verdict.name} is not as it should be: {verdict.reason}")


def _print_verdicts(verdicts: "list[Verdict]") -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("model", no_wrap=True), Column("router", no_wrap=True),
        Column("experts", min_width=9), Column("other choices", justify="right"),
        Column("error", justify="right", no_wrap=True), Column("ok", no_wrap=True),
        box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for v in verdicts:
        table.add_row(v.name, v.router, v.expert.replace("_", " "),
                      _text(v.selection_differences, "d"), _text(v.relative_error, ".1e"),
                      "yes" if v.ok else "NO")
    console = Console(highlight=False)
    console.print(table)
    for v in verdicts:
        if v.reason:
            console.print(f"{v.name}: {v.reason}", markup=False)
    console.print(f"{sum(v.ok for v in verdicts)} of {len(verdicts)} are as they should be")


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
