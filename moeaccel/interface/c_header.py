"""The interface as a C header: registers, structures in device memory, codes, configuration.

For drivers in other languages; everything comes from :mod:`moeaccel.interface.registers` and
:mod:`moeaccel.interface.commands`.
"""

from __future__ import annotations

import dataclasses
import enum

from moeaccel.activations import ACTIVATIONS
from moeaccel.config import AcceleratorConfig
from moeaccel.formats import ALL_FORMATS
from moeaccel.interface.commands import (
    ENTRY_BYTES,
    MOE_ALIGNMENT,
    STRUCTURES,
    ElementType,
    Field,
    NonFinite,
    Opcode,
    Operand,
    Overflow,
    Selection,
    Sink,
    Status,
)
from moeaccel.interface.registers import REGISTERS, VERSION_VALUE
from moeaccel.router.choices import CapacityOrder, Gates, GroupScore, Renormalize, Score

__all__ = ["c_header"]

_ENUMS: tuple[type[enum.IntEnum], ...] = (
    Opcode, Status, NonFinite, Overflow, ElementType, Operand, Sink, Selection, Score, Renormalize,
    GroupScore, CapacityOrder, Gates)
_CODES = {"format": ALL_FORMATS, "activation": ACTIVATIONS}


def _define(name: str, value: int | str, text: str = "") -> str:
    comment = f"  /* {text} */" if text else ""
    return f"#define MOEACCEL_{name} {value}{comment}"


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _identifier(name: str) -> str:
    """Return a name as part of a C identifier: ``INT4_G32_2_4`` for ``int4_g32+2:4``."""
    return "".join(c if c.isalnum() else "_" for c in name).upper()


def _registers() -> list[str]:
    lines = ["/* Registers: byte offsets, reset values, fields. 32 bits each, little-endian. */"]
    for register in REGISTERS.values():
        access = register.access.value
        lines.append(_define(f"REG_{register.name}", f"0x{register.address:03x}u",
                             f"{access}: {register.text}"))
        if register.reset:
            lines.append(_define(f"REG_{register.name}_RESET", f"0x{register.reset:08x}u"))
        for field in register.fields:
            name = f"{register.name}_{field.name.upper()}"
            mask = ((1 << field.bits) - 1) << field.offset
            lines.append(_define(f"{name}_SHIFT", field.offset, field.text))
            lines.append(_define(f"{name}_MASK", f"0x{mask:08x}u"))
    return lines


def _enums() -> list[str]:
    lines = []
    for kind in _ENUMS:
        name = _snake(kind.__name__)
        lines.append(f"enum moeaccel_{name} {{")
        lines += [f"    MOEACCEL_{name.upper()}_{member.name} = {member.value}," for member in kind]
        lines += ["};", ""]
    for name, registry in _CODES.items():
        lines.append(f"enum moeaccel_{name} {{")
        lines += [f"    MOEACCEL_{name.upper()}_{_identifier(one.name)} = {one.code},"
                  for one in registry.values()]
        lines += ["};", ""]
    return lines[:-1]


def _structure(name: str, fields: tuple[Field, ...]) -> list[str]:
    """Return a C structure; fields narrower than a byte have one, and a mask for it."""
    lines, checks, masks, end, gaps = [f"struct moeaccel_{name} {{"], [], [], 0, 0
    for field in sorted(fields, key=lambda f: f.offset):
        size = max(8, 1 << (field.bits - 1).bit_length())
        assert field.offset % size == 0
        if field.offset > end:
            lines.append(f"    uint8_t reserved{gaps}[{(field.offset - end) // 8}];")
            gaps += 1
        kind = f"{'' if field.signed else 'u'}int{size}_t"
        lines.append(f"    {kind} {field.name};  /* {field.text} */")
        checks.append(f"MOEACCEL_CHECK(offsetof(struct moeaccel_{name}, {field.name}) == "
                      f"{field.offset // 8});")
        if field.bits < size:
            masks.append(_define(f"{name.upper()}_{field.name.upper()}_MASK",
                                 f"0x{(1 << field.bits) - 1:x}u"))
        end = field.offset + size
    if end < 8 * ENTRY_BYTES:
        lines.append(f"    uint8_t reserved{gaps}[{ENTRY_BYTES - end // 8}];")
    checks.append(f"MOEACCEL_CHECK(sizeof(struct moeaccel_{name}) == {ENTRY_BYTES});")
    return [*masks, *lines, "};", *checks]


def c_header(config: AcceleratorConfig) -> str:
    """Return the header of a configuration, for C11 and C++11 on little-endian machines."""
    fields = dataclasses.asdict(config)
    name = fields.pop("name")
    sections = [
        [f"/* moeaccel, configuration {name}: made by 'moeaccel verilog', not by hand. */",
         "#ifndef MOEACCEL_H", "#define MOEACCEL_H", "", "#include <stddef.h>",
         "#include <stdint.h>", "", "#ifdef __cplusplus",
         '#define MOEACCEL_CHECK(what) static_assert(what, "layout of moeaccel.h")', "#else",
         '#define MOEACCEL_CHECK(what) _Static_assert(what, "layout of moeaccel.h")', "#endif"],
        [_define("INTERFACE_VERSION", f"0x{VERSION_VALUE:08x}u", "of the VERSION register"),
         _define("CONFIG_DIGEST", f"0x{config.digest:08x}u", "of the CONFIG_HASH register"),
         *(_define(f"CONFIG_{field.upper()}",
                   value if isinstance(value, int) else f'"{",".join(value)}"')
           for field, value in fields.items())],
        _registers(),
        _enums(),
        ["/* Structures in device memory, little-endian, aligned to their size. */",
         _define("ENTRY_BYTES", ENTRY_BYTES),
         _define("MOE_ALIGNMENT", MOE_ALIGNMENT, "of the three descriptors of a MOE")],
        *(_structure(name.replace(" ", "_"), fields) for name, fields in STRUCTURES.items()),
        ["#endif"],
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"
