"""Checkpoints of small models, written with the reference packages."""

import json

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

HF_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def shapes(d_model, d_expert):
    return {"gate": (d_expert, d_model), "up": (d_expert, d_model), "down": (d_model, d_expert)}


def float_experts(experts, d_model, d_expert, seed=0):
    """Return a dict of part to (E, n, K) float32."""
    rng = np.random.default_rng(seed)
    return {part: (rng.standard_normal((experts, *shape)) / 8).astype(np.float32)
            for part, shape in shapes(d_model, d_expert).items()}


def write_safetensors(folder, tensors, config=None):
    """Write a folder as Hugging Face has it; NumPy arrays and torch tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: torch.from_numpy(np.array(t, order="C")) if isinstance(t, np.ndarray)
             else t.clone() for name, t in tensors.items()}
    save_file(whole, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def expert_stems(experts, layer=0):
    """Yield (part, expert, stem) as Qwen3-MoE names them."""
    for e in range(experts):
        for part, name in HF_PARTS.items():
            yield part, e, f"model.layers.{layer}.mlp.experts.{e}.{name}"


def write_gguf(path, stacks, kind, *, layer=0):
    """Write (E, n, K) stacks of gate, up and down, quantised by the package gguf."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "<eos>"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_uint32("qwen3moe.expert_count", len(stacks["gate"]))
    for part, stack in stacks.items():
        writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight",
                          gguf.quants.quantize(stack, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
