"""``moeaccel soak``: the RTL beside the golden model, with memories that are out for trouble."""

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from moeaccel.cli.output import Status, print_json
from moeaccel.config import PRESETS

if TYPE_CHECKING:
    from moeaccel.sim.soak import Report


def command(
    minutes: Annotated[float, typer.Option(min=0.01, help="How long, without the builds.")] = 10.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the first case; they count up.")] = 0,
    config: Annotated[list[str] | None, typer.Option(
        help="Preset, repeatable. [default: tiny, small]")] = None,
    channels: Annotated[list[int] | None, typer.Option(
        min=1, max=32, help="Memory channels, repeatable. [default: 1, 4]")] = None,
    case: Annotated[str | None, typer.Option(
        help="Run this case, as a line of JSON, instead of drawing.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run drawn cases on the RTL and on the golden model, and compare the bits.

    Each case has another configuration, shapes, routing and memory: one AXI channel or several are
    slow to the extreme, bursts overtake each other, commands are aborted. A case that fails is made
    as small as it goes, and printed so that it can be run again. Exit status 1 if one failed.
    """
    from moeaccel.errors import ConfigurationError
    from moeaccel.sim.cases import Case
    from moeaccel.sim.soak import Soak

    names = config or ["tiny", "small"]
    for name in names:
        if name not in PRESETS:
            raise ConfigurationError(f"config must be one of {', '.join(PRESETS)}, not {name!r}")
    # Drawn numbers are extreme on purpose: what the driver warns of is no news here.
    logging.getLogger("moeaccel.host").setLevel(logging.ERROR)
    with Status(as_json) as status:
        soak = Soak([(name, count) for count in channels or (1, 4) for name in names], seed=seed,
                    progress=status)
        found = None if case is None else soak.check(Case.from_json(case))
        report = soak.run(60 * minutes) if case is None else None
    if report is None:
        if as_json:
            print_json({"failed": found})
        else:
            typer.echo(found or "equal")
        raise typer.Exit(found is not None)
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(_text(report))
    raise typer.Exit(bool(report.failures))


def _text(report: "Report") -> str:
    lines = []
    for failure in report.failures:
        lines += [
            f"seed {failure.seed} failed after {failure.seconds} s: {failure.what}",
            f"  smallest: {failure.smallest_what}",
            f"  moeaccel soak --case '{failure.smallest}'",
        ]
    lines.append(f"{report.cases:,} cases from seed {report.first_seed} in {report.seconds} s, "
                 f"{len(report.failures)} failed"
                 f"{'; interrupted' if report.interrupted else ''}")
    return "\n".join(lines)
