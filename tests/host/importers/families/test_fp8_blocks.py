import pytest
import torch

from moeaccel.host.importers import Coded, ForeignCheckpoint, open_checkpoint
from tests.support.checkpoints import expert_stems, shapes, write_safetensors

E, H, I = 2, 192, 160


def quantised(weight, rows, columns):
    """Return FP8 codes, scales of blocks, and the floats they mean."""
    n, k = weight.shape
    grid = torch.zeros(-(-n // rows), -(-k // columns))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            grid[i, j] = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns
                                ].abs().max() / 448
    each = grid.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    codes = (weight / each).to(torch.float8_e4m3fn)
    return codes, grid, codes.float() * each


@pytest.mark.parametrize(("rows", "columns", "name"), [
    (128, 128, "weight_scale_inv"), (1, 1 << 20, "weight_scale"), (1 << 20, 1 << 20,
                                                                  "weight_scale")])
def test_blocks_rows_and_whole_matrices(tmp_path, rows, columns, name):
    generator = torch.Generator().manual_seed(0)
    tensors, floats = {}, {}
    for part, e, stem in expert_stems(E):
        weight = torch.randn(shapes(H, I)[part], generator=generator)
        tensors[f"{stem}.weight"], scale, floats[part, e] = quantised(weight, rows, columns)
        tensors[f"{stem}.{name}"] = scale.reshape(()) if scale.numel() == 1 else scale
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        for e in range(E):
            for part, matrix in zip(("gate", "up", "down"), checkpoint.matrices(0, e), strict=True):
                assert not isinstance(matrix, Coded)
                assert (matrix == floats[part, e].numpy()).all()
        (_, fit), *_ = checkpoint.experts(0, "mxint8")
        assert fit.requantised == fit.groups and fit.relative_error < 0.009


def test_stacked_experts_have_their_own_scales(tmp_path):
    """One number for each of as many experts as divide K is none for columns."""
    stem, codes = "model.layers.0.mlp.experts", torch.ones(4, 64, 32).to(torch.float8_e4m3fn)
    tensors = {f"{stem}.gate_up_proj": codes, f"{stem}.down_proj": codes.transpose(1, 2)[
        :, :, :32].contiguous(), f"{stem}.gate_up_proj_scale": torch.arange(1.0, 5),
        f"{stem}.down_proj_scale": torch.tensor([2.0])}
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint:
        for e in range(4):
            gate, up, down = checkpoint.matrices(0, e)
            assert (gate == e + 1).all() and (up == e + 1).all() and (down == 2).all()
    tensors[f"{stem}.gate_up_proj_scale"] = torch.ones(2, 8)
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint, pytest.raises(
            ForeignCheckpoint, match="must have scales for each of 4 experts, or one for all"):
        checkpoint.matrices(0, 0)


@pytest.mark.parametrize(("scale", "message"), [
    (torch.ones(3, 2),
     (r"fp8 weights of tensor '.*gate_proj.weight' \(F8_E4M3 \[160, 192\] at byte \d+ of .*\): "
      r"FP8 weights of \(160, 192\) must have a scale for each block")),
    (None, "weight_scale' must be in the checkpoint"),
])
def test_scales_that_do_not_fit_are_named(tmp_path, scale, message):
    tensors = {}
    for part, _, stem in expert_stems(1):
        tensors[f"{stem}.weight"] = torch.zeros(shapes(H, I)[part]).to(torch.float8_e4m3fn)
        if scale is not None:
            tensors[f"{stem}.weight_scale_inv"] = scale
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint, pytest.raises(
            ForeignCheckpoint, match=message):
        checkpoint.matrices(0, 0)
