"""Registers, structures in device memory and codes: what a driver's author looks up."""

from __future__ import annotations

from moeaccel.docs.markdown import enumeration, members, table
from moeaccel.interface.commands import (
    COMPLETION,
    EXPERT,
    LAYER,
    ROUTER,
    SUBMISSION,
    Field,
    NonFinite,
    Opcode,
    Operand,
    Overflow,
    Selection,
    Sink,
    Status,
)
from moeaccel.interface.registers import REGISTERS, Access

__all__ = [
    "codes", "completion", "expert_table", "registers", "router_descriptor", "submission"]


def _bits(offset: int, bits: int) -> str:
    return str(offset) if bits == 1 else f"{offset + bits - 1}:{offset}"


def _meaning(field: Field) -> str:
    limits = "; ".join(filter(None, (limit.text() for limit in field.limits)))
    return " ".join(filter(None, (
        field.text, f"Allowed: {limits}." if limits else "",
        "Signed." if field.signed else "")))


def _structure(name: str, fields: tuple[Field, ...]) -> list[str]:
    rows = [(str(field.word), _bits(field.offset % 32, field.bits), f"`{field.name}`",
             _meaning(field)) for field in fields]
    return [f"### {name}", "", *table(("word", "bits", "field", "meaning"), rows)]


def registers() -> list[str]:
    """Return the register map, and the fields of each register that has some."""
    access = members(Access)
    lines = [*(f"* `{kind.value}`: {access[kind.name]}" for kind in Access), ""]
    lines += table(("offset", "register", "access", "reset", "meaning"), [
        (f"`0x{r.address:03x}`", f"`{r.name}`", r.access.value,
         "of the build" if r.name == "CONFIG_HASH" else f"`0x{r.reset:x}`", r.text)
        for r in REGISTERS.values()])
    for register in REGISTERS.values():
        if register.fields:
            lines += [f"### {register.name}", "", *table(("bits", "field", "meaning"), [
                (_bits(f.offset, f.bits), f"`{f.name}`", f.text) for f in register.fields])]
    return lines


def submission() -> list[str]:
    """Return what a host writes for a command: submission and layer descriptor."""
    return _structure("Submission", SUBMISSION) + _structure("Layer descriptor", LAYER)


def completion() -> list[str]:
    """Return what the device writes when a command has ended."""
    return _structure("Completion", COMPLETION)


def codes() -> list[str]:
    """Return opcodes and completion codes."""
    return [line for kind in (Opcode, Status, NonFinite, Overflow)
            for line in enumeration(kind)]


def expert_table() -> list[str]:
    """Return an entry of the expert table, and the codes in it."""
    return [*_structure("Expert table entry", EXPERT), *enumeration(Operand), *enumeration(Sink)]


def router_descriptor() -> list[str]:
    """Return a router descriptor, and the codes in it that the settings do not have."""
    return [*_structure("Router descriptor", ROUTER), *enumeration(Selection)]
