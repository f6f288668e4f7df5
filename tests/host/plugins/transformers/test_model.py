import copy

import numpy as np
import pytest
import torch
import transformers

import moeaccel.host.transformers_plugin as plugin
from moeaccel.config import PRESETS
from moeaccel.host import errors, open_device
from tests.support.models import BASE, EIGHT, FOUR, MODELS, config_of, make


# -- is it used?
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


class OtherExperts(torch.nn.Module):
    """A layer of experts that knows no interface."""


class OtherSharedExperts(torch.nn.Module):
    """Experts of every token, which are no layer of routed experts."""


class Wrapped(torch.nn.Module):
    def __init__(self, inner, experts):
        super().__init__()
        self.inner = inner
        self.experts = experts


def test_only_the_parts_with_experts_must_support_the_setting(device):
    model = vision_model().train()
    assert plugin.check_model(model) == 2
    assert model.training
    model.model.visual.merger = Wrapped(model.model.visual.merger, OtherExperts())
    with pytest.raises(errors.ExpertsIgnored, match="OtherExperts"):
        plugin.check_model(model)


def test_shared_experts_may_run_on_the_host(device):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    model.model.layers[1].shared_experts = OtherSharedExperts()
    assert plugin.check_model(model) == 2


def test_layers_that_are_not_reached_are_reported(device):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    model.model.layers[1].spare = copy.deepcopy(model.model.layers[1].mlp.experts)
    with pytest.raises(errors.ExpertsIgnored, match=r"'model.layers.1.spare' .*not asked"):
        plugin.check_model(model)
    assert plugin.check_model(
        make(config_of("Mixtral", **FOUR), "moeaccel"),
        {"inputs_embeds": torch.from_numpy(np.zeros((1, 3, 64), np.float32))}) == 2


# -- what the first forward pass would refuse
REFUSED = {
    "alpha": ("GptOss", FOUR | {"head_dim": 16, "swiglu_alpha": 2.0}, errors.UnsupportedExperts,
              "GptOssExperts must have a gate with an alpha of 1.702 .* but alpha is 2.0"),
    "activation": ("Mixtral", FOUR | {"hidden_act": "mish"}, errors.UnsupportedExperts,
                   "an activation among silu, .*, but act_fn is Mish"),
    "top-k": ("Olmoe", {"num_experts": 32, "num_experts_per_tok": 17}, errors.LimitExceeded,
              "at most 16 experts for each token, not 17"),
    "dimension": ("Mixtral", FOUR | {"intermediate_size": 1056}, errors.LimitExceeded,
                  "d_expert must .* from 32 to 1024 in config 'small', not 1056; presets"),
    "experts": ("Olmoe", {"num_experts": 130, "num_experts_per_tok": 2, "intermediate_size": 32},
                errors.LimitExceeded, "number of experts must be from 1 to 128"),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_the_first_forward_pass_refuses_is_found(device, ids, name):
    kind, more, error, message = REFUSED[name]
    model = make(config_of(kind, **more), "moeaccel")
    for action in (lambda: model(ids), lambda: plugin.check_model(model)):
        with pytest.raises(error, match=message):
            action()
    assert device.counters()["commands"] == 0


@torch.no_grad()
def test_layers_that_do_not_fit_memory_together_are_found(ids):
    model = make(config_of("Mixtral", **(FOUR | {"num_hidden_layers": 8})), "moeaccel")
    with open_device("golden", config="tiny", memory_bytes=1 << 19) as small:
        plugin.use_device(small, weight_format="mxint8")
        message = "8 layers of experts and one command's buffers must fit"
        with pytest.raises(errors.OutOfDeviceMemory, match=message):
            plugin.check_model(model)
        with pytest.raises(errors.OutOfDeviceMemory):
            model(ids)
        plugin.release()
    with open_device("golden", config="tiny", memory_bytes=1 << 21) as enough:
        plugin.use_device(enough, weight_format="mxint8")
        assert plugin.check_model(model) == 8
        model(ids)
        assert plugin.check_model(model) == 8  # what is there needs no more room
        plugin.release()
    plugin.use_device(None)


def test_dimensions_that_are_no_whole_blocks_are_not_refused(device):
    assert plugin.check_model(
        make(config_of("Mixtral", **(FOUR | {"intermediate_size": 100})), "moeaccel")) == 2


# -- wrong types
class Broken(torch.nn.Module):
    def forward(self, *_):
        raise IndexError("out of reach")


def test_arguments_that_make_no_sense(device):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    for wrong in ("mixtral", None, torch.nn.Linear(2, 2)):
        with pytest.raises(errors.InvalidOption, match="model must be a PreTrainedModel, not"):
            plugin.check_model(wrong)
    for function in (plugin.refresh, plugin.release, plugin.choose_config):
        with pytest.raises(errors.InvalidOption, match="model must be a Module, not str"):
            function("mixtral")
    with pytest.raises(errors.InvalidOption, match=r"inputs must be a mapping .*not list"):
        plugin.check_model(model, [1, 2])
    with pytest.raises(errors.InvalidOption, match=r"they ended in TypeError: .*not str"):
        plugin.check_model(model, {"input_ids": "wrong"})
    model.model.norm = Broken()
    with pytest.raises(errors.InvalidOption, match="default ones ended in IndexError: out of reac"):
        plugin.check_model(model)


# -- what a model needs
def test_choose_config_needs_shapes_only(environment):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config_of("Olmoe", **(EIGHT | {"hidden_size": 2048, "intermediate_size": 1024,
                                           "num_experts": 64, "num_hidden_layers": 12})))
    config, memory = plugin.choose_config(model)
    assert config is PRESETS["wide512"]
    assert 12 * 64 * 3 * 2048 * 1024 // 2 < memory <= 8 << 30
    environment.setenv("MOEACCEL_WEIGHT_FORMAT", "mxint8")
    assert plugin.choose_config(model) == (config, 2 * memory)
    assert plugin.choose_config(model, weight_format="int4_g32") == (config, memory)
    environment.setenv("MOEACCEL_CONFIG", "hbm32")
    environment.setenv("MOEACCEL_MEMORY", "64MiB")
    assert plugin.choose_config(model) == (PRESETS["hbm32"], 64 << 20)


@torch.no_grad()
def test_check_model_opens_what_fits_the_whole_model(environment):
    model = make(config_of("Mixtral", **(FOUR | {"intermediate_size": 1056})), "moeaccel")
    assert plugin.check_model(model) == 2
    device = plugin.current_session().device
    assert (device.config, device.transport.memory_bytes) == plugin.choose_config(model)
