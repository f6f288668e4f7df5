"""No bit depends on the batch, on any order, on how a call is cut, or on the configuration."""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.formats import FORMATS
from moeaccel.host import open_device
from moeaccel.sim import MemoryModel
from tests.support.pair import MEMORY_BYTES, assert_same_bits, batches, draw_experts, read_layer

EXPERTS, TOKENS, TOP_K, D_MODEL = 6, 40, 3, 96


@pytest.fixture(scope="module")
def weights():
    return draw_experts(np.random.default_rng(0), EXPERTS, D_MODEL, 64, spread=3)


@pytest.fixture(scope="module")
def call():
    """Tokens at experts of uneven popularity, some of them at no valid one."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((TOKENS, D_MODEL), np.float32)
    ids = (EXPERTS * rng.random((TOKENS, TOP_K)) ** 2).astype(np.int64)
    ids[rng.random(ids.shape) < 0.1] = -1
    return x, ids, rng.standard_normal((TOKENS, TOP_K)).astype(np.float32)


@pytest.fixture(scope="module", params=[("tiny", 16), ("tiny", 8), ("small", 16)],
                ids=lambda p: f"{p[0]}-a{p[1]}")
def experts(request, pair_of, weights):
    """Experts on the RTL with a memory that answers out of order."""
    config, bits = request.param
    with pair_of(config, memory=MemoryModel.random(17, size=MEMORY_BYTES)) as pair:
        yield pair.rtl.load_experts(*weights, activation_bits=bits)
        pair.simulation.check()


@pytest.fixture(scope="module")
def whole(experts, call):
    y = experts(*call)
    assert experts.last.commands == 1
    return y


@pytest.mark.parametrize("most", [1, 2, 7, 39])
def test_batches(experts, call, whole, most):
    handles = [experts.submit(*(array[rows] for array in call)) for rows in batches(TOKENS, most)
               ] if most > 2 else None
    if handles is None:
        parts = [experts(*(array[rows] for array in call)) for rows in batches(TOKENS, most)]
    else:
        parts = [experts.sync(handle) for handle in handles]
    assert_same_bits(np.concatenate(parts), whole)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_tokens(experts, call, whole, seed):
    order = np.random.default_rng(seed).permutation(TOKENS)
    assert_same_bits(experts(*(array[order] for array in call)), whole[order])


@pytest.mark.parametrize("seed", range(3))
def test_order_of_a_tokens_experts(experts, call, whole, seed):
    x, ids, scores = call
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random(ids.shape), axis=1)
    assert_same_bits(experts(x, np.take_along_axis(ids, order, 1),
                             np.take_along_axis(scores, order, 1)), whole)


def test_a_token_may_name_an_expert_twice(experts, call):
    """Alone, where experts are handed out before that is known, and with others."""
    x, ids, scores = (array[:8] for array in call)
    twice = ids[:, [0, 1, 0, 2, 2, 1]], np.hstack([scores, scores[:, ::-1] * 3])
    y = experts(x, *twice)
    for token in range(len(x)):
        rows = slice(token, token + 1)
        assert_same_bits(experts(x[rows], *(array[rows] for array in twice)), y[rows])


def test_order_of_the_layers_experts(experts, call, whole, weights):
    """The device walks over experts by number; with other numbers it walks in another order."""
    x, ids, scores = call
    order = np.random.default_rng(2).permutation(EXPERTS)
    number = np.append(np.argsort(order), -1)
    device = experts.device
    bits = 8 * read_layer(device, experts)[0]["planes"]
    with device.load_experts(*(w[order] for w in weights), activation_bits=bits) as other:
        assert_same_bits(other(x, number[ids], scores), whole)


def test_other_tokens_do_not_matter(experts, call, whole):
    """A token's bits stay when all others change, also when those share its passes."""
    x, ids, scores = call
    rng = np.random.default_rng(4)
    kept = rng.random(TOKENS) < 0.3
    x, ids, scores = x.copy(), ids.copy(), scores.copy()
    x[~kept] *= np.exp2(rng.integers(-30, 4, (np.sum(~kept), 1))).astype(np.float32)
    ids[~kept] = rng.integers(-1, EXPERTS, (np.sum(~kept), TOP_K))
    assert_same_bits(experts(x, ids, scores)[kept], whole[kept])


def test_slots_that_count_for_nothing(experts, call, whole):
    """Invalid ids and weights of zero add nothing, wherever they stand."""
    x, ids, scores = call
    rng = np.random.default_rng(5)
    more = rng.integers(0, EXPERTS, (TOKENS, 2))
    nothing = np.zeros((TOKENS, 2), np.float32)
    assert_same_bits(experts(x, np.hstack([more, ids]), np.hstack([nothing, scores])), whole)
    assert_same_bits(experts(x, np.hstack([ids, more + EXPERTS]),
                             np.hstack([scores, nothing + 1])), whole)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_configurations(pair_of, weights, call, name, bits):
    """Other ports, lanes, groups and tiles: the same bits."""
    results = {}
    for config in ("tiny", "small"):
        with pair_of(config, memory=MemoryModel.random(3, size=MEMORY_BYTES)) as pair:
            results[config] = pair.rtl.load_experts(
                *weights, weight_format=name, activation_bits=bits)(*call)
    for config in PRESETS:
        with open_device("golden", config=config, memory_bytes=MEMORY_BYTES) as device:
            results[f"golden {config}"] = device.load_experts(
                *weights, weight_format=name, activation_bits=bits)(*call)
    first = results.pop("tiny")
    assert first.any(axis=1).sum() > TOKENS // 2
    for y in results.values():
        assert_same_bits(y, first)
