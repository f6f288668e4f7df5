import numpy as np
import pytest
import torch

from moeaccel.formats import check_matrix
from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.importers import ForeignCheckpoint, InexactWeights, open_checkpoint
from moeaccel.host.importers.families.fp4 import e4m3, power_of_two
from tests.support.checkpoints import expert_stems, shapes, write_safetensors

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


def test_biases_are_refused_unless_they_are_to_be_left_out(tmp_path):
    tensors, _ = gpt_oss()
    name = "model.layers.7.mlp.experts.down_proj_bias"
    tensors[name] = torch.ones(E, H, dtype=torch.bfloat16)
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        assert checkpoint.layers[7].biases == (name,)
        with pytest.raises(UnsupportedExperts, match=f"'{name}' is there; drop_biases=True leaves"):
            next(checkpoint.experts(7, "mxfp4"))
        assert next(checkpoint.experts(7, "mxfp4", drop_biases=True))[1].exact


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
