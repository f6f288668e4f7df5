"""Boards, from the registry of moeaccel.fpga.boards."""

from __future__ import annotations

from moeaccel.docs.markdown import table

__all__ = ["boards"]


def boards() -> list[str]:
    """Return every board that is known."""
    from moeaccel.fpga.boards import BOARDS  # a page is made of the whole tree

    return table(
        ("board", "FPGA", "memory", "configuration", "clock", "driven by", "built by", "file"), [
            (f"{b.title} (`{b.name}`)", b.part, b.memory, f"`{b.config}`",
             f"{b.clock_hz / 1e6:g} MHz", f"`{b.transport}`", f"`{b.command} --board {b.name}`",
             f"[{b.name}.py](../fpga/boards/{b.name}.py)")
            for b in BOARDS.values()])
