"""Dense Llama-like checkpoints as Mixtral ones whose experts are blocks of rows of each FFN.

A gated FFN is a sum over its hidden units, so that it may be cut along them: block e has rows of
gate and up, and the columns of down beside them. All blocks are chosen for each token, by a router
of zeros, which weighs each with ``1 / blocks``; down is multiplied by ``blocks``, a power of two:
in floats only the order of the sum is another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.formats import widened
from moeaccel.host.errors import InvalidOption, UnsupportedExperts
from moeaccel.host.importers.base import Contents
from moeaccel.host.importers.checkpoint import Checkpoint
from moeaccel.host.importers.coded import Coded
from moeaccel.host.importers.errors import ForeignCheckpoint
from moeaccel.host.importers.families import families

__all__ = ["experts_of_dense"]

_GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}
_ATTENTION = tuple(name for name in _GGUF_NAMES if not name.startswith("mlp."))
_GGUF_CONFIG = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}

_ROPE_THETA = 10000.0  # where nobody says


@dataclass(frozen=True)
class _Dense:
    """A dense checkpoint by the names that transformers has."""

    contents: Contents
    gguf: bool
    config: dict[str, Any]

    def __call__(self, name: str) -> NDArray[np.float32]:
        """Return a tensor, ``layers.3.mlp.up_proj``, as floats."""
        if not self.gguf:
            return _floats(self.contents, f"model.{name}" if name != "lm_head" else name)
        top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        if name in top:
            return _floats(self.contents, top[name])
        _, layer, part = name.split(".", 2)
        values = _floats(self.contents, f"blk.{layer}.{_GGUF_NAMES[part]}")
        heads = {"self_attn.q_proj": "num_attention_heads",
                 "self_attn.k_proj": "num_key_value_heads"}.get(part)
        if heads is None:
            return values
        if values.ndim != 2 or len(values) % (2 * self.config[heads]):
            raise ForeignCheckpoint(f"rows of {part} of layer {layer} must be a multiple of twice "
                                    f"{heads}, {self.config[heads]}, not {values.shape}")
        # llama.cpp rotates neighbours, transformers halves: rows of each head are sorted back.
        pairs = values.reshape(self.config[heads], -1, 2, values.shape[1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _floats(contents: Contents, stem: str) -> NDArray[np.float32]:
    for family in families():
        if stem + family.mark in contents.tensors and family.claims(contents, stem):
            matrix = family.read(contents, stem, None)
            return matrix.floats() if isinstance(matrix, Coded) else widened(matrix)
    raise ForeignCheckpoint(f"tensor {stem + '.weight'!r} must be in the checkpoint, but is not")


def _dense(checkpoint: Checkpoint) -> _Dense:
    contents, given = checkpoint.contents, checkpoint.contents.config
    gguf = "general.architecture" in given
    if gguf:
        found: dict[str, Any] = {"model_type": given["general.architecture"]} | {
            name: given.get(f"llama.{key}") for name, key in _GGUF_CONFIG.items()}
        rope: Mapping[str, Any] = {
            "rope_type": "default", "rope_theta": found.pop("rope_theta") or _ROPE_THETA}
        found |= {"rope_parameters": rope, "hidden_act": "silu",
                  "tie_word_embeddings": "output.weight" not in contents.tensors,
                  "bos_token_id": given.get("tokenizer.ggml.bos_token_id"),
                  "eos_token_id": given.get("tokenizer.ggml.eos_token_id")}
        # Llama 3.1's scaling is a tensor of factors.
        if "rope_freqs.weight" in contents.tensors or any(
                key.startswith("llama.rope.scaling") for key in given):
            raise UnsupportedExperts(f"{checkpoint.path} must have a RoPE without scaling; convert "
                                     "it with transformers, and give the folder")
    else:
        found = dict(given)
        found.setdefault("rope_parameters", _rope_parameters(given))
        found.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    if found.get("model_type") != "llama" or found.get("attention_bias") or found.get(
            "mlp_bias") or found.get("hidden_act", "silu") != "silu":
        raise UnsupportedExperts(
            f"{checkpoint.path} must be a model of the type llama with SiLU and without biases, "
            f"not {found.get('model_type')!r}")
    for name in _GGUF_CONFIG:
        if name == "rope_theta":
            continue
        value, kinds = found.get(name), int | float if name == "rms_norm_eps" else int
        if not value:
            raise ForeignCheckpoint(f"{name} must be in the configuration of {checkpoint.path}")
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 1 << 32:
            raise ForeignCheckpoint(f"{name} in the configuration of {checkpoint.path} must be a "
                                    f"positive number, not {value!r}")
    return _Dense(contents, gguf, found)


def _rope_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE of a configuration as transformers had it before version 5."""
    scaling = given.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ForeignCheckpoint(f"rope_scaling must be an object, not {scaling!r}")
    return {"rope_theta": given.get("rope_theta", _ROPE_THETA), **scaling,
            "rope_type": scaling.get("rope_type", scaling.get("type", "default"))}


def experts_of_dense(checkpoint: Checkpoint, folder: Path, *, blocks: int = 8,
                     progress: Callable[[int, int], None] | None = None) -> None:
    """Write a Mixtral checkpoint, in float32, that computes what a dense one does.

    Parameters
    ----------
    checkpoint : :class:`Checkpoint`
        Of a Llama-like model: a GGUF file, or a folder with safetensors.
    folder : :class:`Path`
        Which must exist; ``config.json`` and a file for each layer are written into it, one layer
        after another.
    blocks : :class:`int`
        Experts of a layer: a power of two up to 16 that divides the width of the FFN.
    progress : callable, optional
        Called with (layers written, layers in all).

    Raises
    ------
    UnsupportedExperts
        If it is another kind of model.
    CheckpointError
        Naming the tensor.
    InvalidOption
        If the FFN cannot be cut into as many blocks.
    """
    from safetensors.numpy import save_file

    dense = _dense(checkpoint)
    config = dense.config
    d_model, width = config["hidden_size"], config["intermediate_size"]
    if blocks not in (1, 2, 4, 8, 16) or width % blocks:
        raise InvalidOption(f"blocks must be a power of two up to 16 that divides the FFN's width, "
                            f"{width}, not {blocks!r}")
    part = width // blocks
    layers = config["num_hidden_layers"]
    where: dict[str, str] = {}

    def write(number: int, tensors: dict[str, NDArray[np.float32]]) -> None:
        name = f"model-{number:05d}.safetensors"
        save_file({key: np.ascontiguousarray(values) for key, values in tensors.items()},
                  folder / name, {"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    rest = {f"model.{name}.weight": dense(name) for name in ("embed_tokens", "norm")}
    if not config.get("tie_word_embeddings"):
        rest["lm_head.weight"] = dense("lm_head")
    vocabulary = len(rest["model.embed_tokens.weight"])
    write(0, rest)
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{name}.weight": dense(f"layers.{layer}.{name}")
                   for name in _ATTENTION}
        gate, up, down = (dense(f"layers.{layer}.mlp.{name}_proj")
                          for name in ("gate", "up", "down"))
        if not gate.shape == up.shape == down.shape[::-1] == (width, d_model):
            raise ForeignCheckpoint(
                f"FFN of layer {layer} of {checkpoint.path} must have matrices of {width} by "
                f"{d_model}, not {gate.shape}, {up.shape} and {down.shape}")
        moe = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = np.zeros((blocks, d_model), np.float32)
        for e in range(blocks):
            rows = slice(e * part, (e + 1) * part)
            tensors |= {f"{moe}.experts.{e}.w1.weight": gate[rows],
                        f"{moe}.experts.{e}.w3.weight": up[rows],
                        f"{moe}.experts.{e}.w2.weight": down[:, rows] * np.float32(blocks)}
        write(layer + 1, tensors)
        if progress is not None:
            progress(layer + 1, layers)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": where}))
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
        "dtype": "float32", "vocab_size": vocabulary, "intermediate_size": part,
        "num_local_experts": blocks, "num_experts_per_tok": blocks, "sliding_window": None,
    } | {name: config[name] for name in kept if name in config}, indent=2))
