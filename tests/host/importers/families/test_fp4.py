import numpy as np
import pytest
import torch

from moeaccel.formats import check_matrix
from moeaccel.host import open_device
from moeaccel.host.importers import (
    ForeignCheckpoint,
    InexactWeights,
    import_checkpoint,
    open_checkpoint,
    open_quantised,
)
from moeaccel.host.importers.families.fp4 import e4m3, power_of_two
from tests.support.checkpoints import expert_stems, float_experts, shapes, write_safetensors

E, H, I = 2, 96, 64
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def gpt_oss(seed=0, low=118, high=133):
    """Return tensors as gpt-oss has them, and the float stacks they mean."""
    rng = np.random.default_rng(seed)
    tensors, floats = {}, {}
    for part, n, k in (("gate_up", 2 * I, H), ("down", H, I)):
        blocks = rng.integers(0, 256, (E, n, k // 32, 16), dtype=np.uint8)
        scales = rng.integers(low, high, (E, n, k // 32), dtype=np.uint8)
        tensors[f"model.layers.7.mlp.experts.{part}_proj_blocks"] = blocks
        tensors[f"model.layers.7.mlp.experts.{part}_proj_scales"] = scales
        values = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1).reshape(E, n, -1, 32)
        floats[part] = (values * 2.0 ** (scales.astype(int)[..., None] - 127)).reshape(E, n, k)
    return tensors, floats


def test_gpt_oss_blocks_are_exact_and_their_rows_stay_interleaved(tmp_path):
    tensors, floats = gpt_oss()
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        assert checkpoint.layers[7].d_model == H and checkpoint.layers[7].d_expert == I
        for e, (expert, fit) in enumerate(checkpoint.experts(7, "mxfp4", exact=True)):
            assert fit.exact
            assert np.array_equal(expert.gate_up.dequantise(), floats["gate_up"][e])
            assert np.array_equal(expert.down.dequantise(), floats["down"][e])


def test_scales_beyond_16_powers_of_two_are_coarsened_or_refused(tmp_path):
    tensors, floats = gpt_oss(low=100, high=133)
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        (expert, fit), *_ = checkpoint.experts(7, "mxfp4")
        assert fit.requantised == 0 < fit.coarsened
        norm = np.linalg.norm(expert.gate_up.dequantise() - floats["gate_up"][0])
        assert norm < 1e-4 * np.linalg.norm(floats["gate_up"][0])
        with pytest.raises(InexactWeights, match="within 15 powers of two"):
            list(checkpoint.experts(7, "mxfp4", exact=True))


@pytest.mark.parametrize("down_first", [False, True])
def test_gpt_oss_is_imported_with_biases_activation_and_limit(tmp_path, down_first):
    """Bits of the imported file are those of the floats that it means."""
    tensors, floats = gpt_oss(low=122, high=124)
    rng = np.random.default_rng(4)
    stem = "model.layers.7.mlp.experts"
    biases = {part: torch.from_numpy(rng.standard_normal((E, n), np.float32)).bfloat16()
              for part, n in (("gate_up", 2 * I), ("down", H)) if part != "down" or down_first}
    tensors |= {f"{stem}.{part}_proj_bias": bias for part, bias in biases.items()}
    folder = write_safetensors(tmp_path / "model", tensors,
                               {"model_type": "gpt_oss", "swiglu_limit": 7.0})
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.layers[7].biases) == {f"{stem}.{part}_proj_bias" for part in biases}
        import_checkpoint(checkpoint, tmp_path / "file", "mxfp4", exact=True)
        left_out, _ = next(checkpoint.experts(7, "mxfp4", drop_biases=True))
        assert left_out.gate_up.bias is left_out.down.bias is None
    call = (rng.standard_normal((9, H), np.float32), rng.integers(0, E, (9, 2)),
            rng.random((9, 2), np.float32))
    with open_quantised(tmp_path / "file") as file, open_device("golden", config="small") as device:
        assert file.layers[7].summary.down_biased == down_first
        loaded = device.load_quantised(file.layers[7])
        gate_up = floats["gate_up"]
        halves = np.concatenate([gate_up[:, 0::2], gate_up[:, 1::2]], axis=1).astype(np.float32)
        rows = biases["gate_up"].float()
        plain = device.load_experts(
            halves, floats["down"].astype(np.float32), weight_format="mxfp4", activation="gpt_oss",
            limit=7.0, gate_up_bias=torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1),
            down_bias=biases["down"].float() if down_first else None, quantiser="amax",
            grid_exponent=loaded.grid_exponent)
        assert np.array_equal(loaded(*call), plain(*call))


def test_biases_of_experts_that_are_no_stack(tmp_path):
    stacks = float_experts(E, H, I)
    tensors, rng = {}, np.random.default_rng(1)
    for part, e, stem in expert_stems(E):
        tensors[f"{stem}.weight"] = stacks[part][e]
        if part != "gate":
            tensors[f"{stem}.bias"] = rng.standard_normal(len(stacks[part][e])).astype(np.float32)
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        expert, _ = list(checkpoint.experts(0, "mxint8"))[1]
        found = expert.gate_up.bias_values.reshape(I, 2)
        up, down = (torch.from_numpy(tensors[f"model.layers.0.mlp.experts.1.{part}_proj.bias"])
                    .bfloat16().float().numpy() for part in ("up", "down"))
        assert not found[:, 0].any() and np.array_equal(found[:, 1], up)
        assert np.array_equal(expert.down.bias_values, down)
    tensors["model.layers.0.mlp.experts.1.up_proj.bias"] = np.ones(3, np.float32)
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint, pytest.raises(
            ForeignCheckpoint, match=r"up_proj.bias' .* must have the shape \[64\] for the rows"):
        list(checkpoint.experts(0, "mxint8"))


@pytest.mark.parametrize(("code", "dtype"), [(255, "nan"), (0, "2**-127")])
def test_ends_of_e8m0(tmp_path, code, dtype):
    tensors, _ = gpt_oss()
    tensors["model.layers.7.mlp.experts.down_proj_scales"][1, 2, 0] = code
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        if code == 0:
            assert checkpoint.matrices(7, 1)[2].scales[2, 0] == 2.0**-128  # of doubled integers
            return
        with pytest.raises(ForeignCheckpoint, match=(
                r"mxfp4 weights of tensor '.*down_proj_blocks' .*: scales must be finite, but row "
                "2, group 0 holds nan")):
            checkpoint.matrices(7, 1)


@pytest.mark.parametrize(("writer", "exact"), [
    ("modelopt", False), ("compressed-tensors", False), ("modelopt", True)])
def test_nvfp4(tmp_path, writer, exact):
    """Exact where the matrix's number is a power of two; otherwise scales are rounded once."""
    rng = np.random.default_rng(0)
    tensors, floats = {}, {}
    for part, e, stem in expert_stems(E):
        n, k = shapes(H, I)[part]
        pairs = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
        scales = torch.from_numpy(rng.uniform(0.1, 400, (n, k // 16))).to(torch.float8_e4m3fn)
        whole = np.float32(2.0**-15 if exact else rng.uniform(1e-5, 1e-4))
        mark = "weight" if writer == "modelopt" else "weight_packed"
        tensors |= {f"{stem}.{mark}": pairs, f"{stem}.weight_scale": scales}
        if writer == "modelopt":
            tensors[f"{stem}.weight_scale_2"] = torch.tensor(whole)
        else:
            tensors[f"{stem}.weight_global_scale"] = torch.tensor([1 / whole])
            whole = 1 / (np.float32(1) / whole).astype(np.float64)
        values = np.stack([E2M1[pairs & 15], E2M1[pairs >> 4]], axis=-1).reshape(n, k)
        floats[part, e + E] = scales.float().numpy() * float(whole) / 2
        floats[part, e] = values * np.repeat(scales.float().numpy(), 16, axis=1) * float(whole)
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        for e in range(E):
            for part, matrix in zip(("gate", "up", "down"), checkpoint.matrices(0, e), strict=True):
                assert np.allclose(matrix.floats(), floats[part, e], rtol=1e-6)
        (_, fit), *_ = checkpoint.experts(0, "int4_g32")
        assert fit.requantised == fit.groups and fit.relative_error < 0.11
        for e, (expert, fit) in enumerate(checkpoint.experts(0, "nvfp4", exact=exact)):
            assert fit.requantised == 0 and fit.exact == exact
            found = {"gate": expert.gate_up[0::2], "up": expert.gate_up[1::2], "down": expert.down}
            check_matrix(expert.gate_up)
            for part, matrix in found.items():
                there = matrix.significand > 0
                codes = floats[part, e] / np.repeat(floats[part, e + E], 16, axis=1)
                assert np.array_equal(matrix.integers, np.rint(codes))
                assert there.mean() > 0.99
                error = np.linalg.norm(matrix.dequantise() - floats[part, e])
                assert error <= (0 if exact else 2**-11) * np.linalg.norm(floats[part, e])
        if not exact:
            with pytest.raises(InexactWeights, match="must have scales of at most 11 bits"):
                list(checkpoint.experts(0, "nvfp4", exact=True))


def test_compressed_tensors_mxfp4_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for part, _, stem in expert_stems(E):
        n, k = shapes(H, I)[part]
        tensors |= {f"{stem}.weight_packed": rng.integers(0, 256, (n, k // 2), dtype=np.uint8),
                    f"{stem}.weight_scale": rng.integers(115, 127, (n, k // 32), dtype=np.uint8)}
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        assert all(fit.exact for _, fit in checkpoint.experts(0, "mxfp4", exact=True))


def test_codes_of_8_bits_are_torchs():
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(e4m3(codes), expected, equal_nan=True)
    expected = torch.from_numpy(codes).view(torch.float8_e8m0fnu).double().numpy()
    assert np.array_equal(power_of_two(codes), expected, equal_nan=True)
