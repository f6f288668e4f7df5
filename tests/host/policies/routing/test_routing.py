import numpy as np
import pytest

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.errors import UnknownPolicy
from moeaccel.host.policies.routing import ROUTINGS, Call, routing
from moeaccel.host.policies.routing.base import renormalised, stand_in_logits
from moeaccel.host.policies.routing.batch_union import BatchUnion
from moeaccel.host.policies.routing.cache_prior import CachePrior
from moeaccel.host.policies.routing.deferral import Deferral
from moeaccel.host.policies.routing.mixed_precision import MixedPrecision
from moeaccel.host.policies.routing.relative_threshold import RelativeThreshold
from moeaccel.host.policies.routing.resident_only import ResidentOnly
from moeaccel.host.policies.routing.sensitivity_skip import SensitivitySkip
from moeaccel.host.policies.routing.top_p import TopP

IDS = np.array([[3, 1, 5, 2]])
WEIGHTS = np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)


def call(resident=(), ids=IDS, weights=WEIGHTS, logits=None, layer=0, experts=8):
    flags = np.zeros(experts, bool)
    flags[list(resident)] = True
    return Call(layer, ids, weights, flags, logits)


def logits_of(*rows):
    return np.array(rows, np.float32)


def test_all_are_lossy_and_have_names():
    assert {"batch-union", "cache-prior", "deferral", "mixed-precision", "relative-threshold",
            "resident-only", "sensitivity-skip", "top-p"} == set(ROUTINGS)
    assert not any(kind.lossless for kind in ROUTINGS.values())
    with pytest.raises(UnknownPolicy, match=r"routing must be one of .*mean top-p"):
        routing("topp")


def test_weights_keep_their_sum():
    kept = renormalised(np.array([[3, -1, 5, -1]]), WEIGHTS, WEIGHTS)
    assert kept.sum() == pytest.approx(1) and kept[0, 1] == 0
    assert kept[0, 0] / kept[0, 2] == pytest.approx(0.5 / 0.15)
    assert renormalised(np.array([[-1, -1, -1, -1]]), WEIGHTS, WEIGHTS).tolist() == [[0] * 4]


def test_stand_in_logits_give_the_route_back():
    rng = np.random.default_rng(0)
    ids = np.array([rng.permutation(32)[:4] for _ in range(50)])
    weights = -np.sort(-rng.random((50, 4)).astype(np.float32), axis=1)
    ids[0, 3] = -1
    logits = stand_in_logits(ids, weights, 32, rng)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert np.array_equal(order[1:, :4], ids[1:]) and np.array_equal(order[0, :3], ids[0, :3])


def test_cache_prior_pulls_towards_residents():
    logits = logits_of([0, 3, 1.9, 4, 2.2, 2, 0, 0])
    ids, weights = np.array([[3, 1]]), np.array([[0.73, 0.27]], np.float32)
    same = CachePrior(strength=0).route(call((4,), ids, weights, logits))
    assert same.ids.tolist() == [[3, 1]]
    pulled = CachePrior(strength=0.5, keep=1).route(call((4, 2), ids, weights, logits))
    assert pulled.ids.tolist() == [[3, 4]]  # 3 is kept, 4 was raised by 2 over 1
    assert pulled.weights[0, 0] / pulled.weights[0, 1] == pytest.approx(np.exp(4 - 2.2), rel=1e-4)
    held = CachePrior(strength=2, keep=1).route(call((4, 2), ids, weights, logits))
    assert held.ids.tolist() == [[3, 4]]
    free = CachePrior(strength=2, keep=0).route(call((4, 2), ids, weights, logits))
    assert free.ids.tolist() == [[4, 2]]


def test_light_slots_are_skipped():
    assert RelativeThreshold(beta=0.4).route(call()).ids.tolist() == [[3, 1, -1, -1]]
    by_layer = RelativeThreshold(beta=[0.4, 0.05])
    assert by_layer.route(call(layer=1)).ids.tolist() == [[3, 1, 5, 2]]
    assert by_layer.route(call(layer=7)).ids.tolist() == [[3, 1, 5, 2]]  # the last goes on
    assert TopP(p=0.8).route(call()).ids.tolist() == [[3, 1, -1, -1]]
    assert TopP(p=0.81).route(call()).ids.tolist() == [[3, 1, 5, -1]]
    assert TopP(p=1).route(call()).ids.tolist() == IDS.tolist()


def test_early_layers_are_not_touched():
    policy = SensitivitySkip(threshold=0.3, n_layers=4, last=0.1)
    assert policy.route(call(layer=0)).ids.tolist() == [[3, 1, 5, -1]]
    assert policy.route(call(layer=3)).ids.tolist() == [[3, -1, -1, -1]]  # the first never goes


def test_what_may_come_later():
    policy = Deferral(now=2, n_layers=3)
    found = policy.route(call(resident=(5,)))
    assert found.later.tolist() == [[False, False, False, True]] and found.ids is IDS
    assert not policy.route(call(layer=2)).later.any()


def test_precision_of_what_is_missing():
    found = MixedPrecision(high=0.4, low=0.9).route(call(resident=(2,)))
    # 3 has nothing before it, 1 half of the weight, 5 four fifths, and 2 is resident.
    assert found.low.tolist() == [[False, True, True, False]]
    assert found.ids.tolist() == [[3, 1, 5, 2]]
    skipped = MixedPrecision(high=0.4, low=0.9).route(call())
    assert skipped.ids.tolist() == [[3, 1, 5, -1]]


def test_a_batch_shares_its_experts():
    logits = logits_of([5, 4, 0, 3, 0, 0, 0, 0], [5, 4, 0, 0, 3, 0, 0, 0], [0, 4, 5, 0, 0, 3, 0, 0])
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :3]
    weights = np.full(ids.shape, 1 / 3, np.float32)
    found = BatchUnion(keep=0.5).route(call((), ids, weights, logits))
    assert len(np.unique(found.ids)) < len(np.unique(ids)) == 6
    assert found.ids[:, 0].tolist() == ids[:, 0].tolist()
    # Three firsts are more than four tenths of the union, and stay.
    own = np.array([[0], [1], [2]])
    firsts = BatchUnion(keep=0.4).route(call((), own, np.ones((3, 1), np.float32), logits_of(
        [5, 0, 0, 0, 0, 0, 0, 0], [4, 5, 0, 0, 0, 0, 0, 0], [4, 0, 5, 0, 0, 0, 0, 0])))
    assert firsts.ids.tolist() == own.tolist()
    alone = BatchUnion(keep=0.5).route(call((), ids[:1], weights[:1], logits[:1]))
    assert alone.ids.tolist() == ids[:1].tolist()


def test_residents_only():
    logits = logits_of([0, 3, 1.9, 4, 2.2, 2, 0, 0])
    ids, weights = np.array([[3, 1]]), np.array([[0.7, 0.3]], np.float32)
    found = ResidentOnly().route(call((0, 2, 4), ids, weights, logits))
    assert found.ids.tolist() == [[4, 2]] and found.weights.sum() == pytest.approx(1)
    assert ResidentOnly().route(call((4,), ids, weights, logits)).ids.tolist() == [[4, -1]]
    assert ResidentOnly().route(call((), ids, weights, logits)).ids.tolist() == [[3, 1]]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: CachePrior(strength=-1), "strength and keep must be at least 0"),
    (lambda: RelativeThreshold(beta=2), "beta must be 0 to 1, not 2"),
    (lambda: SensitivitySkip(threshold=-1), "threshold must be at least 0"),
    (lambda: TopP(p=0), "p must be above 0"),
    (lambda: Deferral(now=-1), "now must be at least 0"),
    (lambda: MixedPrecision(high=0.9, low=0.1), "high and low must be"),
    (lambda: BatchUnion(keep=0), "keep must be above 0"),
])
def test_options_out_of_range(make, message):
    with pytest.raises(InvalidOption, match=message):
        make()
