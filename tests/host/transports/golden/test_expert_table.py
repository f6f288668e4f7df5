"""Entries of the expert table: what is refused, in which order, and what has run by then."""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.formats import quantise, weight_format
from moeaccel.host.transports.golden.expert_table import Entry, check_entry
from moeaccel.image import Expert, ExpertShape, LinearShape, table_entry
from moeaccel.interface.commands import EXPERT, Limit, Status, encode, field_of
from tests.support.golden_bench import TINY, GoldenBench

CONFIG = TINY.replace(formats=("mxint8", "int4_g32", "mxfp4"), activations=("relu",))
D_IN = D_OUT = 64
GATED = table_entry(
    ExpertShape(weight_format("int4_g32"), D_IN, 96, 2, down_format=weight_format("mxint8"),
                activation="relu"), 0x4040)
LINEAR = table_entry(LinearShape(weight_format("mxfp4"), D_OUT, D_IN, 2), 0x4040)
TOP = 1 << CONFIG.address_bits


def words_of(entry, *indices):
    return sum(entry[f"words{i}"] for i in indices) * CONFIG.word_bytes


def check(entry, **changes):
    return check_entry(encode(EXPERT, entry | changes), D_IN, D_OUT, CONFIG)


def beyond(field, limit: Limit):
    """Return values of a field just outside a limit, as far as the field can hold them."""
    codes = limit.codes(CONFIG)
    most = (1 << field.bits) - 1
    if codes is not None:
        found = [value for value in (*range(max(codes) + 2), most) if value not in codes]
    else:
        high = limit.highest(CONFIG)
        found = [limit.low - 1, high + 1, high // limit.multiple * limit.multiple + limit.multiple,
                 limit.low + 1, limit.low + limit.multiple // 2, most]
        found = [value for value in found if not limit.allows(value, CONFIG)]
    return sorted({value for value in found if 0 <= value <= most})


CASES = [(kind, entry, field, value)
         for kind, entry in (("gated", GATED), ("linear", LINEAR))
         for field in EXPERT for limit in field.limits if limit.applies(entry)
         for value in beyond(field, limit)]


def test_good_entries():
    gated, linear = check(GATED), check(LINEAR)
    assert isinstance(gated, Entry) and isinstance(linear, Entry)
    assert [(s.format.name, s.rows, s.k) for s in gated.sections] == [
        ("int4_g32", 192, 64), ("mxint8", 64, 96)]
    assert [(s.format.name, s.rows, s.k) for s in linear.sections] == [("mxfp4", 64, 64)]
    assert (gated.activation, gated.image_address) == ("relu", 0x4040)
    assert gated.payload_bytes == words_of(GATED, 0, 1)


@pytest.mark.parametrize(("kind", "entry", "field", "value"), CASES,
                         ids=[f"{kind} {field.name} {value:#x}" for kind, _, field, value in CASES])
def test_every_limit_of_every_field(kind, entry, field, value):
    assert check(entry, **{field.name: value}) == field.word


def test_every_field_with_limits_was_tried():
    tried = {(kind, field.name) for kind, _, field, _ in CASES}
    for field in EXPERT:
        if field.limits:
            assert ("gated", field.name) in tried, field.name
    # Of a matrix all but those of h and the second section.
    assert {name for kind, name in tried if kind == "linear"} == {
        "sections", "flags", "image_address", "format0", "operand0", "sink0", "bias0"}


@pytest.mark.parametrize("changes", [
    {"activation": 255}, {"d_expert": 7}, {"format1": 99}, {"operand1": 9}, {"sink1": 9},
    {"words1": 123}])
def test_what_a_matrix_has_not_is_not_looked_at(changes):
    assert isinstance(check(LINEAR, **changes), Entry)


@pytest.mark.parametrize(("entry", "changes", "name"), [
    (GATED, {"words0": GATED["words0"] + 1}, "words0"),
    (GATED, {"words1": GATED["words1"] - 1}, "words1"),
    (GATED, {"words1": 0, "words0": 0}, "words0"),
    (LINEAR, {"words0": LINEAR["words0"] + 1}, "words0"),
    (GATED, {"d_expert": 64}, "words0"),  # good by itself, and not that of the words
    (GATED, {"format1": 1}, "words1"),
    (GATED, {"image_address": TOP - words_of(GATED, 0, 1)}, None),
    (GATED, {"image_address": TOP - words_of(GATED, 0, 1) + 64}, "image_address"),
    (LINEAR, {"image_address": TOP - words_of(LINEAR, 0)}, None),
    (LINEAR, {"image_address": TOP - words_of(LINEAR, 0) + 64}, "image_address"),
    # fields before the image's end, and that before words
    (GATED, {"image_address": TOP - 64, "words0": 1}, "image_address"),
    (GATED, {"image_address": TOP - 64, "operand1": 5}, "operand1"),
    (GATED, {"words0": 1, "sink1": 0}, "sink1"),
    (GATED, {"flags": 1, "image_address": 32, "sections": 0}, "sections"),
])
def test_what_fields_say_together(entry, changes, name):
    found = check(entry, **changes)
    if name is None:
        assert isinstance(found, Entry)
    else:
        assert found == field_of(EXPERT, name).word


# -- through the device ----------------------------------------------------------------------------
def gated(rng, d_expert=32, name="int4_g32"):
    return Expert.quantise(rng.standard_normal((2 * d_expert, 64)).astype(np.float32),
                           rng.standard_normal((64, d_expert)).astype(np.float32), name)


@pytest.fixture
def bench():
    return GoldenBench()


def call(rng, ids):
    return (rng.standard_normal((len(ids), 64)).astype(np.float32), ids,
            rng.random(ids.shape).astype(np.float32))


def test_a_bad_entry_ends_the_command_behind_the_experts_before_it(bench):
    rng = np.random.default_rng(1)
    layer = bench.layer([gated(rng), gated(rng, 64, "mxint8"), gated(rng), gated(rng)])
    layer.change(1, flags=4)
    layer.change(3, sections=0)
    # Token 3 has no expert; experts 0 (tokens 0, 1), 1 (bad), 2.
    x, ids, weights = call(rng, np.array([[0, 1], [2, 0], [2, 1], [-1, 4]]))
    completion, counted, y = bench.run(layer, x, ids, weights)
    assert completion["status"] == Status.BAD_EXPERT
    assert (completion["detail"], completion["address"]) == (1, field_of(EXPERT, "flags").word)
    assert (completion["tag"], completion["underflows"]) == (7, 0)
    assert np.isnan(y).all()
    image = layer.entries[0]
    assert counted == dict.fromkeys(counted, 0) | {
        "commands": 1, "tokens": 4, "expert_passes": 1, "assignments": 2,
        "bytes_read_weights": (image["words0"] + image["words1"]) * TINY.word_bytes,
        # submission, layer; ids and weights; two entries; two rows of x
        "bytes_read_other": 2 * 64 + 2 * 32 + 2 * 64 + 2 * 256,
        # one row of zeros, two of partial sums, the completion
        "bytes_written": 256 + 2 * 512 + 64}


def test_experts_run_as_ids_name_them(bench):
    """Of two bad entries the one that is named first ends the command."""
    rng = np.random.default_rng(10)
    layer = bench.layer([gated(rng) for _ in range(4)])
    layer.change(0, flags=4)
    layer.change(1, flags=4)
    completion, counted, _ = bench.run(layer, *call(rng, np.array([[3, 1], [2, 0]])))
    assert (completion["status"], completion["detail"]) == (Status.BAD_EXPERT, 1)
    assert (counted["expert_passes"], counted["assignments"]) == (1, 1)


def test_a_bad_entry_without_tokens_is_not_read(bench):
    rng = np.random.default_rng(2)
    layer = bench.layer([gated(rng), gated(rng), gated(rng)])
    layer.change(1, sections=7)
    x, ids, weights = call(rng, np.array([[0, 2], [2, -1]]))
    completion, counted, _ = bench.run(layer, x, ids, weights)
    assert completion["status"] == Status.OK and counted["expert_passes"] == 2


def test_the_first_expert_may_be_bad(bench):
    rng = np.random.default_rng(3)
    layer = bench.layer([gated(rng), gated(rng)])
    layer.change(0, words1=1)
    x, ids, weights = call(rng, np.array([[0, 1]]))
    completion, counted, _ = bench.run(layer, x, ids, weights)
    assert (completion["status"], completion["detail"], completion["address"]) == (
        Status.BAD_EXPERT, 0, field_of(EXPERT, "words1").word)
    assert counted["expert_passes"] == counted["bytes_read_weights"] == 0
    # Once it is mended, the next command runs: nothing of the bad entry was kept.
    layer.change(0)
    assert bench.run(layer, x, ids, weights)[0]["status"] == Status.OK


def test_gemm_checks_its_entry(bench):
    rng = np.random.default_rng(4)
    layer = bench.layer([quantise(rng.standard_normal((64, 64)).astype(np.float32), "mxfp4")])
    layer.change(0, sink0=0)
    completion, _, _ = bench.run(layer, np.ones((1, 64), np.float32))
    assert (completion["status"], completion["address"]) == (Status.BAD_EXPERT, 4)


def test_overflows_and_nonfinite_tokens_of_what_ran_do_not_hide_it(bench):
    rng = np.random.default_rng(5)
    layer = bench.layer([gated(rng), gated(rng)], grid_exponent=-60)
    layer.change(1, flags=1)
    x, ids, weights = call(rng, np.array([[0, 1], [0, 1]]))
    x[0, 0] = np.nan
    completion, counted, _ = bench.run(layer, x, ids, 1e6 * weights)
    assert completion["status"] == Status.BAD_EXPERT
    assert 0 < counted["overflows"] <= 2 * 64


def test_entries_outside_the_window(bench):
    """Where an entry cannot be read, what it would say does not matter."""
    rng = np.random.default_rng(6)
    layer = bench.layer([gated(rng), gated(rng)])
    x, ids, weights = call(rng, np.array([[0, 1]]))
    top = 1 << 22
    for table, status in ((top - 64, Status.WINDOW), (top, Status.WINDOW)):
        elsewhere = bench.layer(layer.experts, table_address=table)
        first = encode(EXPERT, elsewhere.entries[0])
        if table < top:
            bench.device.memory_write(table, first)
        completion, counted, _ = bench.run(elsewhere, x, ids, weights)
        assert (completion["status"], completion["address"]) == (status, top)
        assert bench.device.possible_faults == {(Status.WINDOW, top)}
        assert counted["tokens"] == 0


def test_memory_that_refuses_an_entry():
    rng = np.random.default_rng(7)
    bench = GoldenBench(memory_bytes=1 << 20)
    bench.write(WINDOW_LIMIT_LO=1 << 21)
    layer = bench.layer([gated(rng), gated(rng)], table_address=1 << 20)
    x, ids, weights = call(rng, np.array([[-1, 1]]))
    completion, _, _ = bench.run(layer, x, ids, weights)
    assert (completion["status"], completion["address"]) == (Status.BUS_ERROR, (1 << 20) + 64)


@pytest.mark.parametrize("fits", [True, False])
def test_a_table_that_runs_beyond_the_address_space(fits):
    config = PRESETS["tiny"].replace(address_bits=20)
    bench = GoldenBench(config, memory_bytes=1 << 20)
    rng = np.random.default_rng(8)
    top = (1 << 20) - 128
    layer = bench.layer([gated(rng), gated(rng)], table_address=top + (0 if fits else 64))
    for index, entry in enumerate(layer.entries):
        if fits:
            bench.device.memory_write(top + 64 * index, encode(EXPERT, entry))
    x, ids, weights = call(rng, np.array([[0, -1]]))
    completion, _, _ = bench.run(layer, x, ids, weights)
    expected = (Status.OK, 0) if fits else (Status.BAD_LAYER, 6)
    assert (completion["status"], completion["detail"]) == expected
