"""The router's bits against float routers, flavour by flavour."""

import numpy as np
import pytest
import torch

from moeaccel.golden.router import NONE, route, within_capacity
from moeaccel.golden.router_reference import route_float, scores_float
from moeaccel.router.flavours import FLAVOURS
from moeaccel.router.settings import RouterError, RouterSettings

RESOLUTION = 2.0**-18
"""What keys of different order may differ by at most: stated in docs/routing.md."""

SHAPES = {"R4": (160, 6), "R5": (256, 8), "R5s": (384, 8), "R7": (256, 6), "R8": (768, 12),
          "R9": (16, 2), "R10": (32, 2), "R11n": (128, 2), "R11o": (32, 2), "R11s": (128, 1),
          "R6L4": (16, 1), "R3": (40, 8), "R1b": (64, 6), "R1g": (128, 4), "R6": (256, 6)}


def drawn(rng, tokens, experts, k=256, *, bf16=True):
    """Return logits of drawn x and router weights, exactly, and what they were drawn from."""
    x = torch.from_numpy(rng.standard_normal((tokens, k)))
    w = torch.from_numpy(rng.standard_normal((experts, k)) / np.sqrt(k))
    if bf16:
        x, w = x.bfloat16().double(), w.bfloat16().double()
    return x, w


def differences(ids, reference):
    """Return the tokens whose sets of experts differ."""
    return np.nonzero((np.sort(ids, 1) != np.sort(reference, 1)).any(1))[0]


def is_tie(token, ids, reference, exact, resolution=RESOLUTION):
    """Return whether the keys, in float64, of what only one has chosen are as good as equal."""
    only = set(ids[token].tolist()) ^ set(reference[token].tolist())
    keys = exact[token, [e for e in only if e >= 0]]
    return keys.max() - keys.min() <= resolution


def selection_bias_of(rng, flavour, experts):
    return (rng.standard_normal(experts) * 0.05).astype(np.float32) if (
        flavour.selection_bias) else None


def as_tensors(**tables):
    return {name: None if table is None else torch.from_numpy(table)
            for name, table in tables.items()}


def changes_of(key, tokens):
    """Return what a call of the flavour has that its family has not."""
    return {"R11s": {"capacity": 64},
            "R11o": {"capacity": max(4, int(2 * 2.0 * tokens / 32))}}.get(key, {})


@pytest.mark.parametrize("key", FLAVOURS)
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_flavour_equals_its_float_router(key, spread):
    rng = np.random.default_rng(len(key))
    flavour = FLAVOURS[key]
    experts, top_k = SHAPES.get(key, (64, 8))
    tokens = 400
    settings = flavour.router(experts, top_k, **changes_of(key, tokens))
    logits = (rng.standard_normal((tokens, experts)) * spread).astype(np.float32)
    if settings.capacity is not None:
        logits[:, 0] += 2 * spread  # an expert that many want
    tables = {"selection_bias": selection_bias_of(rng, flavour, experts),
              "bias": rng.standard_normal(experts).astype(np.float32) if key == "R3" else None}
    got = route(logits, settings, **tables)
    # In float64, so that only the device's own roundings are seen.
    ids, weights = route_float(
        torch.from_numpy(logits).double(), settings, **as_tensors(**tables))
    ids, weights = ids.numpy(), weights.numpy()
    same = (got.ids == ids).all(1)
    assert same.mean() > 0.99
    assert got.weights.dtype == np.float32
    np.testing.assert_allclose(got.weights[same], weights[same], rtol=2.0**-16, atol=2.0**-30)
    assert not got.nonfinite_tokens
    assert got.saturated == 0
    if settings.capacity is not None:
        assert (got.ids == NONE).any()  # the capacity is felt
    if key == "R9":
        assert weights.sum(1).max() > 1.9  # the two weights are no softmax of both


@pytest.mark.parametrize(("key", "experts", "top_k"), [
    ("R2", 64, 8), ("R5", 256, 8), ("R1", 512, 10), ("R8", 384, 12), ("R7", 256, 6), ("R1", 8, 2)])
def test_selection_is_that_of_float32(key, experts, top_k):
    check_selection(key, experts, top_k, 3000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("key", "experts", "top_k"), [
    ("R2", 64, 8), ("R5", 256, 8), ("R1", 512, 10), ("R8", 512, 12), ("R7", 256, 6), ("R4", 160, 6),
    ("R1b", 64, 6), ("R1", 8, 2)])
def test_selection_of_many_tokens_is_that_of_float32(key, experts, top_k):
    check_selection(key, experts, top_k, 100_000)


def check_selection(key, experts, top_k, tokens):
    rng = np.random.default_rng(experts)
    flavour = FLAVOURS[key]
    settings = flavour.router(experts, top_k)
    extra = selection_bias_of(rng, flavour, experts)
    different = 0
    for start in range(0, tokens, 10_000):
        x, w = drawn(rng, min(10_000, tokens - start), experts)
        exact = x @ w.T
        ids = route(exact.float().numpy(), settings, selection_bias=extra).ids
        reference, _ = route_float(x.float() @ w.float().T, settings,
                                   **as_tensors(selection_bias=extra))
        reference = reference.numpy()
        keys = keys_of(exact, settings, extra)
        for token in differences(ids, reference):
            different += 1
            if not settings.grouped:
                assert is_tie(token, ids, reference, keys)
    assert different <= 0.001 * tokens


def keys_of(exact, settings, extra):
    """Return the keys in float64."""
    return exact.numpy() if extra is None else scores_float(exact, settings).numpy() + extra


def test_lowest_index_wins_ties():
    logits = np.zeros((1, 64), np.float32)
    logits[0, [9, 40, 41]] = 1
    for key in FLAVOURS:
        flavour = FLAVOURS[key]
        k = 2 if key in ("R9",) else 4
        got = route(logits, flavour.router(64, k, **({"groups": 1, "keep_groups": 1}
                                                    if flavour.settings.get("groups") else {})))
        assert got.ids[0].tolist() == [9, 40, 41, 0][:k], key


def test_ties_of_groups_go_to_the_lowest_group():
    settings = RouterSettings(experts=16, top_k=4, groups=4, keep_groups=2)
    assert route(np.zeros((1, 16), np.float32), settings).ids[0].tolist() == [0, 1, 2, 3]


def test_nonfinite_logits_are_named():
    logits = np.zeros((5, 8), np.float32)
    logits[1, 3], logits[4, 0], logits[2, 2] = np.nan, np.inf, 5000
    got = route(logits, RouterSettings(experts=8, top_k=2))
    assert got.nonfinite_tokens == [1, 4]
    assert got.saturated == 1
    assert np.isfinite(got.weights).all()
    assert 3 not in got.ids[1]


def test_weights_of_given_ids():
    """Hash layers of DeepSeek-V4: experts by a table, weights by scores."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((50, 256)).astype(np.float32)
    settings = FLAVOURS["R7"].router(256, 6)
    ids = rng.permuted(np.tile(np.arange(256), (50, 1)), axis=1)[:, :6]
    ids[3, 2] = -1
    got = route(logits, settings, ids=ids)
    reference, weights = route_float(torch.from_numpy(logits).double(), settings,
                                     ids=torch.from_numpy(ids))
    assert (got.ids == reference.numpy()).all()
    np.testing.assert_allclose(got.weights, weights.numpy(), rtol=2.0**-16)
    with pytest.raises(RouterError, match=r"ids must be \(50, 6\), not \(50, 5\)"):
        route(logits, settings, ids=ids[:, :5])


@pytest.mark.parametrize("changes", [
    {"threshold": 0.4}, {"threshold": 0.7, "renormalize": "sum"}, {"top_p": 0.6},
    {"top_p": 0.8, "renormalize": "softmax_top_k"}, {"score": "sigmoid", "threshold": 0.9},
    {"prior": 0.7}, {"prior": 2.0, "prior_keep": 1}, {"resident": True},
    {"resident": True, "groups": 4, "keep_groups": 2}, {"resident": True, "renormalize": "sum"},
    {"capacity": 12}, {"capacity": 12, "capacity_order": "priority"},
    {"capacity": 12, "renormalize": "clamp", "epsilon": 1e-7}, {"bias_logits": True},
    {"score": "identity", "scale": 0.5},
], ids=str)
def test_modes_equal_their_float_router(changes):
    rng = np.random.default_rng(5)
    wanted = changes.pop("resident", "prior" in changes)
    settings = RouterSettings(experts=32, top_k=4, **changes)
    logits = rng.standard_normal((200, 32)).astype(np.float32)
    resident = rng.random(32) < 0.4 if wanted else None
    extra = rng.standard_normal(32).astype(np.float32) if settings.bias_logits else None
    got = route(logits, settings, resident=resident, selection_bias=extra)
    ids, weights = route_float(torch.from_numpy(logits).double(), settings,
                               **as_tensors(resident=resident, selection_bias=extra))
    assert (got.ids == ids.numpy()).all()
    np.testing.assert_allclose(got.weights, weights.numpy(), rtol=2.0**-16)
    plain = route(logits, RouterSettings(experts=32, top_k=4, score=settings.score))
    assert settings.score == "identity" or (got.ids != plain.ids).any()  # the mode does something


def test_residents_that_are_too_few_leave_slots_empty():
    resident = np.arange(16) == 5
    got = route(np.zeros((1, 16), np.float32), RouterSettings(experts=16, top_k=3),
                resident=resident)
    assert got.ids[0].tolist() == [5, NONE, NONE]
    assert got.weights[0, 1:].tolist() == [0, 0]


def test_capacity_is_by_rank_then_token():
    ids = np.array([[0, 1], [1, 0], [0, 2]])
    assert within_capacity(ids, 1).tolist() == [[True, False], [True, False], [False, True]]
    first = np.array([1, 2, 3])
    assert within_capacity(ids, 1, first).tolist() == [[False, False], [True, False], [True, True]]


def test_sums_of_nothing_give_weights_of_zero():
    logits = np.full((1, 8), -60, np.float32)
    got = route(logits, RouterSettings(experts=8, top_k=2, score="sigmoid", renormalize="sum"))
    assert got.weights.tolist() == [[0, 0]]


@pytest.mark.parametrize(("tables", "text"), [
    ({"bias": np.zeros(7)}, r"bias must have shape \(8,\), not \(7,\)"),
    ({"bias": np.full(8, np.nan)}, r"bias\[0\] must be finite, not nan"),
    ({"selection_bias": np.full(8, 129.0)}, r"selection_bias\[0\] must be from -128 to 128"),
    ({"resident": np.ones(9, bool)}, r"resident must have shape \(8,\), not \(9,\)"),
])
def test_bad_tables_are_named(tables, text):
    with pytest.raises(RouterError, match=text):
        route(np.zeros((1, 8), np.float32), RouterSettings(experts=8, top_k=2), **tables)


@pytest.mark.parametrize("given", [["selection_bias"], ["resident"], ["ids"],
                                   ["selection_bias", "resident", "ids"]])
def test_what_a_sparsemixer_does_not_look_at_is_named(given):
    tables = {"selection_bias": np.zeros(8), "resident": np.ones(8, bool), "ids": [[0, 1]]}
    with pytest.raises(RouterError, match=f"^{', '.join(given)} must be None with mixer"):
        route(np.zeros((1, 8), np.float32), RouterSettings(experts=8, top_k=2, mixer=0.02),
              **{name: tables[name] for name in given})


def test_bad_logits_are_named():
    with pytest.raises(RouterError, match=r"logits must be \(tokens, 8\), not \(2, 9\)"):
        route(np.zeros((2, 9), np.float32), RouterSettings(experts=8, top_k=2))


@pytest.mark.parametrize(("biased", "inside", "beyond"), [(False, 2000, 2045), (True, 500, 511.75)])
def test_residents_beyond_the_last_key_are_equal(biased, inside, beyond):
    resident, logits = np.array([1, 1, 1, 0], bool), np.array([[5, 7, 6, 9]], np.float32)
    bias = np.zeros(4) if biased else None
    for prior, ids in ((inside, [1, 2]), (beyond, [0, 1])):
        settings = RouterSettings(experts=4, top_k=2, score="sigmoid", prior=prior)
        found = route(logits, settings, selection_bias=bias, resident=resident)
        assert found.ids.tolist() == [ids]
