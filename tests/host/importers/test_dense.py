import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

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
