"""The register page: everything a driver's author looks up, generated into a Markdown file.

``python -m moeaccel.interface.register_page docs/registers.md`` rewrites what is between the page's
markers; text around them stays.
"""

from __future__ import annotations

import enum
import inspect
import re
from pathlib import Path
from typing import Annotated

import typer

from moeaccel.activations import ACTIVATIONS
from moeaccel.errors import MoeAccelError
from moeaccel.formats import FORMATS
from moeaccel.interface.commands import (
    STRUCTURES,
    Field,
    NonFinite,
    Opcode,
    Operand,
    Sink,
    Status,
)
from moeaccel.interface.registers import REGISTERS, Access

__all__ = ["generated", "updated"]

_BEGIN = "<!-- BEGIN GENERATED python -m moeaccel.interface.register_page docs/registers.md -->"
_END = "<!-- END GENERATED -->"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def _bits(offset: int, bits: int) -> str:
    return str(offset) if bits == 1 else f"{offset + bits - 1}:{offset}"


def _members(kind: type[enum.Enum]) -> dict[str, str]:
    """Return the text below each member of an enumeration, by the member's name."""
    found = re.findall(r"^    ([A-Z]\w*) = .*(?:\n    \"\"\"((?:.|\n)*?)\"\"\")?",
                       inspect.getsource(kind), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _enumeration(kind: type[enum.IntEnum]) -> list[str]:
    texts = _members(kind)
    rows = [(str(member.value), f"`{member.name}`", texts[member.name]) for member in kind]
    return [f"### {kind.__name__}", "", *_table(("value", "name", "meaning"), rows)]


def _meaning(field: Field) -> str:
    limits = "; ".join(filter(None, (limit.text() for limit in field.limits)))
    return " ".join(filter(None, (
        field.text, f"Allowed: {limits}." if limits else "",
        "Signed." if field.signed else "")))


def _structure(name: str, fields: tuple[Field, ...]) -> list[str]:
    rows = [(str(field.word), _bits(field.offset % 32, field.bits), f"`{field.name}`",
             _meaning(field)) for field in fields]
    return [f"### {name}", "", *_table(("word", "bits", "field", "meaning"), rows)]


def generated() -> str:
    """Return the generated part of the page, markers included."""
    lines = [_BEGIN, "", "## Registers", ""]
    access = _members(Access)
    lines += [*(f"* `{kind.value}`: {access[kind.name]}" for kind in Access), ""]
    lines += _table(("offset", "register", "access", "reset", "meaning"), [
        (f"`0x{r.address:03x}`", f"`{r.name}`", r.access.value,
         "of the build" if r.name == "CONFIG_HASH" else f"`0x{r.reset:x}`", r.text)
        for r in REGISTERS.values()])
    for register in REGISTERS.values():
        if register.fields:
            lines += [f"### {register.name}", "", *_table(("bits", "field", "meaning"), [
                (_bits(f.offset, f.bits), f"`{f.name}`", f.text) for f in register.fields])]
    lines += ["## Structures in device memory", "",
              "64 bytes, little-endian, words of 32 bits; what no field names is 0.",
              "Limits with a name are the configuration's.", ""]
    for name, fields in STRUCTURES.items():
        lines += _structure(name.capitalize(), fields)
    lines += ["## Codes", ""]
    for kind in (Opcode, Status, NonFinite, Operand, Sink):
        lines += _enumeration(kind)
    lines += ["### Activations", "", *_table(("code", "name", "meaning"), [
        (str(a.code), f"`{a.name}`", a.text) for a in ACTIVATIONS.values()])]
    lines += ["### Weight formats", "", *_table(("code", "name", "bits a weight"), [
        (str(f.code), f"`{f.name}`", f"{f.bits_per_weight():g}") for f in FORMATS.values()])]
    return "\n".join([*lines, _END])


def updated(page: str) -> str:
    """Return a page with its generated part made anew.

    Raises
    ------
    MoeAccelError
        If the page has not the markers.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise MoeAccelError(f"page must hold the lines {_BEGIN!r} and {_END!r}; add them where the "
                            "tables belong")
    return before + generated() + after


app = typer.Typer(add_completion=False)


@app.command()
def main(page: Annotated[Path, typer.Argument(help="Markdown file with the markers.")]) -> None:
    """Make the tables of the register page anew."""
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    app()
