from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from moeaccel.formats import check_matrix
from moeaccel.host.importers import Coded, InexactWeights, open_checkpoint
from moeaccel.host.importers.coded import convert
from moeaccel.host.importers.families.gguf_blocks import _coded
from tests.support.checkpoints import float_experts, write_gguf

E, H, I = 2, 512, 256
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.MXFP4,
         Kind.TQ2_0]


def reference(path):
    """Return the stacks of a file as the package gguf dequantises them."""
    return {t.name.removeprefix("blk.0.ffn_").removesuffix("_exps.weight"):
            gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_are_those_that_the_reference_reads(tmp_path, kind):
    path = write_gguf(tmp_path / "model.gguf", float_experts(E, H, I), kind)
    expected = reference(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.layers[0].num_experts == E
        for e in range(E):
            for part, matrix in zip(("gate", "up", "down"), checkpoint.matrices(0, e), strict=True):
                found = matrix.floats() if isinstance(matrix, Coded) else matrix
                assert np.array_equal(found, expected[part][e])


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
                                  Kind.IQ4_XS, Kind.NVFP4], ids=lambda kind: kind.name)
def test_blocks_that_the_reference_cannot_write_are_dequantised_by_it(tmp_path, kind):
    """Random blocks, with scales that are finite."""
    rng = np.random.default_rng(0)
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "qwen3moe")
    for part, (n, k) in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
        data = rng.integers(0, 256, (1, n, k // size, block_bytes), dtype=np.uint8)
        data[..., 1::2] &= 0x3B  # no half has the exponent of infinity, wherever they are
        writer.add_tensor(f"blk.3.ffn_{part}_exps.weight", data.reshape(1, n, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "k.gguf") as checkpoint:
        (expert, fit), = checkpoint.experts(3, "int4_g32")
        check_matrix(expert.gate_up)
        assert fit.requantised == fit.groups and 0 < fit.relative_error < 0.2


def test_mxfp4_is_exact(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", float_experts(E, H, I), Kind.MXFP4)
    expected = reference(path)
    with open_checkpoint(path) as checkpoint:
        for e, (expert, fit) in enumerate(checkpoint.experts(0, "mxfp4", exact=True)):
            assert fit.exact and fit.relative_error == 0 and fit.total > 0
            assert np.array_equal(expert.gate_up.dequantise()[0::2], expected["gate"][e])
            assert np.array_equal(expert.gate_up.dequantise()[1::2], expected["up"][e])
            assert np.array_equal(expert.down.dequantise(), expected["down"][e])


def test_q4_0_is_exact_where_its_scale_is_positive(tmp_path):
    stacks = float_experts(E, H, I)
    path = write_gguf(tmp_path / "m.gguf", stacks, Kind.Q4_0)
    raw = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        (expert, fit), *_ = checkpoint.experts(0, "int4_g32")
    blocks = np.array(raw["blk.0.ffn_down_exps.weight"][0]).reshape(H, I // 32, 18)
    scale = blocks[:, :, :2].copy().view(np.float16)[:, :, 0].astype(np.float64)
    codes = np.concatenate([blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4], axis=2)
    positive = scale > 0
    assert 0.4 < positive.mean() < 0.6
    down = expert.down
    assert np.array_equal(down.integers.reshape(H, -1, 32)[positive],
                          codes[positive].astype(int) - 8)
    stored = np.ldexp(down.significand.astype(float), down.shift + down.row_exponent[:, None])
    assert np.array_equal(stored[positive], scale[positive])
    assert 0.4 < fit.requantised / fit.groups < 0.6
    assert 0.02 < fit.relative_error < 0.06
    with open_checkpoint(path) as checkpoint, pytest.raises(InexactWeights, match=(
            r"gate of expert 0 of layer 0 of .*m.gguf must have integers that int4_g32 has to "
            r"become int4_g32 exactly, but row 0, group \d+ has not")):
        list(checkpoint.experts(0, "int4_g32", exact=True))


def test_q4_0_is_exact_with_zero_points(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", float_experts(E, H, I), Kind.Q4_0)
    expected = reference(path)
    with open_checkpoint(path) as checkpoint:
        for e, (expert, fit) in enumerate(checkpoint.experts(0, "int4_g32_zp")):
            assert fit.requantised == 0 and fit.coarsened < 0.02 * fit.groups
            assert fit.relative_error < 1e-4
            assert np.allclose(expert.down.dequantise(), expected["down"][e], atol=1e-4)


def test_q4_1_is_exact_with_minima(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", float_experts(E, H, I), Kind.Q4_1)
    expected = reference(path)
    with open_checkpoint(path) as checkpoint:
        for e, (expert, fit) in enumerate(checkpoint.experts(0, "int4_g32_min")):
            check_matrix(expert.gate_up)
            assert fit.requantised == 0 and fit.coarsened < 0.01 * fit.groups
            assert fit.relative_error < 1e-5
            # What rounding of float32 leaves, of a weight that is a sum.
            down, same = expert.down.dequantise().astype(np.float32), expected["down"][e]
            assert (down == same).mean() > 0.99 and np.allclose(down, same, atol=1e-4)
    blocks = np.tile(np.array([[0x3C00, 0xC700]], np.uint16).view(np.uint8), (64, 1, 1))  # 1, -7
    coded = _coded("Q4_1", np.concatenate([blocks, np.full((64, 1, 16), 0xF0, np.uint8)], axis=2))
    matrix, fit = convert(coded, "int4_g32_min", exact=True)
    assert fit.exact and set(matrix.dequantise().reshape(-1)) == {-7, 8}
    with pytest.raises(InexactWeights, match="must have no minimum to become int4_g32_zp exactly"):
        convert(coded, "int4_g32_zp", exact=True)
    fine = replace(coded, minimum=np.full((64, 1), 1 + 2.0**-11))
    with pytest.raises(InexactWeights, match="one minimum of at most 11 bits for each 32 weights"):
        convert(fine, "int4_g32_min", exact=True)


def test_tq2_0_is_exact_in_ternary(tmp_path):
    stacks = float_experts(1, 256, 256)
    path = write_gguf(tmp_path / "m.gguf", stacks, Kind.TQ2_0)
    expected = reference(path)
    with open_checkpoint(path) as checkpoint:
        (expert, fit), = checkpoint.experts(0, "ternary_g256", exact=True)
    assert fit.exact
    assert np.array_equal(expert.down.dequantise(), expected["down"][0])
    assert np.array_equal(expert.gate_up.dequantise()[0::2], expected["gate"][0])


def test_q8_0_in_int8_with_real_scales(tmp_path):
    """Scales of a row span few powers of two: integers stay, most scales, too."""
    path = write_gguf(tmp_path / "m.gguf", float_experts(1, H, I), Kind.Q8_0)
    with open_checkpoint(path) as checkpoint:
        (expert, fit), = checkpoint.experts(0, "int8_g32")
    check_matrix(expert.down)
    assert fit.requantised == 0 and fit.coarsened < 0.01 * fit.groups
    assert fit.relative_error < 1e-4


@pytest.mark.parametrize(("kind", "name", "error"), [
    (Kind.Q8_0, "mxint8", 0.0087), (Kind.Q4_1, "int4_g32", 0.087), (Kind.Q8_0, "int4_g32", 0.09)])
def test_what_is_quantised_again_costs_what_is_stated(tmp_path, kind, name, error):
    path = write_gguf(tmp_path / "m.gguf", float_experts(1, H, I), kind)
    with open_checkpoint(path) as checkpoint:
        (_, fit), = checkpoint.experts(0, name)
    assert fit.requantised > 0.99 * fit.groups  # some scales are powers of two by chance
    assert 0.9 * error < fit.relative_error < error


def test_q8_0_with_scales_that_are_powers_of_two_is_exact_in_mxint8(tmp_path):
    rng = np.random.default_rng(0)
    stacks = {part: (rng.choice([-127, 127, 5], stack.shape) * np.exp2(
        rng.integers(-9, -5, (*stack.shape[:2], 1)))).astype(np.float32)
        for part, stack in float_experts(1, 64, 32).items()}
    path = write_gguf(tmp_path / "m.gguf", stacks, Kind.Q8_0)
    with open_checkpoint(path) as checkpoint:
        (expert, fit), = checkpoint.experts(0, "mxint8", exact=True)
    assert fit.exact
    assert np.array_equal(expert.down.dequantise(), stacks["down"][0])
