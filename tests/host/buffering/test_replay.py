"""Traces through the buffer, and cycles beside those of the cycle model."""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.cycles import predict_experts
from moeaccel.formats import weight_format
from moeaccel.host.buffering import PREDICTIONS, Call, prediction, replay
from moeaccel.host.errors import InvalidOption
from moeaccel.host.traces import RoutingTrace
from moeaccel.image import ExpertShape

CONFIG = PRESETS["peer256"]
SHAPE = ExpertShape(weight_format("int4_g32"), 1024, 512, CONFIG.row_multipliers)
CALL = Call(CONFIG, SHAPE, planes=2)
LAYERS, EXPERTS, TOP_K = 4, 8, 2


def trace_of(ids):
    """Return a trace of one request; its first token is the prompt."""
    return RoutingTrace.of_requests([(np.asarray(ids), None)], n_experts=EXPERTS)


def cyclic(tokens):
    """Paths that repeat: a token's first expert says all others, and that of the next token."""
    first = np.arange(tokens)[:, None] % EXPERTS
    ids = (first + 3 * np.arange(LAYERS)) % EXPERTS
    return np.stack([ids, (ids + 1) % EXPERTS], axis=2)


@pytest.mark.parametrize("gap", [0, 1000, 200_000])
def test_an_oracle_is_always_right_and_wastes_nothing(gap):
    found = replay(trace_of(cyclic(20)), CALL, slots=2, gap=gap,
                   prediction=PREDICTIONS["oracle"])
    calls, uses = 19 * LAYERS, 19 * LAYERS * TOP_K
    assert found.calls == calls and found.counts.uses == uses
    assert found.accuracy == 1 and found.counts.wasted_bytes == 0
    if gap == 200_000:
        assert found.counts.hits == uses - TOP_K  # the first call was not foreseen
        assert found.counts.hit_bytes == found.counts.fetched_bytes == (
            found.counts.hits * CALL.image_bytes)
    if not gap:
        assert found.counts.misses == uses and found.speedup == 1


@pytest.mark.parametrize("empty", range(LAYERS))
def test_a_layer_without_tokens_is_no_call_and_shifts_nothing(empty):
    """What is told to an oracle is of the layer behind, none; passes begin with their first call.
    """
    ids = cyclic(20)
    ids[5:15, empty] = -1
    told = []

    class Watching(PREDICTIONS["oracle"]):
        def begin_pass(self, *, new_request):
            told.append(new_request)

        def following(self, layer, uses, truth):
            guess = super().following(layer, uses, truth)
            if truth is not None:
                at = len(told) - (layer + 1 < LAYERS)
                expected = ids[1 + at, (layer + 1) % LAYERS]
                assert set(guess.tolist()) == set(expected[expected >= 0].tolist())
            return guess

    found = replay(trace_of(ids), CALL, slots=2, gap=200_000, prediction=Watching)
    assert told == [True] + [False] * 18
    assert found.calls == 19 * LAYERS - 10 and found.counts.wasted_bytes == 0
    assert found.accuracy == 1
    assert found.counts.misses == TOP_K * (1 + 10)  # the first call, and those behind none


def test_guesses_for_a_layer_without_tokens_are_wrong():
    """Also where they are those of the layer behind it."""
    ids = np.tile([0, 1], (10, LAYERS, 1))
    ids[5:, 1] = -1
    found = replay(trace_of(ids), CALL, slots=2, gap=200_000,
                   prediction=PREDICTIONS["previous-token"])
    assert found.calls == 9 * LAYERS - 5
    # Nothing is known of what follows the first three calls, and nothing follows the last.
    assert found.guessed == (found.calls - 4) * TOP_K
    assert found.right == found.guessed - 5 * TOP_K


def test_paths_that_repeat_are_learnt_around_the_ring():
    """The table that ends at the last layer misses the first ones."""
    ids = cyclic(100)
    found = {name: replay(trace_of(ids), CALL, slots=2, gap=200_000, prediction=each)
             for name, each in PREDICTIONS.items()}
    assert found["circular"].accuracy > 0.95
    assert found["circular"].hit_rate > found["transition-table"].hit_rate + 0.2
    assert found["previous-token"].hit_rate < 0.6 and found["popularity"].hit_rate < 0.6
    assert found["oracle"].speedup >= found["circular"].speedup > 1.4


def test_without_a_prediction_what_was_used_stays():
    ids = np.tile(cyclic(1), (10, 1, 1))
    assert replay(trace_of(ids), CALL, slots=LAYERS * TOP_K).counts.misses == LAYERS * TOP_K
    assert replay(trace_of(ids), CALL, slots=LAYERS * TOP_K - 1).counts.hits == 0  # a sweep
    assert replay(trace_of(ids), CALL, slots=0).speedup == 1


def test_cycles_are_those_of_the_cycle_model():
    """Without hits: the call. With nothing but hits: that of a memory that brings a word a cycle,
    but for the first word's way."""
    ids = np.array([[0, 1]])
    alone = predict_experts(CONFIG, [SHAPE] * 2, ids, 2, planes=2).cycles
    assert CALL.cycles(np.array([1, 0, 1])) == alone
    memory = CONFIG.replace(port_bytes=CONFIG.word_bytes, quantiser_lanes=CONFIG.word_bytes // 8)
    wide = predict_experts(memory, [SHAPE] * 2, ids, 2, planes=2).cycles
    saved = 2 * CALL.saved(CALL.image_bytes, 1)
    assert abs(alone - saved - wide) < 0.03 * alone
    # Eight tokens in two lanes, two planes: the array takes as long as memory does.
    assert CALL.saved(CALL.image_bytes, 16) == 0


def test_what_is_wrong_is_named():
    with pytest.raises(InvalidOption, match="gap must be at least 0 cycles, not -1"):
        replay(trace_of(cyclic(4)), CALL, slots=1, gap=-1)
    with pytest.raises(InvalidOption, match="must have decode tokens"):
        replay(trace_of(cyclic(1)), CALL, slots=1)
    with pytest.raises(ValueError, match="circular"):
        prediction("flame")
