"""Files are packed here number by number, as the formats are defined."""

import numpy as np
import pytest

from moeaccel.host.importers import Coded, ForeignCheckpoint, InexactWeights, open_checkpoint
from tests.support.checkpoints import expert_stems, shapes, write_safetensors

E, H, I, GROUP = 2, 128, 64, 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(values, axis, order=range(8)):
    """Pack eight numbers along an axis into each int32, the first in the lowest bits."""
    values = np.moveaxis(np.asarray(values, np.int64), axis, -1)
    words = values.reshape(*values.shape[:-1], -1, 8)
    packed = sum(words[..., column] << (4 * i) for i, column in enumerate(order))
    return np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis)


def matrices(zero=8, group=GROUP, seed=0):
    """Return codes, zero points and scales of each (part, expert)."""
    rng = np.random.default_rng(seed)
    found = {}
    for part, e, stem in expert_stems(E):
        n, k = shapes(H, I)[part]
        zeros = (np.full((n, k // group), zero) if zero is not None
                 else rng.integers(0, 16, (n, k // group)))
        scales = (rng.uniform(0.5, 1.9, (n, k // group)) / 100).astype(np.float16)
        found[part, e] = stem, rng.integers(0, 16, (n, k)), zeros, scales
    return found


def gptq(found, less=1, order=None, group=GROUP):
    tensors = {}
    for (part, _), (stem, codes, zeros, scales) in found.items():
        g_idx = np.arange(codes.shape[1]) // group
        if order is not None and part in order:
            columns = order[part]
            codes, g_idx = codes[:, np.argsort(columns)], g_idx[np.argsort(columns)]
        tensors |= {f"{stem}.qweight": pack(codes.T, 0), f"{stem}.scales": scales.T,
                    f"{stem}.qzeros": pack((zeros - less).T, 1),
                    f"{stem}.g_idx": g_idx.astype(np.int32)}
    return tensors


def awq(found):
    return {name: tensor for stem, codes, zeros, scales in found.values() for name, tensor in {
        f"{stem}.qweight": pack(codes.T, 1, AWQ_ORDER), f"{stem}.scales": scales.T,
        f"{stem}.qzeros": pack(zeros.T, 1, AWQ_ORDER)}.items()}


def packed(found, zero_points=False):
    tensors = {}
    for stem, codes, zeros, scales in found.values():
        tensors |= {f"{stem}.weight_packed": pack(codes, 1), f"{stem}.weight_scale": scales,
                    f"{stem}.weight_shape": np.array(codes.shape)}
        if zero_points:
            tensors[f"{stem}.weight_zero_point"] = pack(zeros, 0)
    return tensors


WRITERS = {"gptq": gptq, "awq": awq, "compressed-tensors int4": packed}


def check_exact(expert, found, e):
    """Hold device integers and scales to those of the checkpoint."""
    for part, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2)), ("down", None)):
        matrix = expert.down if rows is None else expert.gate_up[rows]
        _, codes, zeros, scales = found[part, e]
        each = np.repeat(zeros, codes.shape[1] // zeros.shape[1], axis=1)
        assert np.array_equal(matrix.integers, codes - each)
        stored = np.ldexp(matrix.significand.astype(float),
                          matrix.shift + matrix.row_exponent[:, None].astype(np.int32))
        ratio = scales.shape[1] / stored.shape[1]
        assert np.array_equal(stored, scales if ratio == 1 else np.repeat(
            scales, int(1 / ratio), axis=1))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("group", [32, 64])
def test_a_zero_point_of_8_is_exact(tmp_path, name, group):
    found = matrices(group=group)
    writer = WRITERS[name]
    tensors = writer(found, group=group) if name == "gptq" else writer(found)
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        assert checkpoint.layers[0].families == (name,)
        for e, (expert, fit) in enumerate(checkpoint.experts(0, "int4_g32", exact=True)):
            assert fit.exact
            check_exact(expert, found, e)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("group", "weight_format"), [(32, "int4_g32_zp"), (64, "int4_g32_zp")])
def test_any_zero_point_is_exact_where_the_format_has_them(tmp_path, name, group, weight_format):
    found = matrices(zero=None, group=group)
    tensors = {"gptq": lambda: gptq(found, less=0, group=group), "awq": lambda: awq(found),
               "compressed-tensors int4": lambda: packed(found, zero_points=True)}[name]()
    config = {"quantization_config": {"checkpoint_format": "gptq_v2"}}
    with open_checkpoint(write_safetensors(tmp_path, tensors, config)) as checkpoint:
        for e, (expert, fit) in enumerate(checkpoint.experts(0, weight_format, exact=True)):
            assert fit.exact
            check_exact(expert, found, e)


def test_a_zero_point_of_16_is_exact_where_no_weight_is_16_below_it(tmp_path):
    """The first version of GPTQ stores zero points less 1, so that they go from 1 to 16."""
    found = matrices(zero=16)
    for _, codes, _, _ in found.values():
        np.maximum(codes, 1, out=codes)
    with open_checkpoint(write_safetensors(tmp_path, gptq(found))) as checkpoint:
        for e, (expert, fit) in enumerate(checkpoint.experts(0, "int4_g32_zp", exact=True)):
            assert fit.exact
            check_exact(expert, found, e)
    found["down", 0][1][3, 5] = 0
    with open_checkpoint(write_safetensors(tmp_path, gptq(found))) as checkpoint:
        with pytest.raises(InexactWeights, match="integers that int4_g32_zp has"):
            list(checkpoint.experts(0, "int4_g32_zp", exact=True))


@pytest.mark.parametrize("name", WRITERS)
def test_other_zero_points_are_read_and_quantised_again(tmp_path, name):
    found = matrices(zero=None)
    writer = WRITERS[name]
    tensors = writer(found, zero_points=True) if "compressed" in name else writer(found)
    if name == "gptq":  # 0 is stored as -1 by the first version
        tensors = writer(found, less=0)
    config = {"quantization_config": {"checkpoint_format": "gptq_v2"}}
    folder = write_safetensors(tmp_path, tensors, config)
    with open_checkpoint(folder) as checkpoint:
        for part, matrix in zip(("gate", "up", "down"), checkpoint.matrices(0, 1), strict=True):
            _, codes, zeros, scales = found[part, 1]
            exact = (codes - np.repeat(zeros, GROUP, 1)) * np.repeat(scales, GROUP, 1).astype(float)
            assert np.allclose(matrix.floats(), exact, rtol=1e-6)
        (_, fit), *_ = checkpoint.experts(0, "int4_g32")
        assert 0.5 < fit.requantised / fit.groups < 1
        with pytest.raises(InexactWeights, match="must have integers that int4_g32 has"):
            list(checkpoint.experts(0, "int4_g32", exact=True))


def test_act_order_of_down_permutes_the_rows_of_gate_and_up(tmp_path):
    found = matrices()
    columns = np.random.default_rng(1).permutation(I).reshape(-1, GROUP)
    order = {"down": np.sort(columns, axis=1).reshape(-1)}
    folder = write_safetensors(tmp_path, gptq(found, order=order))
    with open_checkpoint(folder) as checkpoint:
        for e, (expert, fit) in enumerate(checkpoint.experts(0, "int4_g32", exact=True)):
            assert fit.exact
            columns = order["down"]
            moved = {(part, e): (None, *(a[columns] if part != "down" else a
                                         for a in found[part, e][1:]))
                     for part in ("gate", "up", "down")}
            check_exact(expert, moved, e)


def test_act_order_of_gate_or_up_is_quantised_again_or_refused(tmp_path):
    found = matrices()
    order = {"gate": np.random.default_rng(1).permutation(H)}
    folder = write_safetensors(tmp_path, gptq(found, order=order))
    with open_checkpoint(folder) as checkpoint:
        gate, *_ = checkpoint.matrices(0, 0)
        _, codes, _, scales = found["gate", 0]
        exact = (codes - 8) * np.repeat(scales, GROUP, axis=1).astype(np.float32)
        assert np.array_equal(gate.floats()[:, order["gate"]], exact)
        (_, fit), *_ = checkpoint.experts(0)
        assert fit.requantised == I * H // 32
        with pytest.raises(InexactWeights, match="columns in their order"):
            list(checkpoint.experts(0, exact=True))


def test_scales_beyond_a_rows_range_are_coarsened_counted_and_refused(tmp_path):
    found = matrices()
    _, _, _, scales = found["down", 0]
    scales[3] = np.float16(1000), np.float16(1.001)  # 2**10 apart, and 11 bits: beyond 6
    folder = write_safetensors(tmp_path, packed(found))
    with open_checkpoint(folder) as checkpoint:
        (expert, fit), *_ = checkpoint.experts(0)
        assert fit.requantised == 0 and fit.coarsened == 1 == expert.down.coarsened
        assert 0 < fit.relative_error < 1e-4
        with pytest.raises(InexactWeights, match=(
                r"down of expert 0 .* must have scales of each row within 6 powers of two, .* but "
                "row 3, group 1 has not")):
            list(checkpoint.experts(0, exact=True))


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("S.scales"), "tensor 'S.scales' must be in the checkpoint, but is not"),
    (lambda t: t.update({"S.g_idx": np.zeros(H, np.int32)}),
     r"gptq weights of tensor 'S.qweight' .* at byte \d+ of .*: g_idx must name each of 4 groups"),
    (lambda t: t.update({"S.qzeros": np.zeros((4, 7), np.int32)}), "'S.qzeros' .* must have the"),
    (lambda t: t.update({"S.scales": np.full((4, I), np.nan, np.float16)}),
     "scales must be finite, but row 0, group 0 holds nan"),
    (lambda t: t.update({"S.scales": np.zeros((3, I), np.float16)}), "groups of equal size of 128"),
    (lambda t: t.update({"S.qweight": np.zeros((16, I, 1), np.int32)}), "must have two dimensions"),
    (lambda t: t.update({"S.qweight": np.zeros((16, I))}), "must be of the type I32"),
])
def test_bad_tensors_are_named(tmp_path, change, message):
    stem = "model.layers.0.mlp.experts.0.gate_proj"
    tensors = {name.replace(stem, "S"): t for name, t in gptq(matrices()).items()}
    change(tensors)
    tensors = {name.replace("S.", f"{stem}."): t for name, t in tensors.items()}
    with pytest.raises(ForeignCheckpoint, match=message.replace("S.", f"{stem}.")):
        with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
            checkpoint.matrices(0, 0)


def test_eight_bits_are_refused(tmp_path):
    folder = write_safetensors(tmp_path, gptq(matrices()), {"quantization_config": {"bits": 8}})
    with open_checkpoint(folder) as checkpoint, pytest.raises(
            ForeignCheckpoint, match="must have weights of 4 bits, not 8"):
        checkpoint.matrices(0, 0)


def test_a_row_with_one_scale(tmp_path):
    found = matrices(group=32)
    found = {key: (stem, codes, zeros[:, :1], scales[:, :1])
             for key, (stem, codes, zeros, scales) in found.items()}
    with open_checkpoint(write_safetensors(tmp_path, packed(found))) as checkpoint:
        assert isinstance(checkpoint.matrices(0, 0)[0], Coded)
        for e, (expert, fit) in enumerate(checkpoint.experts(0, "int4_g128", exact=True)):
            assert fit.exact
            check_exact(expert, found, e)
