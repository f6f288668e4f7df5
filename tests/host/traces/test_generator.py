import numpy as np
import pytest

from moeaccel.host.traces import InvalidTrace, UnknownPreset
from moeaccel.host.traces.fit import fit_locality, refit
from moeaccel.host.traces.generator import Locality, generate_requests
from moeaccel.host.traces.presets import generate, preset, presets
from moeaccel.host.traces.segments import segment_hit_rates
from moeaccel.host.traces.statistics import real
from moeaccel.host.traces.statistics.caches import layer_caches
from moeaccel.host.traces.statistics.sample import Sample

FIGURE = "figure mchr of arXiv 2505.16056, digitised, +-0.005"
SIZES = (6, 12, 16, 24, 32, 48)
FOUR = ["deepseek-v2-lite", "olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b"]
LOCALITY = Locality(request=0.1, passage=0.1, phrase=0.4)
SHAPE = {"n_layers": 4, "n_experts": 32, "top_k": 4}


def make(locality=LOCALITY, lengths=(200, 200), **more):
    return generate_requests(locality, lengths=list(lengths), seed=1, **(SHAPE | more))


def reuse(ids, lag=1):
    return (ids[lag:, :, :, None] == ids[:-lag, :, None, :]).any(-1).mean()


def test_a_seed_is_a_text_and_a_request_is_its_own():
    (ids, weights), (other, _) = make()
    again, _ = make(lengths=[200])[0]
    assert np.array_equal(ids, again) and not np.array_equal(ids, other)
    assert not np.array_equal(ids, make(model_seed=1)[0][0])
    assert ids.shape == (200, 4, 4) and ids.min() >= 0 and ids.max() < 32
    assert (np.diff(np.sort(ids, axis=2)) > 0).all()
    assert (np.diff(weights, axis=2) <= 0).all()
    assert np.allclose(weights.sum(2), 1, atol=1e-5)
    _, raw = make(renormalize=False)[0]
    assert (raw.sum(2) < 1).all()


def test_text_is_read_by_one_model():
    """Popularity over all requests is the model's, whatever the seed."""
    liked = Locality(request=0.1, passage=0.1, phrase=0.4, popularity=0.6)
    counts = []
    for seed, model_seed in ((1, 0), (2, 0), (3, 1)):
        routes = generate_requests(liked, lengths=[60] * 30, seed=seed, model_seed=model_seed,
                                   **SHAPE)
        ids = np.concatenate([ids for ids, _ in routes])[:, 0]
        counts.append(np.bincount(ids.ravel(), minlength=32))
    same, different = (np.corrcoef(counts[0], other)[0, 1] for other in counts[1:])
    assert same > 0.9 > 0.5 > abs(different)


def test_each_share_does_what_it_says():
    def at(lag, **shares):
        locality = Locality(**({"request": 0, "passage": 0, "phrase": 0, "popularity": 0}
                               | shares))
        return np.mean([reuse(ids, lag) for ids, _ in make(locality, lengths=[150] * 8)])

    chance = 4 / 32
    assert at(1) == pytest.approx(chance, abs=0.02)
    assert at(1, phrase=0.8) > 2 * chance > 1.3 * at(32, phrase=0.8)
    assert at(8, passage=0.8) > 2 * chance > at(140, passage=0.8)
    assert at(140, request=0.8) > 2 * chance
    assert at(1, request=0.8, first_layer=0, last_layer=0) < at(1, request=0.8)


def test_neighbours_of_a_layer_are_told_by_the_layer_below():
    def together(depth_memory):
        """How much better than chance the most frequent companion in the next layer is."""
        routes = make(Locality(request=0.1, passage=0.1, phrase=0.4, popularity=0,
                               depth_memory=depth_memory), lengths=[300] * 6)
        ids = np.concatenate([ids for ids, _ in routes])
        pairs = np.zeros((32, 32))
        for i in range(4):
            for j in range(4):
                np.add.at(pairs, (ids[:, 1, i], ids[:, 2, j]), 1)
        return (pairs / pairs.sum(1, keepdims=True)).max(1).mean() * 32

    assert together(0.98) > 1.5 * together(0.0)


# -- presets
@pytest.mark.parametrize("key", presets())
def test_every_preset_is_near_its_figures(key):
    """A few short requests: wrong by a share or an exponent, not by what sampling costs."""
    known = real()[key].get(FIGURE)
    p = preset(key)
    if known is None:
        trace = generate(p, requests=2, tokens=16)
        assert trace.ids.shape == (32, len(p.layers), p.top_k)
        return
    routes = generate_requests(p.locality, n_layers=min(len(p.layers), 8), n_experts=p.n_experts,
                               top_k=p.top_k, lengths=[512] * 3, seed=77, model_seed=77)
    rates = segment_hit_rates(np.stack([ids for ids, _ in routes]), n_experts=p.n_experts,
                              ratios=(1, 3), policies=("LRU", "LFU"))
    for policy, (one, three) in rates.items():
        assert one == pytest.approx(known[f"segment/{policy}@1"], abs=0.08)
        assert three == pytest.approx(known[f"segment/{policy}@3"], abs=0.08)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("key", FOUR)
def test_hit_rates_of_whole_models(key):
    """64 requests of 512 tokens; neither text nor model was seen when the preset was fitted."""
    trace = generate(key, requests=64, tokens=512, seed=1000, model_seed=1000)
    rates = segment_hit_rates(trace.segments(512), n_experts=trace.n_experts)
    off = {name: rates[name.split("/")[1][:-2]][int(name[-1]) - 1] - value
           for name, value in real()[key][FIGURE].items()}
    assert {n: round(v, 3) for n, v in off.items() if abs(v) > 0.04} == {}
    assert {n: round(v, 3) for n, v in off.items() if "Belady" in n and abs(v) > 0.03} == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_caches_for_each_layer_of_deepseek_v2_lite():
    """One stream of prompts as long as those that were measured, every second layer."""
    trace = generate("deepseek-v2-lite", requests=100, tokens=131, seed=1000, model_seed=1000)
    stream = Sample(trace).stream(len(trace), layers=13)
    published = next(values for source, values in real()["deepseek-v2-lite"].items()
                     if "moe-beyond" in source)
    off = {f"{name}, {slots}": rate - published[f"cache/{name}, {slots} slots"]
           for slots, rates in zip(SIZES, layer_caches(stream, SIZES), strict=True)
           for name, rate in rates.items() if name != "static"}
    assert {n: round(v, 3) for n, v in off.items() if abs(v) > 0.025} == {}


def test_a_fit_finds_its_way():
    targets = {"LRU": (0.42, 0.62), "LFU": (0.36, 0.58)}
    found, off = fit_locality(targets, n_layers=2, n_experts=16, top_k=2, requests=3, tokens=200,
                              seeds=(1,), iterations=4,
                              start=Locality(request=0.3, passage=0.1, phrase=0.2))
    assert off < 0.03
    assert found.request + found.passage + found.phrase < 1
    with pytest.raises(InvalidTrace, match="must have targets"):
        fit_locality({}, n_layers=2, n_experts=16, top_k=2, start=LOCALITY)


def test_a_preset_is_fitted_again_from_published_figures():
    """One step on little text: it stays near, and keeps what was fitted to something else."""
    before = preset("deepseek-v2-lite").locality
    found, off = refit("deepseek-v2-lite", requests=1, tokens=512, layers=2, seeds=(1,),
                       iterations=1)
    assert off < 0.15 and found.popularity == pytest.approx(before.popularity)
    assert (found.depth_memory, found.first_layer) == (before.depth_memory, before.first_layer)
    with pytest.raises(InvalidTrace, match="must have targets"):
        refit("deepseek-v3-r1")


# -- errors
@pytest.mark.parametrize(("changes", "message"), [
    ({"request": -0.1}, "locality request must be finite and at least 0"),
    ({"phrase": float("nan")}, "locality phrase must be finite"),
    ({"request": 0.9}, r"request \+ passage \+ phrase must be at most 1, not 1\.400"),
    ({"passage_memory": 1.0}, "passage_memory must be below 1"),
    ({"first_layer": 1.5}, "first_layer must be at most 1"),
    ({"dimensions": 0}, "dimensions must be at least 1"),
])
def test_localities_that_cannot_be(changes, message):
    with pytest.raises(InvalidTrace, match=message):
        Locality(**({"request": 0.1, "passage": 0.1, "phrase": 0.4} | changes))


def test_what_cannot_be_generated():
    for more, message in (({"top_k": 33}, "top-33"), ({"n_layers": 0}, "not 0 layers"),
                          ({"lengths": [0]}, "a token, not 0"), ({"model_seed": -1}, "seeds must")):
        with pytest.raises(InvalidTrace, match=message):
            make(**more)
    with pytest.raises(UnknownPreset, match=r"'mixtral'; did you mean mixtral-8x7b\?"):
        generate("mixtral", requests=1, tokens=1)
    with pytest.raises(InvalidTrace, match="not 2 with 1 lengths"):
        generate("mixtral-8x7b", requests=2, tokens=[3])


def test_batches_and_prompts():
    trace = generate("mixtral-8x7b", requests=3, tokens=[10, 4, 6], prompt=4, batch=2)
    assert [len(step.ids) for step in trace.steps("prefill")] == [8, 4]
    assert [len(step.ids) for step in trace.steps("decode")] == [1, 2, 2, 1, 1, 1]
    assert trace.model == "Mixtral-8x7B" and trace.weights is not None
