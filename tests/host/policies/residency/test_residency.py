import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.errors import UnknownPolicy
from moeaccel.host.policies.residency import (
    LFU,
    LRU,
    MRS,
    RESIDENCIES,
    ActivationAware,
    Belady,
    DecayedLFU,
    LeastStale,
    Pinned,
    PrefillGuided,
    Promoted,
    SecondMiss,
    replay,
    residency,
)


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
    lambda steps, **size: LRU(**size),
    lambda steps, **size: LFU(**size),
    lambda steps, **size: DecayedLFU(**size),
    lambda steps, **size: MRS(**size),
    lambda steps, **size: ActivationAware(**size),
    lambda steps, **size: Promoted(**size),
    lambda steps, **size: Belady(future=steps, slots=size["slots"]),
])
def test_layers_know_nothing_of_each_other(make):
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 3, (40, 3, 8)) * (rng.random((40, 3, 8)) < 0.3)
    whole = make(steps, n_layers=3, n_experts=8, slots=[3, 1, 8])
    single = [make(steps[:, l : l + 1], n_layers=1, n_experts=8, slots=[3, 1, 8][l])
              for l in range(3)]
    for uses in steps:
        hits = whole.step(uses)
        assert np.array_equal(hits, np.concatenate([
            policy.step(uses[l : l + 1]) for l, policy in enumerate(single)]))
        assert np.array_equal(whole.resident, np.concatenate([p.resident for p in single]))
        assert (whole.resident.sum(1) <= [3, 1, 8]).all()
    assert whole.resident.any(1).all()


def test_more_experts_in_a_step_than_slots():
    policy = LFU(n_layers=1, n_experts=8, slots=2)
    policy.step(np.array([[1, 1, 0, 0, 0, 0, 0, 0]]))
    policy.step(np.array([[0, 9, 1, 7, 0, 1, 0, 0]]))
    assert np.flatnonzero(policy.resident[0]).tolist() == [1, 3]


def test_admissions_are_what_has_to_be_moved():
    steps = masks([{0}, {1}, {0}, {2}], 4)
    assert replay(LRU(n_layers=1, n_experts=4, slots=1), steps).admissions.tolist() == [4]
    assert replay(Belady(future=steps, slots=1), steps).admissions.tolist() == [1]
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
    with pytest.raises(InvalidOption, match="one for each of 2 layers, not 3"):
        LRU(n_layers=2, n_experts=4, slots=[1, 1, 1])
    with pytest.raises(InvalidOption, match=r"margin must be at least 1, not 0\.5"):
        Promoted(n_layers=1, n_experts=4, slots=1, margin=0.5)
    with pytest.raises(InvalidOption, match="rate must be above 0"):
        MRS(n_layers=1, n_experts=4, slots=1, rate=0)
    with pytest.raises(UnknownPolicy, match=r"residency must be one of .*did you mean lfu"):
        residency("lfuu")
    policy = Belady(future=masks([{0}, {1}], 4), slots=1)
    policy.step(masks([{0}], 4)[0])
    with pytest.raises(InvalidOption, match="step 1 uses other experts"):
        policy.step(masks([{2}], 4)[0])


def uses(*experts, size=8):
    found = np.zeros(size, np.int64)
    for expert in experts:
        found[expert] += 1
    return found


def test_every_policy_has_a_name_of_its_own():
    assert {"lru", "lfu", "decayed-lfu", "mrs", "activation-aware", "least-stale", "belady",
    "pinned",
            "prefill-guided", "promoted", "everything"} == set(RESIDENCIES)
    assert residency("mrs") is MRS


@pytest.mark.parametrize("make", [LRU, LFU, MRS, DecayedLFU])
def test_what_a_step_used_stays_until_the_next_one(make):
    """With as many slots as a step uses, all policies are one, however long it goes on."""
    rng = np.random.default_rng(3)
    steps, now = np.zeros((3000, 1, 16), np.int64), rng.permutation(16)[:4]
    for step in steps:
        others = rng.permutation(np.setdiff1d(np.arange(16), now))[:4]
        now = np.where(rng.random(4) < 0.5, now, others)
        step[0, now] = 1
    policy = make(n_layers=1, n_experts=16, slots=4)
    kept = steps[1:].astype(bool) & steps[:-1].astype(bool)
    assert replay(policy, steps).hits.sum() == kept.sum()


def test_decayed_scores_stay_finite_and_ordered():
    policy = DecayedLFU(n_layers=1, n_experts=4, slots=2, decay=0.5)
    plain = np.zeros(4)
    rng = np.random.default_rng(1)
    for _ in range(400):  # 2^400 is beyond where scores are divided
        now = rng.integers(0, 3, 4) * (rng.random(4) < 0.5)
        policy.use(0, now)
        plain = plain * 0.5 + now
        assert np.isfinite(policy.score).all()
        assert np.allclose(policy.score[0] / policy.score[0].sum(), plain / plain.sum())


def test_minus_recent_score_is_of_weights():
    policy = MRS(n_layers=1, n_experts=4, slots=1)
    policy.use(0, uses(0, 1, size=4), mass=np.array([0.1, 0.9, 0, 0]))
    assert np.flatnonzero(policy.resident[0]).tolist() == [1]
    assert policy.score[0].tolist() == pytest.approx([0.05, 0.45, 0, 0])


def test_activation_matrix_ends_with_its_request():
    policy = ActivationAware(n_layers=1, n_experts=8, slots=2)
    for _ in range(3):
        policy.use(0, uses(0))
    policy.begin_request()
    policy.use(0, uses(1))
    policy.use(0, uses(2))  # 0 was used most, but not by this request
    assert np.flatnonzero(policy.resident[0]).tolist() == [1, 2]


def test_only_what_did_not_come_anyway_has_to_be_moved():
    policy = LRU(n_layers=1, n_experts=8, slots=4)
    arrived = np.array([2])
    assert sorted(policy.use(0, uses(1, 2, 3), arrived=arrived).tolist()) == [1, 3]
    assert policy.use(0, uses(1, 2, 3), arrived=arrived).tolist() == []


def test_promotions_keep_within_their_room():
    policy = DecayedLFU(n_layers=1, n_experts=8, slots=6)
    nothing = np.array([], int)
    moved = policy.use(0, uses(1, 2, 2, 3, 3, 3), arrived=nothing, room=2)
    assert sorted(moved.tolist()) == [2, 3] == np.flatnonzero(policy.resident[0]).tolist()
    assert policy.use(0, uses(5), arrived=nothing, room=0).tolist() == []


def test_newcomers_of_promoted_must_be_better_by_the_margin():
    nothing = np.array([], int)
    policy = Promoted(n_layers=1, n_experts=8, slots=1, margin=2.0, decay=1.0)
    policy.use(0, uses(1, 1), arrived=nothing)
    assert policy.use(0, uses(2, 2, 2, 2), arrived=nothing).tolist() == []  # twice is not more
    assert policy.use(0, uses(2), arrived=nothing).tolist() == [2]
    assert np.flatnonzero(policy.resident[0]).tolist() == [2]


def test_a_prompt_does_not_outweigh_everything():
    policy = Promoted(n_layers=1, n_experts=4, slots=1, prompt=4.0, decay=1.0, margin=1.0)
    policy.use(0, np.array([1000, 500, 0, 0]))
    for _ in range(5):
        policy.use(0, uses(3, size=4))
    assert np.flatnonzero(policy.resident[0]).tolist() == [3]


def test_promoted_begins_with_a_profile_and_leaves_it():
    policy = Promoted(n_layers=1, n_experts=4, slots=2, popularity=np.array([[9, 5, 1, 0]]))
    assert policy.resident[0].tolist() == [True, True, False, False]
    nothing = np.array([], int)
    for _ in range(20):
        policy.use(0, uses(2, 3, size=4), arrived=nothing)
    assert policy.resident[0].tolist() == [False, False, True, True]


def test_prefill_guided_moves_behind_prompts_only():
    policy = PrefillGuided(n_layers=1, n_experts=8, slots=2, tokens=8)
    policy.use(0, uses(0, 0, 0, 0, 1, 1, 1, 2, 2, 3))
    assert np.flatnonzero(policy.resident[0]).tolist() == [0, 1]
    policy.use(0, uses(5))
    assert np.flatnonzero(policy.resident[0]).tolist() == [0, 1]
    # 6 has more than 1.05 times what 1 has, 7 not what 0 has.
    policy.use(0, np.array([100, 90, 0, 0, 0, 0, 95, 80]))
    assert np.flatnonzero(policy.resident[0]).tolist() == [0, 6]


def test_second_miss_within_some_calls():
    admission = SecondMiss(n_layers=1, n_experts=8, within=2, at_most=1)
    policy = LRU(n_layers=1, n_experts=8, slots=4, admission=admission)
    policy.use(0, uses(1, 2))
    assert not policy.resident.any()
    policy.use(0, uses(1, 2))  # again, but one at a time
    assert np.flatnonzero(policy.resident[0]).tolist() == [1]
    for _ in range(3):
        policy.use(0, uses(1))
    policy.use(0, uses(2))  # too long ago
    assert np.flatnonzero(policy.resident[0]).tolist() == [1]
    with pytest.raises(InvalidOption, match="at_most at least 1, not 64 and 0"):
        SecondMiss(n_layers=1, n_experts=8, at_most=0)


def test_least_stale_keeps_what_the_sweep_comes_to_next():
    """Sweeps over more layers than the pool holds: LRU over one pool would hit nothing."""
    policy = LeastStale(n_layers=4, n_experts=2, slots=[2, 1, 0, 0])
    hits = []
    for _ in range(6):
        for layer in range(4):
            hits.append(bool(policy.resident[layer, 0]))
            policy.use(layer, uses(0, size=2))
            assert policy.resident.sum() <= 3
    assert sum(hits[8:]) >= 8  # of 16; two of the four layers in every sweep


def test_least_stale_evicts_what_the_pass_has_left_behind():
    policy = LeastStale(n_layers=2, n_experts=4, slots=[1, 1])
    policy.use(0, uses(0, size=4))
    policy.use(1, uses(1, size=4))
    policy.use(0, uses(2, size=4))  # 0 was not used in this pass; 1 may be, in the next layer
    assert policy.resident.tolist() == [[False, False, True, False], [False, True, False, False]]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sets(st.integers(0, 5), max_size=3), min_size=3, max_size=3),
                min_size=1, max_size=12), st.integers(0, 7))
def test_least_stale_holds_what_it_says(passes, room):
    policy = LeastStale(n_layers=3, n_experts=6, slots=[min(room, 6), max(0, room - 6), 0])
    for one in passes:
        for layer, now in enumerate(one):
            policy.use(layer, uses(*now, size=6))
            held = [set(np.flatnonzero(row).tolist()) for row in policy.resident]
            assert sum(map(len, held)) == policy._count <= room


def test_pinned_and_slots_for_each_layer():
    policy = Pinned(popularity=np.array([[3, 2, 1], [1, 2, 3]]), slots=[1, 2])
    assert policy.resident.tolist() == [[True, False, False], [False, True, True]]
    policy.use(0, np.array([0, 9, 9]))
    assert policy.resident[0].tolist() == [True, False, False]
