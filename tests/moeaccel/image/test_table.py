"""Entries of the expert table are what a device takes, and say what the image has."""

import itertools

import pytest

from moeaccel.activations import ACTIVATIONS
from moeaccel.config import PRESETS
from moeaccel.formats import FORMATS
from moeaccel.image import ExpertShape, LinearShape, Section, expert_table, table_entry
from moeaccel.interface.commands import EXPERT, Operand, Sink, bad_field, decode

TINY = PRESETS["tiny"]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("name", "down"), list(itertools.product(FORMATS, FORMATS)))
def test_an_entry_of_an_expert(name, down, gated):
    shape = ExpertShape(FORMATS[name], 40, 50, 2, down_format=FORMATS[down], activation="relu",
                        gated=gated, limit=7.0, gate_limit=7.0625, gate_up_biased=gated,
                        down_biased=True)
    entry = table_entry(shape, 0x2040)
    assert entry == {
        "sections": 2, "activation": ACTIVATIONS["relu"].code, "d_expert": 64,
        "image_address": 0x2040,
        "format0": FORMATS[name].code, "operand0": Operand.X,
        "sink0": Sink.ACTIVATION if gated else Sink.ACTIVATION_ROWS, "limit": 0x40E0,
        "gate_limit": 0x40E20000,
        "words0": shape.gate_up.words, "bias0": int(gated), "bias1": 1,
        "format1": FORMATS[down].code, "operand1": Operand.HIDDEN, "sink1": Sink.COMBINE,
        "words1": shape.down.words}
    full = decode(EXPERT, expert_table([shape], [0x2040]))
    assert full == {field.name: entry.get(field.name, 0) for field in EXPERT}
    assert bad_field(EXPERT, full, TINY) is None


def test_an_entry_with_second_up_rows():
    shape = ExpertShape(FORMATS["mxint8"], 40, 50, 2, second_up=True)
    full = decode(EXPERT, expert_table([shape], [0]))
    assert full["sink0"] == Sink.ACTIVATION_PRODUCT and shape.gate_up.rows == 4 * 64
    refused, _ = bad_field(EXPERT, full, TINY)
    assert refused.name == "sink0"
    assert bad_field(EXPERT, full, TINY.replace(second_up=True)) is None


def test_an_entry_of_a_linear_layer():
    shape = LinearShape(FORMATS["mxfp4"], 100, 33, 2)
    full = decode(EXPERT, expert_table([shape], [4160]))
    named = {"sections": 1, "image_address": 4160, "format0": FORMATS["mxfp4"].code,
             "operand0": Operand.X, "sink0": Sink.COMBINE, "words0": shape.section.words}
    assert full == {field.name: named.get(field.name, 0) for field in EXPERT}
    assert bad_field(EXPERT, full, TINY) is None


def test_words_are_those_of_a_channel():
    fmt = FORMATS["mxint8"]
    entry = table_entry(ExpertShape(fmt, 256, 128, 2, 8), 64)
    assert (entry["words0"], entry["words1"]) == (
        Section(fmt, 32, 256, 2).words, Section(fmt, 32, 128, 2).words)


def test_the_entries_of_a_table_lie_in_the_order_of_the_experts():
    shapes = [ExpertShape(FORMATS["mxint8"], 64, 32 * (1 + e), 2) for e in range(5)]
    addresses = [4160 * (1 + e) for e in range(5)]
    raw = expert_table(shapes, addresses)
    assert len(raw) == 5 * 64
    entries = [decode(EXPERT, raw[64 * e : 64 * e + 64]) for e in range(5)]
    assert [e["d_expert"] for e in entries] == [32, 64, 96, 128, 160]
    assert [e["image_address"] for e in entries] == addresses
    with pytest.raises(ValueError, match="shorter"):
        expert_table(shapes, addresses[:4])
