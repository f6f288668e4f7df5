"""What commands print for programs."""

import json
import math
from typing import Any

import typer

__all__ = ["print_json"]


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Print a value as JSON that every reader takes: what is not finite is null."""
    typer.echo(json.dumps(_finite(value), indent=indent, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
