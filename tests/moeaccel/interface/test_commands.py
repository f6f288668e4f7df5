import pytest

from moeaccel.config import PRESETS
from moeaccel.errors import CommandError
from moeaccel.interface import commands, registers
from moeaccel.interface.commands import (
    EXPERT,
    LAYER,
    STRUCTURES,
    SUBMISSION,
    Limit,
    bad_field,
    field_of,
)

TINY = PRESETS["tiny"]


@pytest.mark.parametrize("fields", STRUCTURES.values(), ids=STRUCTURES)
def test_fields_do_not_overlap_and_fit(fields):
    used = 0
    for field in fields:
        mask = ((1 << field.bits) - 1) << field.offset
        assert not used & mask and mask < 1 << 512
        used |= mask
        assert field.offset // 64 == (field.offset + field.bits - 1) // 64


def test_round_trip():
    values = {"tag": 0xBEEF, "opcode": 1, "tokens": 7, "y_address": 0x12_3456_7800}
    assert commands.decode(SUBMISSION, commands.encode(SUBMISSION, values)) == {
        field.name: values.get(field.name, 0) for field in SUBMISSION
    }
    assert (
        commands.decode(LAYER, commands.encode(LAYER, {"grid_exponent": -28}))["grid_exponent"]
        == -28
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tag": 65536}, "tag must be from 0 to 65535, not 65536"),
        ({"tokens": -1}, "tokens must be from 0"),
        ({"tolkens": 1}, "field must be one of opcode, tag, tokens"),
    ],
)
def test_bad_fields_are_named(values, message):
    with pytest.raises(CommandError, match=message):
        commands.encode(SUBMISSION, values)


def test_registers_are_aligned_unique_and_in_range():
    addresses = [register.address for register in registers.REGISTERS.values()]
    assert len(set(addresses)) == len(addresses)
    assert all(a % 4 == 0 and a < 1 << registers.ADDRESS_BITS for a in addresses)
    for register in registers.REGISTERS.values():
        bits = [b for f in register.fields for b in range(f.offset, f.offset + f.bits)]
        assert len(set(bits)) == len(bits) and all(b < 32 for b in bits) and register.text


GOOD = {
    SUBMISSION: {"opcode": 1, "tokens": 64, "top_k": 4},
    LAYER: {"planes": 2, "num_experts": 16, "d_in": 256, "d_out": 32, "grid_exponent": -100},
    EXPERT: {"sections": 2, "activation": 1, "d_expert": 256, "format0": 4, "format1": 0,
             "operand1": 1, "sink1": 1},
}


@pytest.mark.parametrize(("fields", "changes", "name", "text"), [
    (SUBMISSION, {}, None, ""),
    (SUBMISSION, {"tokens": 0}, "tokens", "from 1 to 64"),
    (SUBMISSION, {"tokens": 65, "top_k": 17}, "tokens", "from 1 to 64"),
    (SUBMISSION, {"top_k": 17}, "top_k", "from 1 to 16"),
    (SUBMISSION, {"top_k": 5}, "top_k", "from 1 to 4"),
    (SUBMISSION, {"opcode": 2}, "top_k", "1 where opcode is 2"),
    (SUBMISSION, {"opcode": 2, "top_k": 1}, None, ""),
    (SUBMISSION, {"ids_address": 32}, "ids_address", f"a multiple of 64 from 0 to {2**40 - 1}"),
    (LAYER, {}, None, ""),
    (LAYER, {"planes": 3}, "planes", "1 or 2"),
    (LAYER, {"d_out": 288, "d_in": 16}, "d_in", "a multiple of 32 from 32 to 256"),
    (LAYER, {"grid_exponent": 61}, "grid_exponent", "from -100 to 60"),
    (EXPERT, {}, None, ""),
    (EXPERT, {"sections": 3}, "sections", "1 or 2"),
    (EXPERT, {"activation": 6}, "activation", "0, 1, 2, 3, 4 or 5 where sections is 2"),
    (EXPERT, {"sink0": 2}, None, ""),
    (EXPERT, {"limit": 0x7F80}, "limit", "from 0 to 32639 where sections is 2"),
    (EXPERT, {"flags": 1}, "flags", "0"),
    (EXPERT, {"format0": 5}, "format0", "0, 1, 2, 3 or 4"),
    (EXPERT, {"format1": 5}, "format1", "0, 1, 2, 3 or 4 where sections is 2"),
    (EXPERT, {"sections": 1, "sink0": 1, "activation": 9, "d_expert": 0, "format1": 9}, None, ""),
    (EXPERT, {"sections": 1}, "sink0", "1 where sections is 1"),
])
def test_a_field_that_is_refused_is_named_with_its_limit(fields, changes, name, text):
    values = {field.name: 0 for field in fields} | GOOD[fields] | changes
    found = bad_field(fields, values, TINY)
    assert (found[0].name if found else None) == name
    assert (found[1].text(TINY) if found else "") == text


def test_limits_in_words():
    assert field_of(EXPERT, "format0").limits[0].text() == "one of format_codes"
    assert field_of(LAYER, "d_in").limits[0].text() == "a multiple of 32 from 32 to max_dim"
    assert Limit(multiple=64).text() == "a multiple of 64"
    assert Limit(values=(7,)).text() == "7"
    few = TINY.replace(formats=("int4_g32",))
    assert field_of(EXPERT, "format0").limits[0].text(few) == "1"
