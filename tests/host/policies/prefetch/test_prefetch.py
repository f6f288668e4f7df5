import numpy as np
import pytest

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.errors import UnknownPolicy
from moeaccel.host.policies.prefetch import PREFETCHES, Ahead, prefetch
from moeaccel.host.policies.prefetch.activation_match import ActivationMatch
from moeaccel.host.policies.prefetch.base import best, blurred, busiest
from moeaccel.host.policies.prefetch.gate_ahead import GateAhead
from moeaccel.host.policies.prefetch.hash_routes import HashRoutes
from moeaccel.host.policies.prefetch.look_ahead import LookAhead
from moeaccel.host.policies.prefetch.oracle import Oracle
from moeaccel.host.policies.prefetch.pre_gated import PreGated
from moeaccel.host.policies.prefetch.transition_table import TransitionTable
from moeaccel.host.traces.presets import generate

SIZE = {"n_layers": 4, "n_experts": 16, "top_k": 2}


def routes(*layers):
    uses = np.zeros((len(layers), 16), np.int64)
    for row, experts in zip(uses, layers, strict=True):
        row[list(experts)] = 1
    return uses, Ahead(lambda layer: uses[layer])


def test_best_and_blurred():
    assert best(np.array([0, 5, 2, 9])).tolist() == [3, 1, 2]
    assert best(np.array([0, 5, 2, 9]), 1).tolist() == [3]
    assert best(np.array([1.0, 2.0]), 5).tolist() == [1, 0]
    rng = np.random.default_rng(0)
    experts = busiest(np.array([0, 1, 3, 0, 2, 1]))
    assert experts.tolist() == [2, 4, 1, 5]
    same = blurred([experts, experts[:0], experts[1:]], 6, 1.0, rng)
    assert [one.tolist() for one in same] == [[2, 4, 1, 5], [], [4, 1, 5]]
    right = np.isin(np.concatenate(blurred([experts] * 500, 400, 0.7, rng)), experts).mean()
    assert right == pytest.approx(0.7, abs=0.04)


def test_gate_ahead_asks_the_next_gates():
    rng = np.random.default_rng(1)
    gates = list(rng.standard_normal((4, 16, 8)))
    policy = GateAhead(gates=gates, depth=2, **SIZE)
    hidden = rng.standard_normal((1, 8))
    first, second = policy.guess(1, np.ones(16, int), Ahead(hidden=hidden))
    assert (first.layer, second.layer) == (2, 3)
    for guess, gate in ((first, gates[2]), (second, gates[3])):
        assert set(guess.experts) == set(np.argsort(-(gate @ hidden[0]))[:2])
    assert not list(policy.guess(3, np.ones(16, int), Ahead(hidden=hidden)))


def test_gate_ahead_is_as_good_as_published_where_there_are_no_states():
    uses, ahead = routes((0, 1), (2, 3), (4, 5), (6, 7))
    policy = GateAhead(accuracy=0.8, depth=2, **SIZE)

    def guesses():
        policy.begin_pass(new_request=False)
        return policy.guess(0, uses[0], ahead)

    right = np.array([[np.isin(guess.experts, np.flatnonzero(uses[guess.layer])).mean()
                       for guess in guesses()] for _ in range(800)])
    one, two = right.mean(0)
    chance = 2 / 16
    assert one == pytest.approx(0.8 + 0.2 * chance, abs=0.03)
    assert two == pytest.approx(0.64 + 0.36 * chance, abs=0.03)
    assert not list(GateAhead(**SIZE).guess(0, uses[0], Ahead()))
    guess, = GateAhead(accuracy=1.0, most=1, **SIZE).guess(0, uses[0], ahead)
    assert guess.experts.tolist() == [2]
    with pytest.raises(InvalidOption, match="accuracy must be 0 to 1 and depth at least 1"):
        GateAhead(accuracy=2, **SIZE)


def test_transition_table_learns_who_follows_whom():
    policy = TransitionTable(**SIZE)
    rng = np.random.default_rng(2)
    for _ in range(60):
        a = int(rng.integers(0, 8))
        uses, ahead = routes((a,), (a + 8,), (15 - a,), (a,))
        policy.begin_pass(new_request=False)
        guesses = [policy.guess(layer, uses[layer], ahead) for layer in range(4)]
    assert [g[0].experts.tolist() for g in guesses[:3]] == [[a + 8], [15 - a], [a]]
    assert guesses[3] == []


def test_transition_table_guesses_the_likeliest_and_not_the_most_telling():
    policy = TransitionTable(**SIZE)
    for turn in range(100):  # 8 follows everyone; 9 nobody but 0, and seldom
        first = turn % 2
        uses, ahead = routes((first,), (9 if turn % 20 == 0 else 8,), (3,), (3,))
        policy.begin_pass(new_request=False)
        for layer in range(4):
            policy.guess(layer, uses[layer], ahead)
    uses, ahead = routes((0,), (8,), (3,), (3,))
    policy.begin_pass(new_request=False)
    guess, = policy.guess(0, uses[0], ahead)
    assert guess.experts.tolist() == [8]


def test_transition_table_has_the_recall_of_the_statistics():
    """Half of the true experts of DeepSeek-V2-Lite's next layer are among the best six."""
    trace = generate("deepseek-v2-lite", requests=6, tokens=128, seed=3)
    trace = trace.select(layers=range(8, 12))
    policy = TransitionTable(n_layers=4, n_experts=64, top_k=6)
    found = total = 0
    for index, step in enumerate(trace.steps()):
        uses = trace.counts(step.ids)
        policy.begin_pass(new_request=False)
        for layer in range(3):
            for guess in policy.guess(layer, uses[layer], Ahead()):
                if index > 400:
                    found += int((uses[layer + 1][guess.experts] > 0).sum())
                    total += int((uses[layer + 1] > 0).sum())
        policy.guess(3, uses[3], Ahead())
    assert 0.35 < found / total < 0.65  # popularity alone has 0.14


def test_activation_match_finds_the_like_request():
    policy = ActivationMatch(size=2, depth=1, **SIZE)
    kinds = [routes((0, 1), (2, 3), (4, 5), (6, 7)), routes((8, 9), (10, 11), (12, 13), (14, 15))]
    for uses, ahead in kinds:
        policy.begin_pass(new_request=True)
        for layer in range(4):
            policy.guess(layer, uses[layer], ahead)
    policy.begin_pass(new_request=True)
    guess, = policy.guess(0, kinds[1][0][0], Ahead())
    assert (guess.layer, sorted(guess.experts.tolist())) == (1, [10, 11])
    # A third kind takes the place of the one that was matched least: the first.
    uses, _ = routes((3, 4), (5, 6), (7, 8), (9, 10))
    policy.begin_pass(new_request=True)
    for layer in range(4):
        policy.guess(layer, uses[layer], Ahead())
    policy.begin_pass(new_request=True)
    assert sorted(policy.guess(0, uses[0], Ahead())[0].experts.tolist()) == [5, 6]


def test_those_that_know():
    uses, ahead = routes((0, 1), (2, 3), (4, 5), (6, 7))
    guess, = PreGated(**SIZE).guess(1, uses[1], ahead)
    assert guess.layer == 2 and sorted(guess.experts.tolist()) == [4, 5]
    assert [g.layer for g in Oracle(depth=2, **SIZE).guess(0, uses[0], ahead)] == [1, 2]
    plan = LookAhead(accuracy=1.0, depth=2, **SIZE)
    assert [g.layer for g in plan.guess(0, uses[0], ahead)] == [1, 2]
    assert [g.layer for g in plan.guess(1, uses[1], ahead)] == [3]  # 2 is on its way
    plan.begin_pass(new_request=False)
    assert [g.layer for g in plan.guess(1, uses[1], ahead)] == [2, 3]


def test_who_changes_routes():
    assert not PreGated.lossless and not HashRoutes.lossless
    assert LookAhead.lossless and GateAhead.lossless
    assert {"activation-match", "gate-ahead", "hash-routes", "look-ahead", "oracle", "pre-gated",
            "transition-table"} == set(PREFETCHES)
    with pytest.raises(UnknownPolicy, match=r"prefetch must be one of .*mean oracle"):
        prefetch("orcale")
