import copy
import gc
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

import moeaccel.host.transformers_plugin as plugin
from moeaccel.formats import quantise
from moeaccel.host import errors, open_device
from tests.support.models import BASE, FOUR, MODELS, config_of, make


def quantised(model):
    """Return a copy of a model whose experts' weights are what the device's memory holds."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "_is_expert_parallel"):
                for parameter in (module.gate_up_proj, module.down_proj):
                    for matrix in parameter:
                        matrix.copy_(torch.from_numpy(
                            quantise(matrix.numpy(), "mxint8").dequantise()))
    return model


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def device():
    with open_device("golden", config="small", memory_bytes=1 << 28) as opened:
        plugin.use_device(opened, weight_format="mxint8", activation_bits=16)
        yield opened
        plugin.release()
        plugin.use_device(None)


@pytest.fixture
def ids():
    return torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(0))


# -- models
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_run_on_the_device(device, ids, name):
    layers, more = MODELS[name]
    model = make(config_of(name, **more))
    # The device adds next to nothing to what the weights' format costs.
    exact, reference = model(ids).logits, quantised(model)(ids).logits
    model.set_experts_implementation("moeaccel")
    assert plugin.check_model(model) == layers
    assert device.counters()["commands"] == 0
    logits = model(ids).logits
    assert device.counters()["commands"] == layers
    assert relative(logits, reference) < 1e-3
    assert relative(logits, exact) < 0.06
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens[:, :8], torch.cat([ids, logits[:, -1].argmax(-1, True)], 1))
    # Each module was uploaded once.
    assert len(plugin._uploads) == layers


@torch.no_grad()
def test_one_argument_of_from_pretrained_is_enough(device, ids, tmp_path):
    model = make(config_of("Mixtral", **FOUR))
    model.save_pretrained(tmp_path)
    expected = quantised(model)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moeaccel")
    assert plugin.check_model(model) == 2
    assert relative(model(ids).logits, expected) < 1e-3
    assert model.get_experts_implementation()[""] == "moeaccel"


@torch.no_grad()
def test_bits_do_not_depend_on_the_batch(device):
    generator = torch.Generator().manual_seed(0)
    experts = next(m for m in make(config_of("Olmoe", **MODELS["Olmoe"][1]), "moeaccel").modules()
                   if hasattr(m, "_is_expert_parallel"))
    x = torch.randn(300, 64, generator=generator)
    index = torch.randint(0, 8, (300, 2), generator=generator)
    weights = torch.rand(300, 2, generator=generator)
    whole = experts(x, index, weights)
    assert torch.equal(whole[17:18], experts(x[17:18], index[17:18], weights[17:18]))


@torch.no_grad()
def test_bfloat16_models_and_expert_parallel_ids(device):
    model = make(config_of("Qwen3Moe", **MODELS["Qwen3Moe"][1]), "moeaccel").bfloat16()
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.tensor([[0, 1], [8, 8], [7, 8], [2, 2], [3, 4]])
    y = experts(x, index, torch.full((5, 2), 0.5))
    assert y.dtype is torch.bfloat16
    assert not y[1].any()
    assert y[[0, 2, 3, 4]].any(dim=1).all()
    assert experts(x[:0], index[:0], torch.zeros(0, 2)).shape == (0, 64)


# -- uploads
@torch.no_grad()
def test_changed_parameters_are_uploaded_again(device, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    first = model(ids).logits
    uploads = dict(plugin._uploads)
    assert torch.equal(model(ids).logits, first)
    assert dict(plugin._uploads) == uploads
    experts = model.model.layers[1].mlp.experts
    experts.down_proj.mul_(2)
    second = model(ids).logits
    assert not torch.equal(second, first)
    changed = [m for m in plugin._uploads if plugin._uploads[m] != uploads[m]]
    assert changed == [experts]
    assert uploads[experts].experts.closed
    experts.down_proj = torch.nn.Parameter(experts.down_proj / 2)
    assert torch.equal(model(ids).logits, first)


@torch.no_grad()
def test_another_format_is_uploaded_again(device, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    fine = model(ids).logits
    plugin.use_device(device, weight_format="int4_g32", activation_bits=8)
    coarse = model(ids).logits
    assert 0.01 < relative(coarse, fine) < 0.5
    plugin.use_device(device, weight_format="mxint8", activation_bits=16)
    assert torch.equal(model(ids).logits, fine)


@torch.no_grad()
def test_memory_comes_back(device, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    before = device.memory.free_bytes
    model(ids)
    assert device.memory.free_bytes < before
    plugin.release(model)
    assert device.memory.free_bytes == before
    model(ids)
    del model
    gc.collect()
    assert device.memory.free_bytes == before


@torch.inference_mode()
def test_inference_mode(device, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    assert torch.equal(model(ids).logits, model(ids).logits)


# -- which device
@torch.no_grad()
def test_the_environment_names_the_device(monkeypatch, ids):
    plugin.use_device(None)
    for name, value in (("DEVICE", "golden"), ("CONFIG", "tiny"), ("WEIGHT_FORMAT", "mxfp4"),
                        ("ACTIVATION_BITS", "8")):
        monkeypatch.setenv(f"MOEACCEL_{name}", value)
    session = plugin.current_session()
    with session.device as device:
        assert device.config.name == "tiny"
        assert (session.weight_format, session.activation_bits) == ("mxfp4", 8)
        make(config_of("Mixtral", **FOUR), "moeaccel")(ids)
        assert device.counters()["commands"] == 2
    plugin.release()
    plugin.use_device(None)
    for name in ("DEVICE", "CONFIG", "WEIGHT_FORMAT", "ACTIVATION_BITS"):
        monkeypatch.delenv(f"MOEACCEL_{name}")
    session = plugin.current_session()
    with session.device as device:
        assert device.config.name == "small"
        assert (session.weight_format, session.activation_bits) == ("int4_g32", 16)
    monkeypatch.setenv("MOEACCEL_ACTIVATION_BITS", "12")
    plugin.use_device(None)
    with pytest.raises(errors.InvalidOption, match="MOEACCEL_ACTIVATION_BITS must be 8 or 16"):
        plugin.current_session()


def test_importing_the_driver_imports_no_transformers():
    code = "import sys, moeaccel.host; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_registering_twice_changes_nothing():
    plugin.register()
    assert ExpertsInterface._global_mapping["moeaccel"] is plugin.experts_forward
    assert FP8ExpertsInterface._global_mapping["moeaccel"] is plugin.experts_forward


# -- refusals
def test_layers_beyond_the_device_name_a_config_that_fits(device, ids):
    model = make(config_of("Mixtral", **(FOUR | {"intermediate_size": 2048})), "moeaccel")
    with pytest.raises(errors.LimitExceeded, match=r"d_expert .*not 2048; config 'ulx3s' fits"):
        model(ids)


def test_bias_is_refused(device, ids):
    model = make(config_of("GptOss", **FOUR, head_dim=16), "moeaccel")
    message = "GptOssExperts must have no bias, but has_bias is True; the device runs gated"
    for action in (lambda: model(ids), lambda: plugin.check_model(model)):
        with pytest.raises(errors.UnsupportedExperts, match=message):
            action()


def test_other_activations_are_refused(device, ids):
    model = make(config_of("Mixtral", **FOUR, hidden_act="gelu"), "moeaccel")
    with pytest.raises(errors.UnsupportedExperts, match="activation SiLU, but act_fn is GELU"):
        model(ids)


def toy(transform=lambda module: None, **flags):
    """Return an experts module with the decorator's flags."""
    @use_experts_implementation(**flags)
    class ToyExperts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.num_experts = 4
            gate_up = torch.randn(4, 192, 64, generator=generator) / 8
            down = torch.randn(4, 64, 96, generator=generator) / 8
            self.act_fn = torch.nn.SiLU()
            self.plain = gate_up, down
            if not flags.get("is_concatenated", True):
                gate_up = gate_up.reshape(4, 2, 96, 64).transpose(1, 2).reshape(4, 192, 64)
            if flags.get("is_transposed"):
                gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
            self.gate_up_proj = torch.nn.Parameter(gate_up)
            self.down_proj = torch.nn.Parameter(down)
            transform(self)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    config = transformers.MixtralConfig()
    config._experts_implementation = "moeaccel"
    return ToyExperts(config)


CALL = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), torch.tensor(
    [[0, 1], [2, 3], [1, 1], [0, 3], [4, 9], [3, 2]]), torch.full((6, 2), 0.5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
@torch.no_grad()
def test_every_layout_is_honoured(device, transposed, concatenated):
    module = toy(is_transposed=transposed, is_concatenated=concatenated)
    x, ids, weights = CALL
    expected = device.load_experts(*module.plain, weight_format="mxint8")(x, ids, weights)
    assert torch.equal(module(x, ids, weights), expected)
    nested = module(x.reshape(2, 3, 64), ids.reshape(2, 3, 2), weights.reshape(2, 3, 2))
    assert torch.equal(nested.reshape(6, 64), expected)


@pytest.mark.parametrize(("flags", "message"), [
    ({"has_bias": True}, "no bias, but has_bias is True"),
    ({"has_gate": False}, "a gate, but has_gate is False"),
    ({"has_post_expert_norm": True}, "has_post_expert_norm is True"),
    ({"transform": lambda m: setattr(m, "act_fn", torch.nn.ReLU())}, "but act_fn is ReLU"),
    ({"transform": lambda m: setattr(type(m), "_apply_gate", lambda self, g: g)},
     "the default gate, silu.*but _apply_gate is its own"),
])
def test_what_the_device_does_not_do_is_refused(device, flags, message):
    with pytest.raises(errors.UnsupportedExperts, match=f"ToyExperts must have .*{message}"):
        toy(**flags)(*CALL)


def test_training_is_refused(device):
    module = toy().train()
    x, ids, weights = CALL
    with pytest.raises(errors.TrainingUnsupported, match=r"model\.eval"):
        module(x.clone().requires_grad_(), ids, weights)
    with torch.no_grad():
        module(x, ids, weights)


# -- FP8
def fp8(block=(128, 128), **config):
    full = transformers.Qwen3MoeConfig(
        hidden_size=256, moe_intermediate_size=128, num_experts=4, **config)
    full._experts_implementation = "moeaccel"
    module = use_experts_implementation(
        FP8Experts, experts_interface=FP8ExpertsInterface())(full, block_size=block)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
            weight.copy_((torch.randn(weight.shape, generator=generator) * 100).to(weight.dtype))
            scale.copy_(torch.rand(scale.shape, generator=generator) / 1000)
    return module


@pytest.mark.parametrize("block", [(128, 128), None])
@torch.no_grad()
def test_fp8_weights_are_dequantised(device, block):
    module = fp8(block)

    def plain(name):
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        parts = [dimension // count for dimension, count in
                 zip(weight.shape[1:], scale.shape[1:], strict=True)]
        return weight.float() * torch.kron(scale, torch.ones(parts))

    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    _, ids, weights = CALL
    expected = device.load_experts(plain("gate_up_proj"), plain("down_proj"),
                                   weight_format="mxint8")(x, ids, weights)
    assert torch.equal(module(x, ids, weights), expected)


def test_fp8_experts_with_another_gate_are_refused(device):
    with pytest.raises(errors.UnsupportedExperts, match=r"FP8Experts must .* limit is 7"):
        fp8(swiglu_limit=7.0)(torch.zeros(6, 256), *CALL[1:])


def test_packed_fp4_is_refused(device):
    module = fp8()
    module.gate_up_proj = torch.nn.Parameter(
        torch.zeros(4, 256, 128, dtype=torch.int8), requires_grad=False)
    with pytest.raises(errors.UnsupportedExperts, match="its weights are packed FP4"):
        module(torch.zeros(6, 256), *CALL[1:])


# -- check_model
@pytest.mark.parametrize(("name", "more", "experts"), [
    ("Llama4", FOUR | {"intermediate_size_mlp": 96, "head_dim": 16, "num_experts_per_tok": 1},
     "Llama4TextExperts"),
    ("JetMoe", FOUR | {"kv_channels": 16}, "JetMoeParallelExperts"),
])
def test_models_that_ignore_the_setting_are_refused(device, name, more, experts):
    model = make(config_of(name, **more), "moeaccel")
    with pytest.raises(errors.ExpertsIgnored, match=f"{experts}.*ignores experts_implementation"):
        plugin.check_model(model)
    assert device.counters()["commands"] == 0


def test_models_without_experts_are_refused(device):
    with pytest.raises(errors.ExpertsIgnored, match="but no layer was asked"):
        plugin.check_model(make(config_of("Llama"), "moeaccel"))


def test_models_with_another_setting_are_refused(device):
    model = make(config_of("Mixtral", **FOUR))
    with pytest.raises(errors.ExpertsIgnored, match=r"must be 'moeaccel', not 'eager'; call"):
        plugin.check_model(model)


def vision_model():
    config = transformers.Qwen3VLMoeConfig(
        text_config=BASE | MODELS["Qwen3Moe"][1],
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                       "out_hidden_size": 64, "deepstack_visual_indexes": [0]})
    return transformers.Qwen3VLMoeForConditionalGeneration._from_config(
        config, experts_implementation="moeaccel")


def test_only_the_parts_with_experts_must_support_the_setting(device):
    model = vision_model().train()
    assert plugin.check_model(model) == 2
    assert model.training
    model.model.visual.merger = Wrapped(model.model.visual.merger)
    with pytest.raises(errors.ExpertsIgnored, match="OtherExperts"):
        plugin.check_model(model)


class OtherExperts(torch.nn.Module):
    """A layer of experts that knows no interface."""


class Wrapped(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.experts = OtherExperts()


def test_layers_that_are_not_reached_are_reported(device):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    model.model.layers[1].spare = copy.deepcopy(model.model.layers[1].mlp.experts)
    with pytest.raises(errors.ExpertsIgnored, match=r"'model.layers.1.spare' .*not asked"):
        plugin.check_model(model)
    assert plugin.check_model(
        make(config_of("Mixtral", **FOUR), "moeaccel"),
        {"inputs_embeds": torch.from_numpy(np.zeros((1, 3, 64), np.float32))}) == 2
