import pytest

from moeaccel.errors import CommandError
from moeaccel.interface import commands, registers
from moeaccel.interface.commands import COMPLETION, LAYER, SUBMISSION


@pytest.mark.parametrize("fields", [SUBMISSION, LAYER, COMPLETION])
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
