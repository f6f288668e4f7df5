"""What commands print and write, whatever they are connected to."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from moeaccel.errors import MoeAccelError, OutputError, instead_of_os_error

__all__ = ["Status", "any_encoding", "print_json", "shutting_output", "writing"]


def print_json(value: Any) -> None:
    """Print a value as one line of JSON; what JSON has no number for (NaN, infinity) is null."""
    typer.echo(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def any_encoding() -> None:
    """Let output have a ``?`` for what its encoding lacks, in the place of an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


@contextlib.contextmanager
def shutting_output() -> Iterator[None]:
    """Send out what was printed before the block is left, while errors still find a reader."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if isinstance(error, MoeAccelError | BrokenPipeError):
            raise
        with contextlib.suppress(OSError, AttributeError):  # else it is tried again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"files and output must be accessible, but the system says {error}"
                          ) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the path that could not be written.

    Raises
    ------
    OutputError
        In the place of :class:`OSError`.
    """
    with instead_of_os_error(lambda error: OutputError(
            f"output must go to a place that can be written, not {str(path)!r}: "
            f"{error.strerror or error}")):
        yield


class Status:
    """What is being done, on standard error; nothing with ``--json``, or without a terminal.

    Parameters
    ----------
    as_json : :class:`bool`
    lines : :class:`bool`
        Without a terminal each text is a line, with the seconds since the first: of what takes so
        long that it is left alone, and looked at in a file.
    """

    def __init__(self, as_json: bool, *, lines: bool = False) -> None:
        from rich.console import Console

        shown = not as_json and sys.stderr.isatty()
        self._status = Console(stderr=True).status("") if shown else None
        self._lines = lines and not as_json and not shown
        self._begin = time.monotonic()

    def __enter__(self) -> Status:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def stop(self) -> None:
        """Say nothing more: something else is written now."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __call__(self, text: str) -> None:
        """Say it."""
        if self._status is not None:
            self._status.update(text)
        elif self._lines:
            typer.echo(f"{time.monotonic() - self._begin:7.1f} s  {text}", err=True)
