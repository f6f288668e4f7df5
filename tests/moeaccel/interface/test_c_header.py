"""The C header, compiled: offsets, masks and layouts are those of the tables."""

import enum
import random
import shutil
import subprocess

import pytest

from moeaccel.config import PRESETS
from moeaccel.formats import FORMATS
from moeaccel.interface.c_header import c_header
from moeaccel.interface.commands import (
    ENTRY_BYTES,
    STRUCTURES,
    ElementType,
    Opcode,
    Sink,
    Status,
    encode,
)
from moeaccel.interface.registers import REGISTERS
from moeaccel.router.descriptor import descriptor
from moeaccel.router.settings import RouterSettings

COMPILER = shutil.which("gcc") or shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

MAIN = """
#include <stdio.h>
#include "moeaccel.h"
int main(void) {
%s
    return 0;
}
"""


def run(folder, body):
    """Compile statements behind the header, strictly, and return what they print."""
    (folder / "moeaccel.h").write_text(c_header(PRESETS["tiny"]))
    (folder / "main.c").write_text(MAIN % body)
    subprocess.run([COMPILER, "-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "main.c",
                    "-o", "main"], cwd=folder, check=True)
    return subprocess.run([folder / "main"], capture_output=True, check=True).stdout


def draw(source, fields):
    """Return a random value for each field, extremes included."""
    values = {}
    for field in fields:
        low = -(1 << field.bits - 1) if field.signed else 0
        high = low + (1 << field.bits) - 1
        values[field.name] = source.choice([low, high, source.randint(low, high)])
    return values


def kind(field):
    """Return the C type of a field."""
    return f"{'' if field.signed else 'u'}int{max(8, field.bits)}_t"


def test_structures_have_the_drivers_bytes(tmp_path):
    source = random.Random(1)
    lines, expected = [], b""
    for name, fields in ((name.replace(" ", "_"), fields) for name, fields in STRUCTURES.items()):
        for i in range(10):
            values = draw(source, fields)
            variable = f"{name}{i}"
            lines.append(f"    struct moeaccel_{name} {variable} = {{0}};")
            lines += [f"    {variable}.{field.name} = ({kind(field)}){values[field.name] % 2**64}u;"
                      for field in fields]
            lines.append(f"    fwrite(&{variable}, {ENTRY_BYTES}, 1, stdout);")
            expected += encode(fields, values)
    assert run(tmp_path, "\n".join(lines)) == expected


def test_constants(tmp_path):
    tiny = PRESETS["tiny"]
    expected = {"MOEACCEL_CONFIG_DIGEST": tiny.digest, "MOEACCEL_CONFIG_MAX_DIM": tiny.max_dim,
                "MOEACCEL_OPCODE_EXPERTS": Opcode.EXPERTS,
                "MOEACCEL_STATUS_WATCHDOG": Status.WATCHDOG,
                "MOEACCEL_SINK_COMBINE": Sink.COMBINE, "MOEACCEL_ACTIVATION_RELU": 1,
                "sizeof(MOEACCEL_CONFIG_FORMATS)": len(",".join(tiny.formats)) + 1,
                "MOEACCEL_FORMAT_MXFP4": FORMATS["mxfp4"].code,
                "MOEACCEL_ELEMENT_TYPE_BFLOAT16": ElementType.BFLOAT16}
    router = descriptor(RouterSettings(experts=8, top_k=2), biased=False, tables=False,
                        table_address=0)
    for field, code in router.items():
        if isinstance(code, enum.IntEnum):
            expected |= {f"MOEACCEL_{field.upper()}_{one.name}": one for one in type(code)}
    for register in REGISTERS.values():
        expected[f"MOEACCEL_REG_{register.name}"] = register.address
        if register.reset:
            expected[f"MOEACCEL_REG_{register.name}_RESET"] = register.reset
        for field in register.fields:
            name = f"MOEACCEL_{register.name}_{field.name.upper()}"
            expected[f"{name}_SHIFT"] = field.offset
            expected[f"{name}_MASK"] = ((1 << field.bits) - 1) << field.offset
    found = run(tmp_path, "\n".join(f'    printf("%lld\\n", (long long){name});'
                                    for name in expected))
    assert [int(line) for line in found.split()] == [int(value) for value in expected.values()]


def test_the_header_is_cplusplus_too(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (tmp_path / "moeaccel.h").write_text(c_header(PRESETS["small"]))
    (tmp_path / "main.cpp").write_text('#include "moeaccel.h"\n#include "moeaccel.h"\n')
    subprocess.run([compiler, "-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic",
                    "-fsyntax-only", "main.cpp"], cwd=tmp_path, check=True)
