"""The command line ``moeaccel``.

Each command is a module of this package named like the command and holding one function,
``command``, whose docstring is the help text, or ``app``, a typer application of sub-commands;
`COMMANDS` lists them in the order of ``--help``. Modules import only light things at the top: what
a command needs (torch, Amaranth, the driver, the simulator) is imported inside the function, so
that ``--help`` stays quick and works without them.

A `MoeAccelError` ends a command with its message on standard error and exit status 2. So does
what the system refuses (`OSError`): any other exception is a bug, and keeps its traceback.
"""

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moeaccel import __version__
from moeaccel.cli.output import any_encoding, shutting_output
from moeaccel.errors import MoeAccelError

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (
    "run", "import", "compress", "bench", "soak", "models", "trace", "policies", "verilog",
    "bitstream", "board", "doctor")


class _Group(TyperGroup):
    """Report expected errors as messages; everything else is a bug and keeps its traceback."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        any_encoding()  # first: help is printed before a command is invoked
        return super().main(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with shutting_output():
                return super().invoke(ctx)
        except MoeAccelError as error:
            typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="moeaccel",
    cls=_Group,
    help="An open near-data accelerator for Mixture-of-Experts inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a plain traceback can be pasted into a bug report
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"moeaccel {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


for _name in COMMANDS:
    _module = import_module(f"moeaccel.cli.{_name}")
    if hasattr(_module, "app"):
        app.add_typer(_module.app, name=_name)
    else:
        app.command(_name)(_module.command)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    app()
