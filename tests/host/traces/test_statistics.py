from dataclasses import replace

import numpy as np
import pytest

from moeaccel.host.traces import RoutingTrace
from moeaccel.host.traces.presets import generate, preset
from moeaccel.host.traces.statistics import compare, measure, real
from moeaccel.host.traces.statistics.prediction import Tables


def trace_of(*requests, n_experts=8, weights=None):
    return RoutingTrace.of_requests(
        [(np.asarray(ids), weights) for ids in requests], n_experts=n_experts)


def test_what_can_be_counted_by_hand():
    a, b = [[0, 1]], [[0, 2]]  # one layer, top-2
    found = measure(trace_of([a, b, b, a], [a, a]))
    assert found["reuse/lag 1"] == pytest.approx((1 + 2 + 1 + 2) / 8)
    assert found["reuse/lag 2"] == pytest.approx((1 + 1) / 4)
    assert [found[f"repeated/{n}"] for n in range(3)] == [0, 0.5, 0.5]
    assert found["distinct/window 2"] == pytest.approx((3 + 3 + 2) / 3)
    assert found["distinct/window 4"] == 3
    # Six tokens: expert 0 six times, 1 four times, 2 twice, of twelve.
    assert found["max/mean/corpus"] == pytest.approx(8 * 6 / 12)
    assert found["min/mean/corpus"] == 0
    assert found["top 25 %/corpus"] == pytest.approx(10 / 12)
    assert found["experts for 90 %/corpus"] == 3 / 8
    shares = np.array([6, 4, 2]) / 12
    assert found["entropy/corpus"] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(8))
    gini = np.abs(np.subtract.outer(x := np.array([6, 4, 2, 0, 0, 0, 0, 0]), x)).sum() / (
        2 * 8 * 12)
    assert found["Gini/corpus"] == pytest.approx(gini)
    assert found["cache/LRU, 2 slots"] == pytest.approx((1 + 2 + 1 + 2 + 2) / 12)
    assert "segment/LRU@1" not in found and "weights/second over first" not in found


def test_zipf_finds_its_exponent():
    counts = np.rint(400 * np.arange(1, 17) ** -0.7).astype(int)
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(16), counts))
    found = measure(trace_of(ids[:, None, None], n_experts=16))
    assert found["Zipf/corpus"] == pytest.approx(0.7, abs=0.01)
    assert found["Zipf slope/corpus"] == pytest.approx(0.7, abs=0.01)


def test_independent_routes_have_no_locality():
    rng = np.random.default_rng(0)
    requests = [np.array([[rng.choice(16, 2, replace=False) for _ in range(3)]
                          for _ in range(64)]) for _ in range(12)]
    found = measure(trace_of(*requests, n_experts=16))
    chance = 2 / 16
    for name in ("reuse/lag 1", "reuse/lag 8", "recall/cross-layer 1 @2", "recall/Markov @2",
                 "recall/EMA @2", "placement/first half, 2 slots"):
        assert found[name] == pytest.approx(chance, abs=0.04), name
    assert found["distinct/window 8"] == pytest.approx(16 * (1 - (1 - chance) ** 8), rel=0.02)
    assert found["distinct/batch 8"] == pytest.approx(16 * (1 - (1 - chance) ** 8), rel=0.03)
    assert found["cache/Belady, 4 slots"] > found["cache/LRU, 4 slots"]
    assert found["one cache/5 %"] == 0


def test_a_layer_that_copies_the_one_below_is_foretold():
    rng = np.random.default_rng(0)
    below = np.array([rng.choice(16, 2, replace=False) for _ in range(600)])
    ids = np.stack([below, (below + 3) % 16], axis=1)
    found = measure(trace_of(*np.split(ids, 10), n_experts=16))
    assert found["recall/cross-layer 1 @2"] > 0.99
    assert found["prefetch/found, 4 slots, 2 guesses"] > 0.99
    assert found["recall/popularity @2"] < 0.3
    known = np.eye(4, dtype=bool)
    assert Tables(known, known[::-1]).evidence(known).argmax(1).tolist() == [3, 2, 1, 0]


def test_imbalance_and_weights():
    ids = np.tile([[[0, 1]]], (300, 1, 1))
    weights = np.tile(np.array([[[0.2, 0.6]]], np.float32), (300, 1, 1))
    found = measure(trace_of(ids, weights=weights))
    assert found["imbalance/4 devices, batch 16"] == 4
    assert found["imbalance/8 devices, batch 16"] == 4
    assert found["tokens an expert/batch 32"] == 32
    assert found["alone/batch 8"] == 0
    assert found["weights/second over first"] == pytest.approx(1 / 3)
    assert found["weights/share of the first"] == pytest.approx(0.75)


def test_unused_slots_are_nobodys():
    ids = np.array([[[0, -1]], [[0, 1]], [[-1, 1]], [[2, 1]]])
    found = measure(trace_of(ids))
    assert found["reuse/lag 1"] == pytest.approx((1 + 1 + 1) / 6)
    assert found["cache/LRU, 2 slots"] == pytest.approx(3 / 6)


def test_what_is_published_stands_beside_what_is_found():
    trace = generate("mixtral-8x7b", requests=6, tokens=64)
    rows = {row.statistic: row for row in compare(trace, "mixtral-8x7b")}
    assert next(iter(rows)) == "segment/LRU@1" and rows["segment/LRU@1"].difference is None
    row = rows["max/mean/corpus"]
    assert row.real == 1.11 and row.difference == pytest.approx(row.found - 1.11)
    assert "C4" in row.source
    assert rows["reuse/lag 1"].real is None
    assert compare(trace, "unknown")[0].real is None


BEYOND_THE_FIGURE = {model: names for model, values in real().items() if (names := {
    name for group in values.values() for name in group if not name.startswith("segment/")})}


@pytest.mark.parametrize("model", BEYOND_THE_FIGURE)
def test_every_published_statistic_is_one_that_is_measured(model):
    """Otherwise a misspelt name would show as missing, for ever."""
    p = preset(model)
    trace = generate(replace(p, layers=p.layers[:10]), requests=5, tokens=132)
    found = {row.statistic for row in compare(trace, model) if row.found is not None}
    assert BEYOND_THE_FIGURE[model] - found == set()
