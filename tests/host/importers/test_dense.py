import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from moeaccel.errors import MoeAccelError
from moeaccel.host.errors import InvalidOption, UnsupportedExperts
from moeaccel.host.importers import ForeignCheckpoint, open_checkpoint
from moeaccel.host.importers.dense import experts_of_dense
from tests.support.checkpoints import write_safetensors

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
         "max_position_embeddings": 64}
IDS = torch.tensor([[5, 17, 3, 80, 2, 41]])


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
                         rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(params=["safetensors", "gguf"])
def source(request, tmp_path, llama):
    """Return the dense checkpoint, as transformers or as llama.cpp has it."""
    if request.param == "safetensors":
        llama.save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"
    path = tmp_path / "dense.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in llama.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # as llama.cpp's converter has them
            heads = 4 if "q_proj" in name else 2
            values = np.ascontiguousarray(values.reshape(heads, 2, -1, 64).swapaxes(1, 2)).reshape(
                values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("blocks", [1, 8])
def test_the_model_of_experts_gives_the_dense_ones_logits(tmp_path, llama, source, blocks):
    folder, seen = tmp_path / "moe", []
    folder.mkdir()
    with open_checkpoint(source) as checkpoint:
        experts_of_dense(checkpoint, folder, blocks=blocks,
                         progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]
    moe = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert moe.config.model_type == "mixtral" and moe.config.eos_token_id == 2
    with torch.no_grad():
        expected, found = llama(IDS).logits, moe(IDS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    with open_checkpoint(folder) as checkpoint:
        layer = checkpoint.layers[1]
        assert (layer.num_experts, layer.d_model, layer.d_expert) == (blocks, 64, 128 // blocks)


def test_rope_is_that_of_the_model(tmp_path, llama, source):
    """A scaling is kept, or refused; Llama 3.1's in a GGUF file is a tensor."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
    if source.suffix == ".gguf":
        reader, scaled = gguf.GGUFReader(source), tmp_path / "scaled.gguf"
        writer = gguf.GGUFWriter(scaled, "llama")
        for field in reader.fields.values():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(field.name, field.contents(), field.types[0])
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.asarray(tensor.data))
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open_checkpoint(scaled) as checkpoint, pytest.raises(
                UnsupportedExperts, match="must have a RoPE without scaling"):
            experts_of_dense(checkpoint, tmp_path)
        return
    path = source / "config.json"
    config = json.loads(path.read_bytes())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {
        "rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", **scaling}}))
    expected = AutoModelForCausalLM.from_pretrained(source).eval()
    assert expected.config.rope_parameters["rope_type"] == "llama3"
    folder = tmp_path / "moe"
    folder.mkdir()
    with open_checkpoint(source) as checkpoint:
        experts_of_dense(checkpoint, folder, blocks=2)
    moe = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected, found = expected(IDS).logits, moe(IDS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_cannot_be_cut_is_refused(tmp_path, source):
    with open_checkpoint(source) as checkpoint:
        for blocks in (3, 32):
            with pytest.raises(InvalidOption, match="blocks must be a power of two up to 16 that"):
                experts_of_dense(checkpoint, tmp_path, blocks=blocks)


@pytest.mark.parametrize(("config", "error", "message"), [
    ({"model_type": "gpt2"}, UnsupportedExperts, "must be a model of the type llama .* not 'gpt2'"),
    ({"model_type": "llama", "mlp_bias": True}, UnsupportedExperts, "without biases"),
    ({"model_type": "llama", "hidden_act": "gelu"}, UnsupportedExperts, "with SiLU"),
    ({"model_type": "llama", "hidden_size": 64}, ForeignCheckpoint, "intermediate_size must be in"),
    ({"model_type": "llama", **SIZES, "rms_norm_eps": 1e-5}, ForeignCheckpoint,
     "tensor 'model.embed_tokens.weight' must be in the checkpoint, but is not"),
])
def test_other_models_are_refused(tmp_path, config, error, message):
    folder = write_safetensors(tmp_path / "x", {"a": np.ones(2, np.float32)}, config)
    with open_checkpoint(folder) as checkpoint, pytest.raises(error, match=message):
        experts_of_dense(checkpoint, tmp_path)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-(1 << 40), 1 << 40), st.text(max_size=3),
                   st.floats(allow_nan=True), st.lists(st.integers(0, 3), max_size=2))


@given(data=st.data())
@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_models_are_errors_that_name_something(tmp_path, source, data):
    """Bytes of the file, and numbers of the configuration, are anything."""
    place = tmp_path / "damaged"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if source.is_dir():
        config = json.loads((source / "config.json").read_bytes())
        for name in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
            config[name] = data.draw(VALUES)
        (place / "config.json").write_text(json.dumps(config))
        whole = (source / "model.safetensors").read_bytes()
        target, opened = place / "model.safetensors", place
    else:
        whole = source.read_bytes()
        target = opened = place / "dense.gguf"
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 2))):
        # Most of it is weights: what is in front of them is damaged as often.
        at = data.draw(st.one_of(st.integers(0, 4000), st.integers(0, len(whole) - 1)))
        damaged[at] = data.draw(st.integers(0, 255))
    target.write_bytes(damaged[: data.draw(st.sampled_from([len(whole), len(whole) * 2 // 3]))])
    try:
        with open_checkpoint(opened) as checkpoint:
            experts_of_dense(checkpoint, place, blocks=4)
    except MoeAccelError:
        return
    assert (place / "config.json").exists()
