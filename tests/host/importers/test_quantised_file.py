import dataclasses
import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moeaccel.errors import OutputError
from moeaccel.formats import FORMATS
from moeaccel.host.importers import (
    DamagedCheckpoint,
    ForeignCheckpoint,
    InexactWeights,
    import_checkpoint,
    open_checkpoint,
    open_quantised,
)
from tests.support.checkpoints import expert_stems, float_experts, write_gguf, write_safetensors

E, H, I = 3, 96, 33


@pytest.fixture
def folder(tmp_path):
    """Return a checkpoint of two layers; K is odd, and no multiple of a group."""
    tensors = {}
    for layer in (1, 4):
        stacks = float_experts(E, H, I, seed=layer)
        tensors |= {f"{stem}.weight": stacks[part][e] for part, e, stem in expert_stems(E, layer)}
    return write_safetensors(tmp_path / "model", tensors)


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) if f.name not in (
        "format", "coarsened") else True for f in dataclasses.fields(a))


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_written_is_read_again(folder, tmp_path, name):
    seen = []
    with open_checkpoint(folder) as checkpoint:
        fits = import_checkpoint(checkpoint, tmp_path / "experts", name,
                                 progress=lambda *done: seen.append(done))
        assert seen == [(1, 1, 6), (1, 2, 6), (1, 3, 6), (4, 4, 6), (4, 5, 6), (4, 6, 6)]
        with open_quantised(tmp_path / "experts") as file:
            assert file.weight_format == FORMATS[name] and list(file.layers) == [1, 4]
            assert file.source == "model"
            for index, layer in file.layers.items():
                assert len(layer) == E == layer.summary.experts
                assert layer.summary.requantised == fits[index].requantised == fits[index].groups
                assert layer.summary.relative_error == fits[index].relative_error
                for (expected, _), found in zip(checkpoint.experts(index, name), layer,
                                                strict=True):
                    assert same(expected.gate_up, found.gate_up) and same(expected.down, found.down)
                assert same(layer[-1].down, layer[2].down) and len(layer[1:]) == 2


def test_the_reference_reads_the_file_as_it_is_documented(folder, tmp_path):
    with open_checkpoint(folder) as checkpoint:
        import_checkpoint(checkpoint, tmp_path / "experts", "int4_g32", layers=[4])
        (expert, _), *_ = checkpoint.experts(4, "int4_g32")
    tensors = load_file(tmp_path / "experts")
    assert {name.split(".")[1] for name in tensors} == {"4"}
    codes, scales, rows = (tensors[f"layers.4.down.{part}"][0]
                           for part in ("codes", "scales", "row_exponents"))
    low_first = np.stack([codes & 15, codes >> 4], axis=2).reshape(H, -1)
    assert low_first.shape == (H, 34) and not low_first[:, 33].any()
    integers = np.where(low_first > 7, low_first.astype(int) - 16, low_first)[:, :33]
    scale = (scales & 2047) * 2.0 ** ((scales >> 11) + rows[:, None].astype(float))
    found = integers * np.repeat(scale, 32, axis=1)[:, :33]
    assert np.array_equal(found, expert.down.dequantise())


def test_a_device_computes_the_same_from_the_file(device, folder, tmp_path):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((5, H), np.float32), rng.random((5, 2), np.float32)
    ids = rng.integers(0, E, (5, 2))
    stacks = float_experts(E, H, I, seed=4)
    loaded = device.load_experts(np.concatenate([stacks["gate"], stacks["up"]], axis=1),
                                 stacks["down"])
    with open_checkpoint(folder) as checkpoint:
        import_checkpoint(checkpoint, tmp_path / "experts")
    with open_quantised(tmp_path / "experts") as file:
        from_file = device.load_quantised(file.layers[4], grid_exponent=loaded.grid_exponent)
    assert np.array_equal(from_file(x, ids, weights), loaded(x, ids, weights))


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", float_experts(2, 64, 32), Kind.Q4_1)
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(InexactWeights, match="must have no minimum to become int4_g32"):
            import_checkpoint(checkpoint, tmp_path / "experts", exact=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]
        with pytest.raises(OutputError, match="output must go to a place that can be written"):
            import_checkpoint(checkpoint, tmp_path / "nowhere" / "experts")
        with pytest.raises(ForeignCheckpoint, match=r"layer must be one with experts of .*, 0, n"):
            import_checkpoint(checkpoint, tmp_path / "experts", layers=[3])


@pytest.fixture
def written(folder, tmp_path):
    with open_checkpoint(folder) as checkpoint:
        import_checkpoint(checkpoint, tmp_path / "experts", "mxfp4", layers=[1])
    with safe_open(tmp_path / "experts", "numpy") as file:
        return tmp_path / "experts", load_file(tmp_path / "experts"), file.metadata()


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda t, m: t.pop("layers.1.down.scales"), DamagedCheckpoint,
     "tensor 'layers.1.down.scales' must be in .*experts, but is not"),
    (lambda t, m: t.update({"layers.1.down.scales": t["layers.1.down.scales"][:, :, :0]}),
     DamagedCheckpoint, r"'layers.1.down.scales' \(U8 \[3, 96, 0\] at byte \d+ of .* must be U8"),
    (lambda t, m: m.update(format="other"), ForeignCheckpoint, "must be a file of 'moeaccel-exp"),
    (lambda t, m: m.update(version="3"), ForeignCheckpoint, "version 1 or 2, not .*, 3;"),
    (lambda t, m: m.update(weight_format="int3"), DamagedCheckpoint, "must be one of mxint8"),
    (lambda t, m: m.update(layers="[3]"), DamagedCheckpoint, "must have a weight_format and lay"),
    (lambda t, m: m.update(layers=json.dumps([json.loads(m["layers"])[0] | {"experts": 0}])),
     DamagedCheckpoint, "must have positive dimensions"),
    (lambda t, m: m.update(layers=json.dumps([json.loads(m["layers"])[0] | {"activation": "x"}])),
     DamagedCheckpoint, "layer 1 in the metadata of .*activation must be one of"),
    (lambda t, m: m.update(layers=json.dumps([json.loads(m["layers"])[0] | {"limit": "7"}])),
     DamagedCheckpoint, "layer 1 in the metadata of .*limit must be a positive number"),
    (lambda t, m: m.update(layers=json.dumps([json.loads(m["layers"])[0] | {"down_biased": 1}])),
     DamagedCheckpoint, "must have biases, true or false"),
])
def test_other_files_are_refused(written, change, error, message):
    path, tensors, metadata = written
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(error, match=message):
        open_quantised(path)


def test_scales_that_the_format_has_not_are_found_when_they_are_loaded(device, written):
    path, tensors, metadata = written
    tensors["layers.1.down.scales"][2, 5, 0] = 99
    save_file(tensors, path, metadata)
    with open_quantised(path) as file, pytest.raises(
            ValueError, match="down of expert 2: shift of mxfp4 must be from 0 to 15, but row 5"):
        device.load_quantised(file.layers[1])
