import dataclasses
import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moeaccel.config import PRESETS
from moeaccel.errors import OutputError
from moeaccel.formats import FORMATS
from moeaccel.host.errors import InvalidOption
from moeaccel.host.importers import (
    DamagedCheckpoint,
    ForeignCheckpoint,
    InexactWeights,
    import_checkpoint,
    open_checkpoint,
    open_quantised,
)
from moeaccel.image import Expert, build_image, unpack_image
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


@pytest.mark.parametrize("config", ["small", "hbm32"])
def test_the_reference_reads_the_file_as_it_is_documented(folder, tmp_path, config):
    path, made_for = tmp_path / "experts", PRESETS[config]
    with open_checkpoint(folder) as checkpoint:
        import_checkpoint(checkpoint, path, "int4_g32", config=config, layers=[4])
        (expert, _), *_ = checkpoint.experts(4, "int4_g32")
    tensors, floats = load_file(path), float_experts(E, H, I, seed=4)
    assert {name.split(".")[1] for name in tensors} == {"4"}
    parts = tensors["layers.4.images"][0]
    for channel, part in enumerate(parts):
        assert np.array_equal(part, build_image(
            expert.gate_up, expert.down, made_for.row_multipliers, channel=channel,
            channels=made_for.channels))
    assert len(parts) == made_for.channels and same(unpack_image(*parts).down.cut(H, I),
                                                    expert.down)
    squares = floats["down"][0].astype(float) ** 2
    assert np.allclose(tensors["layers.4.down.rows"][0], squares.sum(axis=1), rtol=1e-5)
    assert np.allclose(tensors["layers.4.down.columns"][0], squares.sum(axis=0), rtol=1e-5)
    error = (expert.down.dequantise() - floats["down"][0]) ** 2
    assert tensors["layers.4.down.error"][0] == pytest.approx(error.sum(), rel=1e-4)
    begin = path.read_bytes().find(parts[0][:64].tobytes())
    assert begin % 4096 == 0


def test_a_device_computes_the_same_from_the_file(device, folder, tmp_path, caplog):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((5, H), np.float32), rng.random((5, 2), np.float32)
    ids = rng.integers(0, E, (5, 2))
    stacks = float_experts(E, H, I, seed=4)
    floats = np.concatenate([stacks["gate"], stacks["up"]], axis=1), stacks["down"]
    loaded = device.load_experts(*floats, shared=(floats[0][0], floats[1][0]))
    found = {}
    with open_checkpoint(folder) as checkpoint:
        for config in ("small", "hbm32"):
            import_checkpoint(checkpoint, tmp_path / config, config=config)
    extra = Expert.quantise(floats[0][0], floats[1][0], "int4_g32")
    for config in ("hbm32", "small"):
        with open_quantised(tmp_path / config) as file:
            assert file.array.config == config
            found[config] = device.load_quantised(file.layers[4], shared=[extra])
        # What is for other arrays is said, and encoded again.
        assert ("images of layer 4 of" in caplog.text) == (config == "hbm32")
        caplog.clear()
    for each in found.values():
        assert np.array_equal(each(x, ids, weights), loaded(x, ids, weights))
        assert each.grid_exponent == loaded.grid_exponent and each.report.groups
        assert each.report.coarsened == loaded.report.coarsened
    with open_quantised(tmp_path / "small") as file:
        alone = device.load_quantised(file.layers[4], activation="relu")
        again = device.load_experts(*floats, activation="relu")
    assert alone.report.relative_error == pytest.approx(again.report.relative_error, rel=1e-4)
    assert np.array_equal(alone(x, ids, weights), again(x, ids, weights))


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
        with pytest.raises(InvalidOption, match="layers must name one at least"):
            import_checkpoint(checkpoint, tmp_path / "experts", layers=[])


@pytest.fixture
def written(folder, tmp_path):
    with open_checkpoint(folder) as checkpoint:
        import_checkpoint(checkpoint, tmp_path / "experts", "mxfp4", layers=[1])
    with safe_open(tmp_path / "experts", "numpy") as file:
        return tmp_path / "experts", load_file(tmp_path / "experts"), file.metadata()


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda t, m: t.pop("layers.1.down.rows"), DamagedCheckpoint,
     "tensor 'layers.1.down.rows' must be in .*experts, but is not"),
    (lambda t, m: t.update({"layers.1.images": t["layers.1.images"][:, :0]}),
     DamagedCheckpoint, r"'layers.1.images' \(U8 \[3, 0, \d+\] at byte \d+ of .* must be U8"),
    (lambda t, m: m.update(format="other"), ForeignCheckpoint, "must be a file of 'moeaccel-exp"),
    (lambda t, m: m.update(version="2"), ForeignCheckpoint,
     "version 3, not .*, 2; write it with `moeaccel import`"),
    (lambda t, m: m.update(array=m["array"].replace('"image": ', '"image": 1')), ForeignCheckpoint,
     r"images of .*experts must be of version \d, not 1\d; write it again with"),
    (lambda t, m: m.update(array=m["array"].replace('"channels": 1', '"channels": 3')),
     DamagedCheckpoint, "array in the metadata of .* must have row_multipliers from 1 to 255"),
    (lambda t, m: m.update(array="{}"), DamagedCheckpoint, "must have a weight_format, an array"),
    (lambda t, m: m.update(weight_format="int3"), DamagedCheckpoint, "must be one of mxint8"),
    (lambda t, m: m.update(layers="[3]"), DamagedCheckpoint, "an array and layers, but: "),
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


@pytest.mark.parametrize("place", [20, 5000])
def test_damaged_images_are_named_when_they_are_loaded(device, written, place):
    path, tensors, metadata = written
    tensors["layers.1.images"][2, 0, place] ^= 4
    save_file(tensors, path, metadata)
    with open_quantised(path) as file:
        with pytest.raises(DamagedCheckpoint, match=(
                r"image of expert 2 of layer 1 at byte \d+ of .*experts: image")):
            device.load_quantised(file.layers[1])
        assert len(file.layers[1][:2]) == 2


def test_damaged_sums_are_named_when_they_are_loaded(device, written):
    path, tensors, metadata = written
    tensors["layers.1.down.rows"][1, 5] = np.nan
    save_file(tensors, path, metadata)
    with open_quantised(path) as file, pytest.raises(
            DamagedCheckpoint, match=r"sums of squares of down of expert 1 of layer 1 of .*exp"):
        device.load_quantised(file.layers[1])
