import base64
import json
import struct

import numpy as np
import pytest

from moeaccel.host.traces import ForeignTrace, PopularityProfile, TornTrace
from moeaccel.host.traces.importers import (
    import_imatrix,
    import_megatron,
    import_routed_experts,
    import_sglang,
)

RNG = np.random.default_rng(0)


def routes(tokens, layers=3, top_k=2, n_experts=8):
    return np.array([[RNG.choice(n_experts, top_k, replace=False) for _ in range(layers)]
                     for _ in range(tokens)], np.int16)


# -- vLLM, TensorRT-LLM
def test_one_request_of_vllm(tmp_path):
    ids = routes(5)
    np.save(tmp_path / "r.npy", ids)
    trace = import_routed_experts(tmp_path / "r.npy", n_experts=8, model="m")
    assert np.array_equal(trace.ids, ids)
    assert (trace.layers, trace.model, trace.n_experts) == ((0, 1, 2), "m", 8)
    assert trace.source == f"routed experts, {tmp_path / 'r.npy'}"


def test_prompt_and_answer_are_one_request(tmp_path):
    prompt, answer, other = routes(4), routes(2), routes(3)
    np.savez(tmp_path / "r.npz", prompt_routed_experts=prompt, routed_experts=answer, next=other)
    trace = import_routed_experts(tmp_path / "r.npz", n_experts=8)
    assert [len(ids) for _, ids in trace.sequences()] == [6, 3]
    assert np.array_equal(trace.ids, np.concatenate([prompt, answer, other]))
    assert [len(step.ids) for step in trace.steps()] == [4, 1, 1, 1, 1, 1]


def test_padding_of_a_batch_and_layers_without_experts(tmp_path):
    batch = np.full((2, 4, 3, 2), -1, np.int32)
    batch[0, :3], batch[1, 2:] = routes(3), routes(2)  # padded behind, and in front
    batch[:, :, 0] = -1
    batch[0, 1, 2, 1] = -1  # one slot that was not used
    np.save(tmp_path / "r.npy", batch)
    trace = import_routed_experts(tmp_path / "r.npy", n_experts=8)
    assert trace.layers == (1, 2)
    assert [len(ids) for _, ids in trace.sequences()] == [3, 2]
    assert np.array_equal(trace.ids, np.concatenate([batch[0, :3, 1:], batch[1, 2:, 1:]]))


def test_what_is_no_array_of_routed_experts(tmp_path):
    path = tmp_path / "r.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(TornTrace, match="without objects"):
        import_routed_experts(path, n_experts=8)
    np.save(path, routes(4))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TornTrace, match=r"r\.npy must be a whole"):
        import_routed_experts(path, n_experts=8)
    np.savez(tmp_path / "r.npz", a=routes(100))
    whole = (tmp_path / "r.npz").read_bytes()
    (tmp_path / "r.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TornTrace, match=r"r\.npz must be a whole"):
        import_routed_experts(tmp_path / "r.npz", n_experts=8)
    with pytest.raises(TornTrace, match="nowhere must be"):
        import_routed_experts(tmp_path / "nowhere", n_experts=8)
    for array, message in ((routes(4).astype(float), "must be integers"),
                           (routes(4)[0], "must be integers"),
                           (np.full((2, 3, 2), -1), "must have a token"),
                           (routes(4) + 4, "a model with 8 experts, but: ids must be -1")):
        np.save(path, array)
        with pytest.raises(ForeignTrace, match=message):
            import_routed_experts(path, n_experts=8)
    np.savez(path.with_suffix(".npz"), prompt_routed_experts=routes(2),
             routed_experts=routes(2, layers=2))
    with pytest.raises(ForeignTrace, match="of one model"):
        import_routed_experts(path.with_suffix(".npz"), n_experts=8)


# -- SGLang
def response(ids, prompt, where="meta_info"):
    payload = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    if where == "meta_info":
        return {"text": "", "meta_info": {"prompt_tokens": prompt, "routed_experts": payload}}
    return {"usage": {"prompt_tokens": prompt}, "sglext": {"routed_experts": payload}}


@pytest.mark.parametrize("lines", [True, False])
def test_sglang(tmp_path, lines):
    first, second = routes(5), routes(3)
    first[:, 0] = second[:, 0] = 0  # a layer without experts
    found = [response(first, 4), response(second, 3, "sglext")]
    path = tmp_path / "r"
    path.write_text("\n".join(map(json.dumps, found)) if lines else json.dumps(found))
    trace = import_sglang(path, n_layers=3, n_experts=8, top_k=2)
    assert trace.layers == (1, 2)
    assert np.array_equal(trace.ids, np.concatenate([first, second])[:, 1:])
    assert [len(step.ids) for step in trace.steps()] == [4, 1, 3]


@pytest.mark.parametrize(("text", "kind", "message"), [
    (json.dumps(response(routes(2), 1))[:40], TornTrace, "line 1 must be whole JSON"),
    (json.dumps(response(routes(2), 1)) + '\n{"meta', TornTrace, "line 2 must be whole JSON"),
    ("", TornTrace, "must be JSON or JSON lines"),
    ("[1]", ForeignTrace, "response 0 must be a JSON object, not int"),
    ('{"text": "hello"}', ForeignTrace, "ask for return_routed_experts"),
    ('{"meta_info": {"routed_experts": "a*b="}}', TornTrace, "must be base64"),
    (json.dumps(response(routes(2, layers=2), 1)), ForeignTrace,
     "tokens of 3 layers x 2 int32, 24 bytes each, not 32 bytes"),
    (json.dumps(response(routes(3) + 4, 1)), ForeignTrace, "a model with 8 experts"),
])
def test_what_is_no_response(tmp_path, text, kind, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(kind, match=message) as caught:
        import_sglang(path, n_layers=3, n_experts=8, top_k=2)
    assert str(path) in str(caught.value)


def test_text_that_is_none(tmp_path):
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TornTrace, match="must be UTF-8 text"):
        import_sglang(tmp_path / "r.json", n_layers=3, n_experts=8, top_k=2)


# -- Megatron-Core
def record(step, layer, ids, rank=0, **more):
    return {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer,
            "rank": rank, "num_tokens": len(ids), "topk": ids.shape[1],
            "top_indices": ids.tolist()} | more


def test_megatron(tmp_path):
    parts = {(step, rank): routes(4 + rank, layers=2) for step in (0, 7) for rank in (0, 1)}
    records = [record(step, layer, ids[:, i], rank) for (step, rank), ids in parts.items()
               for i, layer in enumerate((4, 2))]
    records += [record(0, 4, routes(4)[:, 0], mtp_idx=0), record(0, 1, routes(9)[:, 0],
                                                                 block="mtp")]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    trace = import_megatron(path, n_experts=8)
    assert trace.layers == (2, 4)
    assert np.array_equal(trace.ids, np.concatenate([ids[:, ::-1] for ids in parts.values()]))
    assert trace.step.tolist() == [0] * 9 + [7] * 9
    assert [len(ids) for _, ids in trace.sequences()] == [4, 5, 4, 5]


@pytest.mark.parametrize(("records", "kind", "message"), [
    ([record(0, 1, routes(2)[:, 0])] * 2, ForeignTrace, "line 2 must be the only record"),
    ([record(0, 1, routes(2)[:, 0]), record(1, 2, routes(2)[:, 0])], TornTrace,
     r"step 0 of rank 0 must have layers \[1, 2\]"),
    ([record(0, 1, routes(2)[:, 0], num_tokens=3)], TornTrace, r"must be \(3, 2\), as num_tokens"),
    ([record(0, 1, routes(2)[:, 0], top_indices=[[1, 2], [3]])], ForeignTrace, "top_indices"),
    ([{"step": 0}], ForeignTrace, "must have step, layer, num_tokens, topk and top_indices"),
    ([record(0, 1, routes(2)[:, 0] + 7)], ForeignTrace, "a model with 8 experts"),
    ([record(0, 1, routes(2)[:, 0], block="mtp")], ForeignTrace, "has none"),
])
def test_what_is_no_router_trace(tmp_path, records, kind, message):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(kind, match=message) as caught:
        import_megatron(path, n_experts=8)
    assert str(path) in str(caught.value)
    path.write_text(json.dumps(record(0, 1, routes(2)[:, 0]))[:-4])
    with pytest.raises(TornTrace, match="line 1 must be whole JSON"):
        import_megatron(path, n_experts=8)


# -- llama.cpp
def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(tensors, *, version=3, alignment=32):
    """Return a GGUF file with key-values of every kind."""
    values = [text("general.type") + struct.pack("<I", 8) + text("imatrix"),
              text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
              text("imatrix.chunk_count") + struct.pack("<II", 4, 7),
              text("numbers") + struct.pack("<IIQ", 9, 5, 3) + struct.pack("<3i", 1, 2, 3),
              text("flag") + struct.pack("<I?", 7, True),
              text("general.alignment") + struct.pack("<II", 4, alignment)]
    infos, blobs, offset = b"", b"", 0
    for name, array in tensors.items():
        infos += text(name) + struct.pack("<I", array.ndim)
        infos += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        infos += struct.pack("<IQ", 0 if array.dtype == np.float32 else 1, offset)
        blob = array.tobytes()
        blob += bytes(-len(blob) % alignment)
        blobs, offset = blobs + blob, offset + len(blob)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(values) + infos
    return head + bytes(-len(head) % alignment) + blobs


def imatrix(counts, layers=(1, 2)):
    tensors = {"blk.0.ffn_down.weight.counts": np.ones((1, 1), np.float32)}
    for layer, row in zip(layers, counts, strict=True):
        for name in ("gate", "down"):
            stem = f"blk.{layer}.ffn_{name}_exps.weight"
            tensors[f"{stem}.in_sum2"] = np.zeros((len(row), 4), np.float32)
            tensors[f"{stem}.counts"] = np.asarray(row, np.float32)[:, None]
    return tensors


@pytest.mark.parametrize("alignment", [32, 64])
def test_imatrix_is_a_profile(tmp_path, alignment):
    counts = RNG.integers(0, 9, (2, 5))
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(gguf(imatrix(counts), alignment=alignment))
    profile = import_imatrix(path, model="m")
    assert isinstance(profile, PopularityProfile)
    assert np.array_equal(profile.counts, counts)
    assert (profile.layers, profile.model, profile.n_experts) == ((1, 2), "m", 5)
    assert np.allclose(profile.shares().sum(1), 1)


def test_every_cut_of_an_imatrix_is_torn(tmp_path):
    path = tmp_path / "imatrix.gguf"
    whole = gguf({"blk.0.ffn_up_exps.weight.counts": np.ones((8, 1), np.float32)})
    for length in range(4, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(TornTrace, match="must be a whole GGUF file"):
            import_imatrix(path)


def test_what_is_no_imatrix(tmp_path):
    path = tmp_path / "imatrix.gguf"
    for data, kind, message in (
        (b"\x02\0\0\0legacy", ForeignTrace, "--output-format gguf"),
        (gguf({"blk.0.ffn_down.weight.counts": np.ones((1, 1), np.float32)}), ForeignTrace,
         "no importance matrix of an MoE model"),
        (gguf(imatrix(np.ones((2, 4))), version=9), TornTrace, "version must be 2 or 3, not 9"),
        (gguf(imatrix([np.ones(4), np.ones(5)])), ForeignTrace, r"as many experts.*\[4, 5\]"),
        (gguf(imatrix(np.zeros((2, 4)))), TornTrace, "not all 0"),
        (gguf(imatrix(np.full((2, 4), np.nan))), TornTrace, "counts must be finite"),
        (gguf({"blk.0.ffn_up_exps.weight.counts": np.ones((8, 1), np.float16)}), TornTrace,
         "must be float32, not GGML type 1"),
    ):
        path.write_bytes(data)
        with pytest.raises(kind, match=message):
            import_imatrix(path)
