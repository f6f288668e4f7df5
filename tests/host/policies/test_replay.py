import dataclasses

import numpy as np
import pytest

from moeaccel.host.policies.costs import Rates, machine
from moeaccel.host.policies.errors import BudgetTooSmall, PolicyFailed
from moeaccel.host.policies.placement import Plan, Work, chains
from moeaccel.host.policies.placement.in_place import InPlace
from moeaccel.host.policies.replay import replay, slots_of
from moeaccel.host.policies.residency import LRU
from moeaccel.host.policies.systems import SYSTEMS, Part, System
from moeaccel.host.traces import ForeignTrace, RoutingTrace
from moeaccel.host.traces.presets import generate
from moeaccel.zoo import model

MODEL = model("olmoe-1b-7b")
COSTS = machine().holding(MODEL, "int4_g32").layer(MODEL)
EXPERT = COSTS.resident_bytes
LAYERS = 4


@pytest.fixture(scope="module")
def trace():
    made = generate("olmoe-1b-7b", requests=3, tokens=40, prompt=16, batch=2, seed=11)
    return made.select(layers=made.layers[:LAYERS])


def quarter(trace):
    return trace.n_layers * 16 * EXPERT


def by_hand(*tokens, layers=1, experts=64):
    """Decode steps of one request, the same experts in each layer; the first token is a prompt."""
    ids = np.array([[list(experts_of)] * layers for experts_of in tokens])
    n = np.arange(len(ids))
    return RoutingTrace(ids=ids, request=n * 0, position=n, step=n, n_experts=experts,
                        layers=tuple(range(layers)))


def alone(name, **parts):
    return System(name="test", title="test", source="", **{
        "placement": Part(name), **{kind: Part(*part) for kind, part in parts.items()}})


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_layer_without_tokens_stops_no_system(trace, name):
    ids = trace.ids.copy()
    ids[8:, 1] = -1
    weights = np.where(ids >= 0, trace.weights, 0)
    found = replay(SYSTEMS[name], dataclasses.replace(trace, ids=ids, weights=weights), COSTS,
                   gpu_bytes=quarter(trace))
    assert 0 < found.mass <= 1 + 1e-6 and np.isfinite(found.seconds)
    if SYSTEMS[name].lossless:
        assert found.mass == 1
    assert found.uses[1] < found.uses[0]


def test_slots_are_spread_evenly():
    assert slots_of(10 * EXPERT, COSTS, 4) == [3, 3, 2, 2]
    assert slots_of(10 * EXPERT, COSTS, 4, buffers=6) == [1, 1, 1, 1]
    assert slots_of(0, COSTS, 2) == [0, 0] and slots_of(1 << 60, COSTS, 2) == [64, 64]
    for size in (1, EXPERT - 1, -1):
        with pytest.raises(BudgetTooSmall, match=rf"must be 0 or at least {EXPERT:,}, one expert"):
            slots_of(size, COSTS, 4)


def test_without_moves_it_is_the_sum_of_the_calls(trace):
    found = replay(alone("all-on-device"), trace, COSTS, gpu_bytes=0)
    calls = between = 0.0
    for step in trace.steps():
        between += COSTS.between(len(step.ids)) * LAYERS
        for uses in trace.counts(step.ids):
            work = Work.of(uses, np.zeros(64, bool), len(step.ids))
            calls += chains(COSTS, work, Plan(slice(0), slice(0))).total
    assert found.layer_seconds.sum() == pytest.approx(calls)
    assert found.seconds == pytest.approx(calls + between)
    assert (found.tokens, found.hit_rate, found.link_bytes_per_token) == (120, 0, 0)
    prompts = len(np.unique(trace.step[trace.is_prefill]))
    assert found.steps - found.decode_steps == prompts


def test_hits_of_plain_offloading_are_its_caches(trace):
    cache = LRU(n_layers=LAYERS, n_experts=64, slots=16)
    hits = sum(int(cache.step(uses).sum()) for uses in trace.uses())
    found = replay(alone("offload", residency=("lru",)), trace, COSTS, gpu_bytes=quarter(trace))
    assert found.hits.sum() == hits and found.background == 0
    assert found.moved.sum() == found.uses.sum() - hits
    assert found.waits.sum() > 0.5 * found.layer_seconds.sum()


def test_a_promotion_is_no_hit_before_it_has_arrived():
    token = (0, 1, 2, 3, 4, 5, 6, 7)
    trace = by_hand(*[token] * 12)
    system = dataclasses.replace(alone("in-place", residency=("lru",)), per_step=8)
    fast = replay(system, trace, COSTS.at(Rates(link=1e6)), gpu_bytes=8 * EXPERT)
    assert fast.hits.sum() == 8 * 11
    step = COSTS.between(1) + 8 * COSTS.device_read + COSTS.device_call + COSTS.row
    slow = COSTS.at(Rates(link=COSTS.move / step))  # an image in the time of a step
    found = replay(system, trace, slow, gpu_bytes=8 * EXPERT)
    assert 8 * 4 < found.hits.sum() < 8 * 8 and found.background == pytest.approx(8)


def test_promotions_keep_within_their_budget():
    trace = by_hand(*[tuple(range(8 * i, 8 * i + 8)) for i in range(8)])
    system = dataclasses.replace(alone("in-place", residency=("lru",)), per_step=2)
    found = replay(system, trace, COSTS.at(Rates(link=1e6)), gpu_bytes=64 * EXPERT)
    assert found.background == 2 * 8


def test_good_guesses_hide_moves(trace):
    options = {"gpu_bytes": quarter(trace)}
    plain = replay(alone("offload", residency=("lru",)), trace, COSTS, **options)
    oracle = replay(alone("offload", residency=("lru",), prefetch=("oracle",)), trace, COSTS,
                    **options)
    blind = replay(alone("offload", residency=("lru",), prefetch=("gate-ahead", {"accuracy": 0.0})),
                   trace, COSTS, **options)
    assert oracle.waits.sum() < plain.waits.sum() and oracle.hit_rate > 0
    assert oracle.seconds < blind.seconds
    assert blind.wasted > oracle.wasted
    # Nothing gets lost and nothing moves twice: what an expert needed came once, at most.
    assert oracle.moved.sum() + oracle.background <= oracle.uses.sum() + oracle.wasted + 1e-6


@pytest.mark.parametrize("name", list(SYSTEMS))
@pytest.mark.parametrize("batch", [1, 2])
def test_every_system(name, batch, trace):
    trace = trace if batch == 2 else trace.rebatch(1, prompt=16).select(requests=[0, 1])
    found = replay(SYSTEMS[name], trace, COSTS, gpu_bytes=quarter(trace))
    assert 0 <= found.hit_rate <= 1 and (found.hits <= found.uses).all()
    assert found.seconds > found.layer_seconds.sum() > 0
    assert (found.waits >= 0).all() and (found.waits <= found.layer_seconds).all()
    if name != "belady":  # whose moves in the background are free
        link_seconds = (found.moved.sum() + found.background) * COSTS.move
        assert link_seconds <= found.seconds * (1 + 1e-9), "no schedule is quicker than the link"
    if SYSTEMS[name].routing is None:
        assert found.mass == 1
    else:
        assert 0.4 < found.mass <= 1 + 1e-6
    again = replay(SYSTEMS[name], trace, COSTS, gpu_bytes=quarter(trace))
    assert again.seconds == found.seconds and again.hits.tolist() == found.hits.tolist()


def test_no_cache_hits_more_than_beladys(trace):
    best = replay(SYSTEMS["belady"], trace, COSTS, gpu_bytes=quarter(trace)).hit_rate
    for name in ("moeaccel", "static-hot-set", "daop", "hybrimoe", "dynande", "llama.cpp"):
        assert replay(SYSTEMS[name], trace, COSTS, gpu_bytes=quarter(trace)).hit_rate <= best


def test_changed_routes_change_what_moves(trace):
    base = alone("offload", residency=("lru",))
    options = {"gpu_bytes": quarter(trace)}
    plain = replay(base, trace, COSTS, **options)
    low = replay(dataclasses.replace(base, routing=Part("mixed-precision", {
        "high": 0.0, "low": 9.0})), trace, COSTS, **options)
    assert low.hits.tolist() == plain.hits.tolist() and low.mass == pytest.approx(1)
    assert plain.moved.sum() / 2 < low.moved.sum() < plain.moved.sum()
    only = replay(dataclasses.replace(base, routing=Part("resident-only")), trace, COSTS,
                  gpu_bytes=LAYERS * 64 * EXPERT)
    assert only.hits.sum() <= only.uses.sum() and only.mass <= 1


def test_deferred_experts_hide_behind_attention(trace):
    decode = trace.rebatch(1, prompt=16)
    plain = replay(alone("all-on-device"), decode, COSTS, gpu_bytes=0)
    later = replay(alone("all-on-device", routing=("deferral",)), decode, COSTS, gpu_bytes=0)
    assert later.decode_seconds < plain.decode_seconds and later.mass == 1


def test_wrong_costs_cost_little_in_the_end(trace):
    system = SYSTEMS["moeaccel"]
    long = generate("olmoe-1b-7b", requests=1, tokens=160, prompt=16, seed=12)
    long = long.select(layers=long.layers[:LAYERS])
    late = long.select(steps=range(60, 200))
    budget = {"gpu_bytes": quarter(long)}
    right = replay(system, long, COSTS, **budget)
    for rates in (Rates(link=2), Rates(device=0.5), Rates(device=2), Rates(torch=0.5)):
        wrong = replay(system, long, COSTS.at(rates), truth=COSTS, **budget)
        assert wrong.seconds <= 1.05 * right.seconds
    assert len(late)


def test_profiles_are_for_pinned_sets(trace):
    upside_down = -trace.popularity().counts
    known = replay(SYSTEMS["static-hot-set"], trace, COSTS, gpu_bytes=quarter(trace))
    wrong = replay(SYSTEMS["static-hot-set"], trace, COSTS, gpu_bytes=quarter(trace),
                   profile=upside_down)
    assert wrong.hit_rate < known.hit_rate and wrong.seconds > known.seconds


def test_a_policy_that_raises_is_named(trace, monkeypatch):
    def place(self, work):
        raise IndexError("list index out of range")

    monkeypatch.setattr(InPlace, "place", place)
    with pytest.raises(PolicyFailed, match=r"policies of daop must plan layer 0 of step 0, but "
                                           r"raised IndexError: list index .*use another policy"):
        replay(SYSTEMS["daop"], trace, COSTS, gpu_bytes=quarter(trace))


def test_a_trace_of_another_model(trace):
    other = machine().holding(model("mixtral-8x7b"), "int4_g32").layer(model("mixtral-8x7b"))
    with pytest.raises(ForeignTrace, match="must be of a model with 4 layers of 8 experts"):
        replay(SYSTEMS["daop"], trace, other, gpu_bytes=0)
