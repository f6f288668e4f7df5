import json

import numpy as np
import pytest
import torch

from moeaccel.host.errors import InvalidOption
from moeaccel.host.importers import (
    CheckpointError,
    ClosedCheckpoint,
    DamagedCheckpoint,
    ForeignCheckpoint,
    open_checkpoint,
)
from tests.support.checkpoints import expert_stems, float_experts, write_safetensors

E, H, I = 3, 64, 32
STACKS = float_experts(E, H, I)


def per_expert(layer=0):
    return {f"{stem}.weight": STACKS[part][e] for part, e, stem in expert_stems(E, layer)}


def check(folder, layer=0, dtype=np.float32):
    """Hold what is read to the stacks."""
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.layers) == [layer]
        found = checkpoint.layers[layer]
        assert (found.num_experts, found.d_model, found.d_expert) == (E, H, I)
        for e in range(E):
            for part, matrix in zip(("gate", "up", "down"), checkpoint.matrices(layer, e),
                                    strict=True):
                assert np.array_equal(matrix, STACKS[part][e].astype(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_size(tmp_path, dtype):
    tensors = {name: torch.from_numpy(t).to(dtype) for name, t in per_expert().items()}
    write_safetensors(tmp_path, tensors)
    with open_checkpoint(tmp_path) as checkpoint:
        gate, *_ = checkpoint.matrices(0, 2)
        assert gate.dtype == np.float32
        assert np.array_equal(gate, torch.from_numpy(STACKS["gate"][2]).to(dtype).float().numpy())


def test_a_closed_checkpoint_says_so(tmp_path):
    write_safetensors(tmp_path, per_expert())
    with open_checkpoint(tmp_path) as checkpoint:
        waiting = checkpoint.experts(0, threads=1)
        next(waiting)
    message = "safetensors must be open to be read, but was closed; open it again"
    for read in (lambda: checkpoint.matrices(0, 0), lambda: checkpoint.expert(0, 0),
                 lambda: next(checkpoint.experts(0)), lambda: list(waiting)):
        with pytest.raises(ClosedCheckpoint, match=message):
            read()


@pytest.mark.parametrize(("threads", "message"), [
    (0, "threads must be at least 1, not 0"), (-2, "at least 1, not -2"),
    ("2", "threads must be a whole number, at least 1, not '2'")])
def test_threads_are_one_or_more(tmp_path, threads, message):
    write_safetensors(tmp_path, per_expert())
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(InvalidOption, match=message):
            checkpoint.experts(0, threads=threads)
        assert len(list(checkpoint.experts(0, threads=1))) == E


def test_names_of_mixtral_beside_what_is_no_expert(tmp_path):
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    tensors = {f"model.layers.5.block_sparse_moe.experts.{e}.{name}.weight": STACKS[part][e]
               for part, name in names.items() for e in range(E)}
    tensors |= {f"model.layers.5.mlp.{name}.{part}_proj.weight": np.ones((4, 4), np.float32)
                for name in ("shared_experts", "shared_expert") for part in STACKS}
    tensors["model.layers.5.block_sparse_moe.gate.weight"] = np.ones((E, H), np.float32)
    check(write_safetensors(tmp_path, tensors), 5)


@pytest.mark.parametrize("transposed", [False, True])
def test_gate_and_up_in_one_stack_either_way_round(tmp_path, transposed):
    both = np.concatenate([STACKS["gate"], STACKS["up"]], axis=1)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": both,
               "model.layers.0.mlp.experts.down_proj": STACKS["down"]}
    if transposed:
        tensors = {name: t.transpose(0, 2, 1) for name, t in tensors.items()}
    check(write_safetensors(tmp_path, tensors))


def test_gpt_oss_in_floats_alternates_gate_and_up(tmp_path):
    both = np.stack([STACKS["gate"], STACKS["up"]], axis=2).reshape(E, 2 * I, H)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": both.transpose(0, 2, 1),
               "model.layers.0.mlp.experts.down_proj": STACKS["down"].transpose(0, 2, 1)}
    check(write_safetensors(tmp_path, tensors, {"model_type": "gpt_oss"}))


def test_stacks_of_their_own_are_transposed_by_the_models_width(tmp_path):
    tensors = {f"model.layers.0.mlp.experts.{part}_proj": stack.transpose(0, 2, 1)
               for part, stack in STACKS.items()}
    check(write_safetensors(tmp_path, tensors, {"hidden_size": H}))


def test_shards(tmp_path):
    tensors = per_expert()
    names = sorted(tensors)
    for shard, part in (("a", names[:4]), ("b", names[4:])):
        write_safetensors(tmp_path, {name: tensors[name] for name in part})
        (tmp_path / "model.safetensors").rename(tmp_path / f"{shard}.safetensors")
    check(tmp_path)  # without an index: all of the folder
    write_safetensors(tmp_path, {"model.layers.9.mlp.experts.0.gate_proj.weight": np.ones((1, 1))})
    index = {"weight_map": {name: f"{'a' if i < 4 else 'b'}.safetensors"
                            for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("model.layers.0.mlp.experts.1.up_proj.weight"),
     "up of expert 1 of layer 0 must be in .*, which has 8 matrices of this layer, but is not"),
    (lambda t: t.update({"model.layers.0.mlp.experts.1.up_proj.weight": STACKS["down"][1]}),
     (r"'model.layers.0.mlp.experts.1.up_proj.weight' .* at byte \d+ of .* must be a matrix "
      r"\[32, 64\] for up of expert 1, with H = 64 and I = 32 by the others, not \[64, 32\]")),
    (lambda t: t.update({"model.layers.0.mlp.experts.0.up_proj.weight": STACKS["down"]}),
     r"must be a matrix without empty dimensions, not of the shape \[3, 64, 32\]"),
    (lambda t: t.update({"model.layers.0.mlp.experts.0.up_proj.weight": np.ones((32, 64), int)}),
     "must be stored in one of the ways .*gptq.*floats; convert the checkpoint to bfloat16"),
    (lambda t: t.update({"model.layers.0.mlp.experts.down_proj": STACKS["down"]}),
     "experts of layer 0 of .* must all be stacked"),
    (lambda t: t.update({"layers.0.mlp.experts.1.up_proj.weight": STACKS["up"][1]}),
     "up of layer 0 must be in .* once, not as both 'layers.0"),
    (lambda t: t.update({"model.layers.0.mlp.experts.999999.up_proj.weight": STACKS["up"][1]}),
     "gate of expert 3 of layer 0 must be in"),
])
def test_experts_that_do_not_fit_together_are_named(tmp_path, change, message):
    tensors = per_expert()
    change(tensors)
    with pytest.raises(ForeignCheckpoint, match=message):
        open_checkpoint(write_safetensors(tmp_path, tensors))


def test_weights_that_are_not_finite_are_named(tmp_path):
    tensors = per_expert()
    tensors["model.layers.0.mlp.experts.1.down_proj.weight"] = STACKS["down"][1].copy()
    tensors["model.layers.0.mlp.experts.1.down_proj.weight"][7, 3] = np.inf
    with open_checkpoint(write_safetensors(tmp_path, tensors)) as checkpoint, pytest.raises(
            CheckpointError, match=r"down of expert 1 of layer 0 of .* must be finite, but row 7, "
                                   "column 3 holds inf"):
        list(checkpoint.experts(0))


@pytest.mark.parametrize(("files", "error", "message"), [
    ({}, ForeignCheckpoint, r"must hold \*.safetensors, but has none"),
    ({"pytorch_model.bin": "x"}, ForeignCheckpoint, r"but has pytorch_model.bin; .* pickles"),
    ({"model.safetensors.index.json": '{"weight_map": {"a": "../x"}}'}, DamagedCheckpoint,
     "must name a file of its folder for each tensor"),
    ({"model.safetensors.index.json": '{"weight_map": {"a": "gone.safetensors"}}'},
     DamagedCheckpoint, "gone.safetensors must be a file that can be read: No such file"),
    ({"model.safetensors.index.json": "{"}, DamagedCheckpoint, "index.json must be JSON, but"),
])
def test_folders_that_are_no_checkpoint(tmp_path, files, error, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)


def test_a_damaged_configuration_is_named(tmp_path):
    write_safetensors(tmp_path, per_expert())
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(DamagedCheckpoint, match=r"config.json must be JSON, but"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path):
    write_safetensors(tmp_path, per_expert())
    path = tmp_path / "model.safetensors"
    with open_checkpoint(path) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 5000)
        with pytest.raises(DamagedCheckpoint, match=(
                r"tensor 'model.layers.0.mlp.experts.\d.\w+.weight' must be 8192 bytes at byte "
                r"\d+ of .*, which ends at \d+; it is truncated")):
            list(checkpoint.experts(0))
