"""Compression passes: each formula on a case worked out by hand or by brute force, and every result
on the golden device."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.formats import QUAD, prune, weight_format
from moeaccel.host import open_device
from moeaccel.host.compress import adapmoe, eep, merging, moe_i2, moe_pruner, naee, saliency, stun
from moeaccel.host.compress.clusters import assignment, clusters
from moeaccel.host.compress.layer import FloatExpert, MoELayer, combine
from moeaccel.host.compress.mc_moe import allocate, importance
from moeaccel.host.compress.method import method, methods, report, with_formats
from moeaccel.host.compress.models import DeviceLayer
from moeaccel.host.errors import InvalidOption, InvalidTensor
from moeaccel.image import Expert, build_image, interleave_gate_up
from moeaccel.router.settings import RouterSettings

H, I, E, T = 64, 32, 6, 96


def layer_of(seed=0, top_k=2, experts=E):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
    made = [FloatExpert(draw(2 * I, H), draw(H, I)) for _ in range(experts)]
    return MoELayer.of(made, 2 * draw(experts, H), top_k)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(9).standard_normal((T, H)).astype(np.float32)


@pytest.fixture(scope="module")
def layer():
    return layer_of()


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_pass_gives_a_layer_that_the_device_runs(name, layer, x):
    layers = [layer, layer_of(1)]
    after = method(name)(layers, [x, x])
    assert len(after) == 2
    config = with_formats(PRESETS["small"], after[0].weight_formats)
    with open_device("golden", config=config) as device:
        y = DeviceLayer(device, after[0])(x[:8])
        exact = after[0](x[:8])
        # int4 weights: what the device has is the compressed layer, not the one before.
        assert np.linalg.norm(y - exact) < 0.2 * np.linalg.norm(exact)
    found = report(layers, after, [x, x], PRESETS["small"])
    assert found.device_error >= 0.9 * found.output_error
    assert (found.output_error > 0.01) == (name != "mc-moe")
    if method(name).options.get("share"):
        assert found.experts == 2 * round(0.75 * E) < found.experts_before
        assert found.stored_bytes < found.stored_bytes_before
    if name in ("naee-skip", "adapmoe"):
        assert found.experts_per_token < 2 and found.stored_bytes == found.stored_bytes_before
        assert found.decode_cycles < found.decode_cycles_before
    if method(name).options.get("pattern"):
        assert set(after[0].weight_formats) == {"int4_g32+2:4"}
        assert found.stored_bytes < 0.8 * found.stored_bytes_before
        assert found.decode_cycles < found.decode_cycles_before
    if name == "mc-moe":
        assert len(set(after[0].weight_formats)) > 1 and found.output_error == 0


def test_the_best_subset_is_the_best(layer, x):
    pruned = naee.prune(layer, x, E - 2)
    exact = layer(x)
    errors = {subset: np.linalg.norm(layer.kept(subset)(x) - exact)
              for subset in itertools.combinations(range(E), E - 2)}
    best = min(errors, key=lambda subset: errors[subset])
    assert np.flatnonzero(pruned.expert_of >= 0).tolist() == list(best)
    assert np.linalg.norm(pruned(x) - exact) == pytest.approx(errors[best])
    # The genetic search finds it, too; scores need not.
    assert np.array_equal(moe_i2.prune(layer, x, E - 2).expert_of, pruned.expert_of)
    with pytest.raises(InvalidOption, match="subsets to try must be at most"):
        naee.prune(layer_of(experts=24), x, 12)


def test_routing(layer, x):
    routing = layer.route(x)
    logits = x.astype(np.float64) @ layer.router.T
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    top = np.argsort(-probabilities, axis=1)[:, :2]
    chosen = np.take_along_axis(probabilities, top, axis=1)
    assert np.array_equal(routing.ids, top)
    assert np.allclose(routing.weights, chosen / chosen.sum(axis=1, keepdims=True))
    assert np.allclose(layer(x), combine(routing, layer.outputs(x)))
    assert replace(layer, renormalise=False).route(x).weights == pytest.approx(chosen)
    fewer = layer.kept([1, 4])
    assert set(fewer.route(x).rows.ravel().tolist()) == {1, 4}
    assert set(fewer.route(x).ids.ravel().tolist()) == {0, 1}
    assert layer.kept([3]).route(x).ids.shape == (T, 1)


def test_rows_of_a_merged_expert_add_up(layer, x):
    merged = layer.merged([[0, 1, 2], [3, 4, 5]], [layer.experts[0], layer.experts[3]])
    routing, plain = merged.route(x), layer.route(x)
    assert np.allclose(routing.weights.sum(axis=1), 1)
    share = np.where(plain.ids < 3, plain.weights, 0).sum(axis=1)
    assert np.allclose(np.where(routing.ids == 0, routing.weights, 0).sum(axis=1), share)
    both = (plain.ids < 3).all(axis=1)
    assert both.any() and (routing.ids[both, 1] == -1).all()
    with pytest.raises(InvalidOption, match="some are merged"):
        merged.router_of_device()


def test_the_device_s_router_does_the_same(layer, x):
    skipping = naee.skip(layer.kept([5, 0, 2, 3]), x)
    rows, settings = skipping.router_of_device()
    assert settings == RouterSettings(experts=4, top_k=2, renormalize="sum",
                                      threshold=skipping.threshold)
    again = MoELayer.of(skipping.experts, rows, settings.top_k)
    again = replace(again, threshold=settings.threshold)
    assert np.array_equal(again.route(x).ids, skipping.route(x).ids)
    assert np.allclose(again(x), skipping(x))


def test_skipping_thresholds(layer, x):
    found = naee.skip(layer, x)
    weights = layer.route(x).weights
    assert found.threshold == pytest.approx(np.median(weights[:, 1] / weights[:, 0]))
    assert found.route(x).used == pytest.approx(1.5, abs=0.02)  # the median: half of the tokens
    layers = adapmoe.skip([layer, layer_of(1)], [x, x], skipped=0.25)
    used = np.mean([each.route(x).used for each in layers])
    assert used == pytest.approx(1.75, abs=0.03)
    # Of the same cost H w^2 at the threshold in both layers.
    plain = [replace(each, threshold=0.0) for each in layers]
    costs = [adapmoe.sensitivity(each, x, each.route(x)) * (t / (1 + t)) ** 2
             for each, t in zip(plain, (each.threshold for each in layers), strict=True)]
    assert costs[0] == pytest.approx(costs[1])
    with pytest.raises(InvalidOption, match="top_k must be 2"):
        adapmoe.skip([layer_of(top_k=3)], [x], skipped=0.25)
    with pytest.raises(InvalidOption, match="skipped must be a share"):
        adapmoe.skip([layer], [x], skipped=1.0)


def test_a_second_row_that_leads_to_the_same_expert_is_no_second_expert(layer, x):
    rows = np.stack([np.ones(H), np.ones(H), -np.ones(H)]).astype(np.float32)
    merged = replace(layer.kept(range(2)), router=rows, expert_of=np.array([0, 0, 1]))
    routing = merged.route(np.abs(x))
    assert (routing.ids == [0, -1]).all()
    assert adapmoe.sensitivity(merged, np.abs(x), routing) == 0


def test_patterns():
    weights = np.array([[3.0, -4, 1, 2, 5, 6, -7, 8], [1, 1, 9, -9, 0, 0, 1, 2]])
    stays = moe_pruner.kept(weights, (2, 4))
    assert np.array_equal(stays, [[1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]])
    norms = np.array([1.0, 1, 10, 10, 1, 1, 0, 0])
    assert moe_pruner.kept(weights, (1, 4), norms=norms)[0].nonzero()[0].tolist() == [3, 5]
    both = moe_pruner.kept(weights, (2, 4), rows=2)  # the sum of squares of both rows decides
    assert np.array_equal(both, [[0, 0, 1, 1, 0, 0, 1, 1]] * 2)
    assert moe_pruner.kept(np.ones((3, 6)), (2, 4), rows=2).sum(axis=1).tolist() == [4, 4, 4]
    with pytest.raises(InvalidOption, match="1 <= N < M"):
        moe_pruner.kept(weights, (4, 4))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", ["int4_g32+2:4", "mxint8+1:4"])
def test_patterns_are_those_that_the_formats_have(name, channels, x):
    expert = layer_of().experts[0]
    fmt = weight_format(name)
    thin = moe_pruner.pruned(expert, weight_format(name.partition("+")[0]), (fmt.nonzeros, QUAD),
                             channels=channels)
    # By magnitude, the format's own home prunes the same weights; an image takes them.
    own = prune(interleave_gate_up(expert.gate_up), fmt, "magnitude", together=2, channels=channels)
    assert np.array_equal(interleave_gate_up(thin.gate_up), own)
    assert np.array_equal(thin.down, prune(expert.down, fmt, "magnitude", channels=channels))
    stored = Expert.quantise(thin.gate_up, thin.down, name)
    for channel in range(channels):
        build_image(stored.gate_up, stored.down, 4, channel=channel, channels=channels)


def test_pruning_by_activations_hurts_less(x):
    layer = layer_of()
    scaled = x * np.where(np.arange(H) % 4 < 2, 4, 0.25).astype(np.float32)
    exact = layer(scaled)
    errors = [np.linalg.norm(moe_pruner.prune(layer, scaled, "2:4", criterion)(scaled) - exact)
              for criterion in moe_pruner.CRITERIA]
    assert errors[1] < 0.7 * errors[0]


def test_norms_are_those_of_routed_tokens(x):
    ids, weights = np.zeros((T, 1), int), np.full((T, 1), 0.5)
    ids[T // 2 :] = 1
    expert = layer_of().experts[0]
    norms = moe_pruner.input_norms(x, ids, weights, 0, expert.gate_up, I, "silu", None)
    half = x[: T // 2].astype(np.float64)
    assert np.allclose(norms[0], np.sqrt((half**2).sum(axis=0)) / 2)
    assert np.allclose(norms[1], np.linalg.norm(expert.hidden(half), axis=0) / 2)


def test_allocation_is_optimal():
    rng = np.random.default_rng(2)
    costs, sizes = rng.random((5, 3)), rng.integers(1, 6, (5, 3)) * 64
    for budget in range(int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum()) + 64, 64):
        found = allocate(costs, sizes, budget)
        best = min(costs[range(5), list(c)].sum() for c in itertools.product(range(3), repeat=5)
                   if sizes[range(5), list(c)].sum() <= budget)
        assert sizes[range(5), found].sum() <= budget
        assert costs[range(5), found].sum() == pytest.approx(best)
    with pytest.raises(InvalidOption, match="budget must be at least"):
        allocate(costs, sizes, int(sizes.min(axis=1).sum()) - 1)
    ids, weights = np.array([[0, 1], [0, -1]]), np.array([[0.75, 0.25], [1.0, 0.0]])
    assert importance(ids, weights, 3) == pytest.approx([0.875**1.5, 0.5 * 0.25**1.5, 0])


def test_scores(layer, x):
    routing = layer.route(x)
    counted = saliency.seer_scores(layer, x)
    assert counted.sum() == pytest.approx(
        np.take_along_axis(routing.probabilities, routing.ids, axis=1).sum())
    scores = saliency.reap_scores(layer, x)
    tokens, slots = np.nonzero(routing.ids == 3)
    expected = [routing.weights[t, s] * np.linalg.norm(layer.experts[3](x[t : t + 1]))
                for t, s in zip(tokens, slots, strict=True)]
    assert scores[3] == pytest.approx(np.mean(expected))
    # The expert of the largest output stays, whatever its score.
    huge = replace(layer.experts[2], down=layer.experts[2].down * 100)
    other = replace(layer, experts=(*layer.experts[:2], huge, *layer.experts[3:]))
    assert saliency.drop_lowest(other, x, -np.arange(E) % E * 1.0, 1).expert_of[2] == 0


def test_stun_keeps_one_of_twins(layer, x):
    router = layer.router.copy()
    router[4] = router[1] * 1.001
    twins = replace(layer, router=router)
    stays = stun.prune(twins, x, E - 1, None, together=0.0).expert_of
    assert (stays[[1, 4]] >= 0).sum() == 1 and (stays >= 0).sum() == E - 1


def test_merging(layer, x):
    # Permuted copies of one expert: aligned and merged they are it.
    order = np.random.default_rng(0).permutation(I)
    one = layer.experts[0]
    other = FloatExpert(np.concatenate([one.gate_up[:I][order], one.gate_up[I:][order]]),
                        np.ascontiguousarray(one.down[:, order]))
    assert np.allclose(other(x), one(x), atol=1e-5)
    back = merging.aligned(other, one)
    assert np.array_equal(back.gate_up, one.gate_up) and np.array_equal(back.down, one.down)
    mean = merging.weighted_mean([one, layer.experts[1]], np.array([3.0, 1.0]))
    assert np.allclose(mean.down, 0.75 * one.down + 0.25 * layer.experts[1].down, atol=1e-6)
    # Two pairs with the same outputs are the clusters.
    experts = tuple(layer.experts[i] for i in (0, 1, 2, 3, 0, 1))
    merged = merging.hc_smoe(replace(layer, experts=experts), x, 4)
    assert merged.expert_of[0] == merged.expert_of[4] and merged.expert_of[1] == merged.expert_of[5]
    assert np.allclose(merged(x), replace(layer, experts=experts)(x), atol=1e-5)
    with pytest.raises(InvalidOption, match="of one kind"):
        merging.weighted_mean([one, replace(one, activation="relu")], np.ones(2))


def test_assignment_and_clusters():
    rng = np.random.default_rng(4)
    for n in (1, 2, 5, 6):
        costs = rng.random((n, n))
        found = assignment(costs)
        best = min(costs[range(n), list(p)].sum() for p in itertools.permutations(range(n)))
        assert sorted(found) == list(range(n))
        assert costs[range(n), found].sum() == pytest.approx(best)
    places = np.array([0.0, 1, 10, 11, 30])
    groups = clusters(np.abs(places[:, None] - places), 3, linkage=np.max)
    assert sorted(groups) == [[0, 1], [2, 3], [4]]


def test_ranks_and_counts(layer, x):
    ranks = moe_i2.ranks(layer, x, 0.5)
    important = moe_i2.importances(layer, x)
    assert np.mean(ranks) == pytest.approx(I / 2, abs=1)
    assert ranks[int(important.argmax())] == max(ranks)
    quiet = replace(layer, experts=tuple(replace(e, down=e.down if i else e.down * 0)
                                         for i, e in enumerate(layer.experts)))
    loud_and_quiet = moe_i2.counts([quiet, layer], [x, x], 0.75)
    assert sum(loud_and_quiet) == 2 * round(0.75 * E) and min(loud_and_quiet) >= 1


def test_the_search_is_no_worse_than_its_first_choice(layer, x):
    chosen = moe_i2.prune(layer, x, 4)
    found = eep.search(layer, x, 4, generations=6)
    exact = layer(x)
    assert np.linalg.norm(found(x) - exact) < 0.98 * np.linalg.norm(chosen(x) - exact)


def test_what_is_wrong_is_named(layer, x):
    with pytest.raises(InvalidOption, match="method must be one of adapmoe"):
        method("prune")
    with pytest.raises(InvalidOption, match="rows must be one of the options of naee, share"):
        method("naee")([layer], [x], rows=3)
    with pytest.raises(InvalidOption, match="share of seer must be a share of the experts"):
        method("seer")([layer], [x], share=0.0)
    with pytest.raises(InvalidOption, match="calibration must be tokens"):
        method("seer")([layer], [])
    with pytest.raises(InvalidOption, match="pattern of magnitude must be one of 2:4, 1:4"):
        method("magnitude")([layer], [x], pattern="3:4")
    with pytest.raises(InvalidTensor, match="format for each of its 6 experts"):
        replace(layer, expert_of=np.array([0, 1, 2, 3, 4, 9]))
    with pytest.raises(InvalidTensor, match="or -1"):
        layer.kept([])
