"""Boards: a file for each, which has it as its ``BOARD``; nothing else needs to know of one."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

from moeaccel.errors import UnknownBoardError
from moeaccel.fpga.boards.base import BitstreamBoard, Board, Design, ProjectBoard

__all__ = ["BOARDS", "BitstreamBoard", "Board", "Design", "ProjectBoard", "board"]

_Kind = TypeVar("_Kind", bound=Board)


def _registry() -> dict[str, Board]:
    found = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        made = getattr(importlib.import_module(f"{__name__}.{module.name}"), "BOARD", None)
        if made is not None:
            found[made.name] = made
    return found


BOARDS = _registry()
"""Every board by name."""


def board(name: str, kind: type[_Kind] = Board) -> _Kind:
    """Return the board of that name, of a kind.

    Raises
    ------
    UnknownBoardError
        If there is none, or it is of another kind.
    """
    found = BOARDS.get(name)
    if isinstance(found, kind):
        return found
    known = ", ".join(other.name for other in BOARDS.values() if isinstance(other, kind))
    step = f"; for that one there is '{found.command} --board {name}'" if found else ""
    raise UnknownBoardError(f"board must be one of {known}, not {name!r}{step}")
