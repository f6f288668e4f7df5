"""Boards, from the registry of moeaccel.fpga.boards."""

from __future__ import annotations

from moeaccel.docs.markdown import table

__all__ = ["boards"]


def boards() -> list[str]:
    """Return every board that is known."""
    from moeaccel.fpga.boards import BOARDS, board  # a page is of the whole tree

    return table(("board", "FPGA", "configuration", "clock", "file"), [
        (f"`{name}`", board(name).part, f"`{board(name).config}`",
         f"{board(name).clock_hz / 1e6:g} MHz", f"[{name}.py](../fpga/boards/{name}.py)")
        for name in BOARDS])
