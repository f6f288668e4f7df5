import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.residency import LFU, LRU, Belady, DecayedLFU, Pinned, replay


def masks(tokens, n_experts):
    """Return one layer's steps from sets of experts."""
    steps = np.zeros((len(tokens), 1, n_experts), np.int64)
    for step, used in zip(steps, tokens, strict=True):
        step[0, list(used)] = 1
    return steps


def sets(n_experts, at_most):
    return st.lists(st.sets(st.integers(0, n_experts - 1), min_size=1, max_size=at_most),
                    min_size=1, max_size=30)


def reference(tokens, slots, score):
    """Hits of a cache that keeps the step's experts and the best of the others, by plain sets."""
    cache, hits, used = set(), 0, []
    for now in tokens:
        hits += len(cache & now)
        used.append(now)
        others = sorted(cache - now, key=lambda e: score(e, used), reverse=True)
        cache = now | set(others[: max(0, slots - len(now))])
    return hits


def last_use(expert, used):
    return max(t for t, now in enumerate(used) if expert in now)


@settings(deadline=None)
@given(sets(7, 3), st.integers(3, 7))
def test_lru_is_what_sets_say(tokens, slots):
    # Of several experts with the same last use any may go: give each step one new expert.
    tokens = [{sorted(now)[0]} for now in tokens]
    found = replay(LRU(n_layers=1, n_experts=7, slots=slots), masks(tokens, 7))
    assert found.hits.sum() == reference(tokens, slots, last_use)
    assert found.uses.sum() == len(tokens)


@settings(deadline=None)
@given(sets(6, 1), st.integers(1, 6), st.sampled_from([0.5, 0.95]))
def test_frequency_is_what_sets_say(tokens, slots, decay):
    def count(expert, used):
        return Counter(itertools.chain(*used))[expert], -expert

    def forgetting(expert, used):
        return sum(decay ** (len(used) - 1 - t) for t, now in enumerate(used) if expert in now)

    steps = masks(tokens, 6)
    found = replay(DecayedLFU(n_layers=1, n_experts=6, slots=slots, decay=decay), steps)
    assert found.hits.sum() == reference(tokens, slots, forgetting)
    # Equal counts are broken in any way, so that only bounds hold in general.
    counted = replay(LFU(n_layers=1, n_experts=6, slots=slots), steps)
    best = replay(Belady(future=steps, slots=slots), steps)
    assert counted.hits.sum() <= best.hits.sum()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sets(st.integers(0, 3), min_size=1, max_size=2), min_size=1, max_size=6),
       st.integers(0, 3))
def test_belady_with_bypass_is_the_optimum(tokens, slots):
    """Against every choice of what to keep after every step."""
    reachable = {frozenset(): 0}
    for now in tokens:
        after = {}
        for cache, hits in reachable.items():
            for size in range(slots + 1):
                for kept in itertools.combinations(cache | now, size):
                    key = frozenset(kept)
                    after[key] = max(after.get(key, 0), hits + len(cache & now))
        reachable = after
    steps = masks(tokens, 4)
    found = replay(Belady(future=steps, slots=slots), steps)
    assert found.hits.sum() == max(reachable.values())


@pytest.mark.parametrize("make", [
    lambda steps: LRU(n_layers=3, n_experts=8, slots=3),
    lambda steps: LFU(n_layers=3, n_experts=8, slots=3),
    lambda steps: DecayedLFU(n_layers=3, n_experts=8, slots=3),
    lambda steps: Belady(future=steps, slots=3),
])
def test_layer_by_layer_and_all_at_once_are_the_same(make):
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 3, (40, 3, 8)) * (rng.random((40, 3, 8)) < 0.3)
    whole, single = make(steps), make(steps)
    for uses in steps:
        hits = whole.step(uses)
        parts = [single.step(uses[layer : layer + 1], slice(layer, layer + 1))
                 for layer in range(3)]
        assert np.array_equal(hits, np.concatenate(parts))
        assert np.array_equal(whole.resident, single.resident)
        assert (whole.resident.sum(1) <= 3).all()
    assert whole.resident.any()


def test_more_experts_in_a_step_than_slots():
    policy = LFU(n_layers=1, n_experts=8, slots=2)
    policy.step(np.array([[1, 1, 0, 0, 0, 0, 0, 0]]))
    policy.step(np.array([[0, 9, 1, 7, 0, 1, 0, 0]]))
    assert np.flatnonzero(policy.resident[0]).tolist() == [1, 3]


def test_admissions_are_what_has_to_be_moved():
    steps = masks([{0}, {1}, {0}, {2}], 4)
    assert replay(LRU(n_layers=1, n_experts=4, slots=1), steps).admissions.tolist() == [4]
    assert replay(Belady(future=steps, slots=1), steps).admissions.tolist() == [2]
    assert replay(Pinned(popularity=np.array([[0, 0, 5, 1]]), slots=1), steps).hits.tolist() == [1]


def test_nothing_to_hit():
    assert replay(LRU(n_layers=1, n_experts=4, slots=0), masks([{0}, {0}], 4)).hit_rate == 0
    assert replay(LRU(n_layers=1, n_experts=4, slots=2), []).hit_rate == 0
    assert replay(LRU(n_layers=1, n_experts=4, slots=4), masks([{0}, {0}], 4)).hit_rate == 0.5


def test_what_is_out_of_range_is_named():
    with pytest.raises(InvalidOption, match="slots must be 0 to the 4 experts of a layer, not 5"):
        LRU(n_layers=1, n_experts=4, slots=5)
    with pytest.raises(InvalidOption, match="must have layers and experts, not 0 and 4"):
        LFU(n_layers=0, n_experts=4, slots=1)
    with pytest.raises(InvalidOption, match=r"decay must be 0 to 1, not 1\.5"):
        DecayedLFU(n_layers=1, n_experts=4, slots=1, decay=1.5)
    with pytest.raises(InvalidOption, match="must have a step"):
        Belady(future=[], slots=1)
    policy = Belady(future=masks([{0}, {1}], 4), slots=1)
    policy.step(masks([{0}], 4)[0])
    with pytest.raises(InvalidOption, match="step 1 uses other experts"):
        policy.step(masks([{2}], 4)[0])
