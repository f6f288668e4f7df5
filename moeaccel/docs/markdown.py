"""Markdown from tables."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["ROOT", "enumeration", "members", "table"]

ROOT = Path(__file__).parents[2]
"""The checkout: pages are made from its sources."""


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table, and an empty one."""
    return ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def members(kind: type[enum.Enum]) -> dict[str, str]:
    """Return the text below each member of an enumeration, by the member's name."""
    found = re.findall(r"^    ([A-Z]\w*) = .*(?:\n    \"\"\"((?:.|\n)*?)\"\"\")?",
                       inspect.getsource(kind), re.MULTILINE)
    # Formulas are no links: f[i](x) would be one.
    return {name: " ".join(text.split()).replace("](", "]\\(") for name, text in found}


def enumeration(kind: type[enum.IntEnum]) -> list[str]:
    """Return a heading and a table of an enumeration's members."""
    texts = members(kind)
    rows = [(str(member.value), f"`{member.name}`", texts[member.name]) for member in kind]
    return [f"### {kind.__name__}", "", *table(("value", "name", "meaning"), rows)]
