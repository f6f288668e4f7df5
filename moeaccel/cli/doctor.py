"""``moeaccel doctor``: what this machine has, and how to get what it lacks."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeaccel import __version__
from moeaccel.cli.output import print_json
from moeaccel.doctor import examine, is_healthy


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show the tools this machine has, what each is for, and how to get what is missing.

    The exit status is 1 if something required is missing.
    """
    findings = examine()
    healthy = is_healthy(findings)
    if as_json:
        report = {
            "moeaccel": __version__,
            "healthy": healthy,
            "findings": [finding.as_dict() for finding in findings],
        }
        print_json(report)
        raise typer.Exit(0 if healthy else 1)

    table = Table(title=f"moeaccel {__version__}", title_justify="left")
    table.add_column("")
    for heading in ("what", "version", "for", "found, or how to get it"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        if finding.present:
            mark = Text("ok", style="green")
        elif finding.required:
            mark = Text("missing", style="bold red")
        else:
            mark = Text("absent", style="yellow")
        table.add_row(
            mark,
            finding.name,
            finding.version,
            Text(finding.purpose),
            Text(finding.detail if finding.present else finding.remedy),
        )
    console = Console()
    console.print(table)
    if healthy:
        console.print("Everything required is here.")
    else:
        missing = ", ".join(f.name for f in findings if f.required and not f.present)
        console.print(f"Required and missing: {missing}.", style="bold red")
    raise typer.Exit(0 if healthy else 1)
