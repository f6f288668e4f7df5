import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import save_file

from moeaccel.host.traces import (
    ForeignTrace,
    InvalidTrace,
    PopularityProfile,
    RoutingTrace,
    TornTrace,
)


@st.composite
def traces(draw):
    n_experts = draw(st.sampled_from([1, 3, 8, 40000]))
    top_k = draw(st.integers(1, min(3, n_experts)))
    n_layers, lengths = draw(st.integers(1, 3)), draw(st.lists(st.integers(1, 5), min_size=1,
                                                               max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    routes = []
    for length in lengths:
        ids = np.array([[rng.choice(n_experts, top_k, replace=False) for _ in range(n_layers)]
                        for _ in range(length)])
        ids[rng.random(ids.shape) < 0.1] = -1
        routes.append((ids, rng.random(ids.shape).astype(draw(st.sampled_from(["f2", "f4"])))))
    if draw(st.booleans()):
        routes = [(ids, None) for ids, _ in routes]
    trace = RoutingTrace.of_requests(
        routes, prompts=[draw(st.integers(0, 4)) for _ in lengths], n_experts=n_experts,
        layers=sorted(rng.choice(60, n_layers, replace=False).tolist()),
        model=draw(st.text(max_size=8)), source=draw(st.text(max_size=8)))
    return trace.rebatch(draw(st.integers(1, 3)), prompt=draw(st.integers(0, 3)))


def small(**changes):
    fields = {"ids": np.arange(12).reshape(3, 2, 2) % 8, "request": np.array([0, 0, 1]),
              "position": np.array([0, 1, 0]), "step": np.array([0, 1, 2]), "n_experts": 8,
              "layers": (3, 5), "model": "m", "source": "s"}
    return RoutingTrace(**(fields | changes))


# -- files
@settings(deadline=None, max_examples=40)
@given(traces())
def test_files_hold_everything(tmp_path_factory, trace):
    path = tmp_path_factory.mktemp("traces") / "t.safetensors"
    trace.save(path)
    again = RoutingTrace.load(path)
    assert again == trace
    assert again.ids.dtype == (np.int32 if trace.n_experts > 1 << 15 else np.int16)
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]
    profile = trace.popularity() if (trace.ids >= 0).any() else None
    if profile is not None:
        profile.save(path)
        again = PopularityProfile.load(path)
        assert np.array_equal(again.counts, profile.counts)
        assert (again.layers, again.model, again.source) == (
            profile.layers, profile.model, profile.source)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_torn_file_is_an_error_and_never_another_trace(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("torn") / "t.safetensors"
    small(weights=np.ones((3, 2, 2), np.float32)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(TornTrace, match=r"t\.safetensors must be a whole safetensors file"):
        RoutingTrace.load(path)


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    for name, content in (("p", pickle.dumps(Bomb())), ("text", b"hello, world"), ("empty", b"")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(TornTrace, match="cut off, damaged or of another kind"):
            RoutingTrace.load(path)
    with pytest.raises(TornTrace, match="nowhere must be a file that can be read"):
        RoutingTrace.load(tmp_path / "nowhere")
    with pytest.raises(TornTrace, match="must be a file that can be read"):
        RoutingTrace.load(tmp_path)
    with pytest.raises(TornTrace, match="must be a place that can be written"):
        small().save(tmp_path / "no" / "folder")


def test_a_file_of_another_kind_is_foreign(tmp_path):
    path = tmp_path / "f"
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ForeignTrace, match=r"must hold 'moeaccel.routing_trace'.*not 'nothing'"):
        RoutingTrace.load(path)
    small().popularity().save(path)
    with pytest.raises(ForeignTrace, match=r"not 'moeaccel.popularity_profile'"):
        RoutingTrace.load(path)
    small().save(path)
    with pytest.raises(ForeignTrace, match=r"not 'moeaccel.routing_trace'"):
        PopularityProfile.load(path)


HEADER = {"format": "moeaccel.routing_trace", "version": "1", "model": "m", "source": "s",
          "experts": "8", "top_k": "2", "layers": "[3, 5]"}
TENSORS = {"ids": np.zeros((3, 2, 2), np.int16) + np.array([1, 2], np.int16),
           **{name: np.arange(3, dtype=np.int32) for name in ("request", "position", "step")}}


@pytest.mark.parametrize(("header", "tensors", "kind", "message"), [
    ({"version": "2"}, {}, ForeignTrace, "must be of version 1, not 2"),
    ({"layers": "[3"}, {}, TornTrace, "must have model, source, experts, top_k and layers"),
    ({"experts": "many"}, {}, TornTrace, "must have model, source, experts"),
    ({"layers": "[3, 5, 7]"}, {}, TornTrace,
     r"tensor 'ids' must be int16 or int32 \(\*, 3, 2\), not int16 \(3, 2, 2\)"),
    ({"top_k": "4"}, {}, TornTrace, r"tensor 'ids' must be int16 or int32 \(\*, 2, 4\)"),
    ({}, {"ids": TENSORS["ids"].astype(np.int64)}, TornTrace, r"not int64 \(3, 2, 2\)"),
    ({}, {"step": None}, TornTrace, r"must hold tensor 'step', int32 \(3\); it has ids, position"),
    ({}, {"step": np.arange(4, dtype=np.int32)}, TornTrace,
     r"'step' must be int32 \(3\), not int32 \(4,\)"),
    ({}, {"weights": np.zeros((3, 2, 1), np.float32)}, TornTrace, "'weights' must be float16 or"),
    ({}, {"ids": TENSORS["ids"] + np.int16(6)}, TornTrace, "ids must be -1"),
    ({"experts": "0"}, {}, TornTrace, "n_experts must be at least 1"),
    ({"layers": "[5, 3]"}, {}, TornTrace, "layers must be 2 ascending numbers"),
    ({"layers": "5"}, {}, TornTrace, "must have model, source, experts"),
])
def test_a_file_that_does_not_hold_what_it_says(tmp_path, header, tensors, kind, message):
    path = tmp_path / "t"
    kept = {name: t for name, t in (TENSORS | tensors).items() if t is not None}
    save_file(kept, path, HEADER | header)
    with pytest.raises(kind, match=message) as caught:
        RoutingTrace.load(path)
    assert str(path) in str(caught.value)


def test_a_damaged_profile(tmp_path):
    path = tmp_path / "p"
    head = {"format": "moeaccel.popularity_profile", "version": "1", "model": "m", "source": "s"}
    for layers, counts, message in (("[0]", [[-1, 2]], "counts must be at least 0"),
                                    ("[0]", [[0, 0]], "not all 0"),
                                    ("[0, 1]", [[1, 2]], "layers must be 1 ascending"),
                                    ("nonsense", [[1, 2]], "must hold a profile")):
        save_file({"counts": np.array(counts)}, path, head | {"layers": layers})
        with pytest.raises(TornTrace, match=message):
            PopularityProfile.load(path)
    with pytest.raises(InvalidTrace, match="must be"):
        PopularityProfile(counts=np.zeros(3), layers=(0,))


# -- contents
@pytest.mark.parametrize(("changes", "message"), [
    ({"ids": np.zeros((3, 2))}, "ids must be integers"),
    ({"ids": np.zeros((0, 2, 2), int)}, "with a token"),
    ({"ids": np.full((3, 2, 2), -2)}, "ids must be -1 .unused. to 7, not -2"),
    ({"n_experts": 4}, "to 3, not 0 to 7"),
    ({"ids": np.full((3, 2, 2), 5)}, r"token 0 has \[5, 5\] in row 0"),
    ({"weights": np.ones((3, 2))}, "weights must be floats"),
    ({"weights": np.full((3, 2, 2), np.nan)}, "weights must be finite, but token 0"),
    ({"layers": (1,)}, "layers must be 2 ascending"),
    ({"request": np.array([0, 0])}, r"request must be integers \(3,\)"),
    ({"request": np.array([0, 0, -1])}, r"request must be 0 to 2\^31 - 1"),
    ({"step": np.array([1, 0, 2])}, "step descends at token 1"),
    ({"position": np.array([1, 1, 0])}, "token 1 is again position 1 of request 0"),
])
def test_what_is_no_trace_is_named(changes, message):
    with pytest.raises(InvalidTrace, match=message):
        small(**changes)


def test_arrays_are_copied_and_frozen():
    ids = np.arange(12).reshape(3, 2, 2) % 8
    trace = small(ids=ids)
    ids[:] = 0
    assert trace.ids[0, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        trace.ids[0] = 1
    assert trace != small(weights=np.ones((3, 2, 2))) and trace == small()


def test_parts():
    trace = small()
    assert trace.select(requests=[1]).ids.tolist() == trace.ids[2:].tolist()
    part = trace.select(layers=[5], steps=range(1, 3))
    assert part.layers == (5,) and part.step.tolist() == [1, 2]
    assert part.ids[:, 0].tolist() == trace.ids[1:, 1].tolist()
    assert [(n, len(ids)) for n, ids in trace.sequences()] == [(0, 2), (1, 1)]
    assert trace.segments(2).shape == (1, 2, 2, 2)
    for wrong, message in (({"requests": [2]}, r"\[2\] are not"), ({"layers": [4]}, r"\[4\] are"),
                           ({"steps": range(9, 10)}, "nothing is left of 3 tokens")):
        with pytest.raises(InvalidTrace, match=message):
            trace.select(**wrong)
    with pytest.raises(InvalidTrace, match="the longest has 2"):
        trace.segments(3)


def test_a_trace_of_another_model_is_foreign():
    small().expect(n_layers=2, n_experts=8, top_k=2)
    with pytest.raises(ForeignTrace, match="but m has 2 of 8, top-2"):
        small().expect(n_layers=2, n_experts=64, top_k=2)


def test_prefill_and_decode():
    ids = np.arange(10)[:, None, None] % 8
    trace = RoutingTrace.of_requests([(ids[:6], None), (ids[6:], None)], prompts=[4, 1],
                                     n_experts=8)
    assert trace.step.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert trace.is_prefill.tolist() == [True] * 4 + [False] * 2 + [True] + [False] * 3
    assert [s.index for s in trace.steps("decode")] == [1, 2, 4, 5, 6]
    assert [len(s.ids) for s in trace.steps("prefill")] == [4, 1]
    assert [uses.sum() for uses in trace.uses()] == [4, 1, 1, 1, 1, 1, 1]
    with pytest.raises(InvalidTrace, match='phase must be "all"'):
        list(trace.steps("warmup"))


@settings(deadline=None, max_examples=40)
@given(traces(), st.integers(1, 4), st.integers(0, 3))
def test_batches_hold_the_same_tokens(trace, batch, prompt):
    again = trace.rebatch(batch, prompt=prompt)
    for (a, ids), (b, same) in zip(trace.sequences(), again.sequences(), strict=True):
        assert a == b and np.array_equal(ids, same)
    for step in again.steps():
        assert len(np.unique(step.request)) <= batch
    # No place stays empty while a request waits: once a step is not full, no request begins.
    busy = [len(np.unique(step.request)) for step in again.steps()]
    begins = {int(again.step[again.request == request][0]) for request in again.requests}
    assert all(n == min(batch, len(trace.requests))
               for n in busy[: max(begins - {0}, default=1)])
    lengths = [len(ids) for _, ids in trace.sequences()]
    work = sum(1 + max(0, n - max(prompt, 1)) for n in lengths)
    assert sum(busy) == work
    if batch == 1:
        assert len(busy) == work


def test_of_requests_needs_requests_of_one_model():
    ids = np.zeros((2, 1, 1), int)
    for routes in ([], [(ids, None), (np.zeros((2, 2, 1), int), None)], [(ids[0], None)]):
        with pytest.raises(InvalidTrace, match="must have routes"):
            RoutingTrace.of_requests(routes, n_experts=2)
    with pytest.raises(InvalidTrace, match="all requests or none must have weights, not 1 of 2"):
        RoutingTrace.of_requests([(ids, np.ones((2, 1, 1))), (ids, None)], n_experts=2)


def test_the_header_says_what_the_page_says(tmp_path):
    path = tmp_path / "t.safetensors"
    small().save(path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == HEADER
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()
            if name != "__metadata__"} == {
        "ids": ("I16", [3, 2, 2]), "request": ("I32", [3]), "position": ("I32", [3]),
        "step": ("I32", [3])}
