"""What the cycle model must do whatever the hardware: add up, scale, be quick."""

import time

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.cycles import (
    Prediction,
    expert_cycles,
    linear_cycles,
    predict_experts,
    predict_linear,
)
from moeaccel.cycles.tile_buffer import TileBuffer
from moeaccel.errors import FormatError
from moeaccel.formats import FORMATS, weight_format
from moeaccel.image import ExpertShape, LinearShape, Section
from moeaccel.plan import plan

TINY, SMALL, WIDE = (PRESETS[name] for name in ("tiny", "small", "wide512"))


def routing(rng, tokens, experts, top_k):
    return np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])


def shape_of(config, d_model, d_expert, name="int4_g32"):
    return ExpertShape(weight_format(name), d_model, d_expert, config.row_multipliers,
                       config.channels)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(
    "config", [TINY, SMALL, PRESETS["peer256"], SMALL.replace(name="short tiles", channels=32)],
    ids=lambda c: c.name)
def test_counters_follow_from_the_work(config, planes, name):
    rng = np.random.default_rng(1)
    ids = np.where(rng.random((11, 3)) < 0.8, routing(rng, 11, 6, 3), -1)
    shape = shape_of(config, 96, 64, name)
    found = predict_experts(config, shape, ids, 6, planes=planes)
    per_group = config.token_lanes // planes
    steps = [s.tiles * s.steps for s in (shape.gate_up, shape.down)]
    work = [len(now.tokens) for now in plan(ids, 6, config.max_slots // planes).passes]
    words = shape.gate_up.words + shape.down.words
    assert found.busy == sum(-(-count // per_group) for count in work) * sum(steps)
    assert found.bytes_read_weights == len(work) * words * config.word_bytes * config.channels
    assert found.cycles == (found.busy + found.starved_weights + found.starved_activations
                            + found.stalled_output + found.idle)
    assert min(found.starved_weights, found.starved_activations, found.stalled_output,
               found.idle) >= 0
    assert found.cycles >= (found.bytes_read_weights / config.channels + found.bytes_read_other
                            + found.bytes_written) / config.port_bytes


def test_gemm_reads_and_writes_its_operands_once():
    section = Section(weight_format("mxint8"), 64, 128, SMALL.row_multipliers)
    found = predict_linear(SMALL, section, 5, planes=1)
    assert found.bytes_read_other == 5 * 128 * 4 + 3 * 64  # x, submission, layer, table
    assert found.bytes_written == 5 * 64 * 4 + 64  # y, completion
    assert linear_cycles(SMALL, section, 5, planes=1) == found.cycles


def mixed_shapes(config, d=96):
    array = config.row_multipliers, config.channels
    formats = {name: weight_format(name) for name in FORMATS}
    return [
        ExpertShape(formats["int4_g32"], d, 64, *array),
        ExpertShape(formats["mxint8"], d, 256, *array, down_format=formats["mxfp4"],
                    activation="relu"),
        LinearShape(formats["int4_g128"], d, d, *array),
        ExpertShape(formats["mxfp4"], d, 32, *array, down_format=formats["mxint8"])]


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("config", [TINY, SMALL], ids=lambda c: c.name)
def test_a_mixed_layer_is_the_work_of_its_experts(config, planes):
    rng = np.random.default_rng(7)
    shapes, ids = mixed_shapes(config), routing(rng, 9, 4, 2)
    found = predict_experts(config, shapes, ids, 4, planes=planes)
    planned = plan(ids, 4, config.max_slots // planes)
    per_group = config.token_lanes // planes
    sections = [shapes[now.expert].sections for now in planned.passes]
    assert found.busy == sum(
        -(-len(now.tokens) // per_group) * sum(s.tiles * s.steps for s in parts)
        for now, parts in zip(planned.passes, sections, strict=True))
    assert found.bytes_read_weights == config.word_bytes * sum(
        s.words for parts in sections for s in parts)
    assert found.cycles == (found.busy + found.starved_weights + found.starved_activations
                            + found.stalled_output + found.idle)


def test_a_mixed_layer_costs_no_more_than_its_experts():
    """Each command alone has to begin and to end, too."""
    rng = np.random.default_rng(8)
    shapes, ids = mixed_shapes(SMALL, 512), routing(rng, 8, 4, 2)
    alone = [expert_cycles(SMALL, shapes, np.where(ids == e, e, -1), 4, planes=2)
             for e in range(4)]
    assert expert_cycles(SMALL, shapes, ids, 4, planes=2) <= sum(alone)


def test_one_shape_stands_for_all():
    shape = shape_of(TINY, 64, 96)
    ids = routing(np.random.default_rng(9), 7, 3, 2)
    assert predict_experts(TINY, shape, ids, 3, planes=1) == predict_experts(
        TINY, [shape] * 3, ids, 3, planes=1)


@pytest.mark.parametrize(("shapes", "what"), [
    ([shape_of(TINY, 64, 32)] * 3, "not 3 with"),
    ([shape_of(TINY, 64, 32), shape_of(TINY, 96, 32)], r"\[\(64, 64\), \(96, 96\)\]")])
def test_shapes_that_are_no_layer(shapes, what):
    with pytest.raises(FormatError, match="shapes must be those of 2 experts.*" + what):
        predict_experts(TINY, shapes, np.zeros((1, 1), int), 2, planes=1)


def test_entries_are_those_of_experts_with_tokens():
    shape = shape_of(TINY, 64, 32)
    ids = np.array([[0, 5], [5, 11]])
    found = predict_experts(TINY, shape, ids, 12, planes=2)
    passes = plan(ids, 12, TINY.max_slots // 2)
    pairs = -(-4 * ids.size // TINY.port_bytes) * TINY.port_bytes
    assert found.bytes_read_other == (
        2 * 64 + 2 * pairs + 3 * 64 + 4 * 64 * len(passes.loads)
        + 8 * 64 * sum(not row.first for row in passes.rows))


def test_a_token_without_experts_gets_zeros():
    shape = shape_of(TINY, 64, 32)
    found = predict_experts(TINY, shape, np.full((3, 2), -1), 4, planes=2)
    assert found.busy == found.bytes_read_weights == 0
    assert found.bytes_written == 3 * 64 * 4 + 64
    some = predict_experts(TINY, shape, np.array([[-1, -1], [0, -1], [4, 7]]), 4, planes=2)
    assert some.bytes_written == found.bytes_written
    assert some.busy > 0


def test_no_tokens_cost_nothing():
    shape = shape_of(TINY, 64, 32)
    assert predict_experts(TINY, shape, np.zeros((0, 2), int), 4, planes=2) == Prediction()
    assert predict_experts(TINY, shape, np.zeros((2, 0), int), 4, planes=2) == Prediction()
    assert linear_cycles(TINY, shape.down, 0, planes=2) == 0


def test_a_long_call_is_several_commands():
    shape = shape_of(TINY, 64, 32)
    ids = routing(np.random.default_rng(2), TINY.max_tokens + 9, 4, 2)
    parts = [ids[: TINY.max_tokens], ids[TINY.max_tokens :]]
    assert predict_experts(TINY, shape, ids, 4, planes=2) == (
        predict_experts(TINY, shape, parts[0], 4, planes=2)
        + predict_experts(TINY, shape, parts[1], 4, planes=2))


def test_latency_only_costs():
    shape = shape_of(SMALL, 256, 128)
    ids = routing(np.random.default_rng(3), 4, 8, 2)
    found = [expert_cycles(SMALL, shape, ids, 8, planes=2, latency=latency)
             for latency in (1, 10, 40, 100, 200, 300)]
    assert found == sorted(found)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("name", FORMATS)
def test_passing_over_tiles_changes_nothing(monkeypatch, tokens, name):
    shape = shape_of(SMALL, 1024, 512, name)
    ids = routing(np.random.default_rng(4), tokens, 8, 2)
    quick = predict_experts(SMALL, shape, ids, 8, planes=2)
    monkeypatch.setattr(TileBuffer, "skip", lambda self, limit: None)
    exact = predict_experts(SMALL, shape, ids, 8, planes=2)
    assert abs(quick.cycles - exact.cycles) <= max(16, exact.cycles // 1000)
    assert (quick.busy, quick.bytes_read_weights) == (exact.busy, exact.bytes_read_weights)


@pytest.mark.parametrize("latency", [40, 100, 200])
@pytest.mark.parametrize(("config", "share"), [
    (WIDE, 0.98), (WIDE.replace(channels=4), 0.97), (PRESETS["hbm32"], 0.93)])
def test_decode_is_a_stream_of_weights(config, share, latency):
    """Memory share of one token of OLMoE-1B-7B, experts' switches included.

    A layer takes 29,000 cycles of 32 channels; some 1,300 to begin and to end are more of them.
    """
    shape = shape_of(config, 2048, 1024)
    ids = routing(np.random.default_rng(5), 1, 64, 8)
    found = expert_cycles(config, shape, ids, 64, planes=2, latency=latency)
    assert 8 * shape.stored_bytes / (config.channels * config.port_bytes * found) >= share


@pytest.mark.timeout(60)
def test_a_prefill_layer_takes_seconds():
    """64 experts, 512 tokens of 8, d_model 2048: half a million tiles."""
    shape = shape_of(WIDE, 2048, 1024)
    ids = routing(np.random.default_rng(6), 512, 64, 8)
    begin = time.process_time()
    found = predict_experts(WIDE, shape, ids, 64, planes=2, latency=100)
    assert time.process_time() - begin < 20  # 2 s on an idle machine
    assert found.busy / found.cycles >= 0.97
