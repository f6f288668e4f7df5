"""What blocks of transformers are, found out by values."""

from dataclasses import replace

import pytest
import torch

from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.plugins.transformers import blocks
from moeaccel.host.plugins.transformers.blocks import block_of, experts_in
from tests.support.flavours import block_classes, modelling, small_block, small_config
from tests.support.models import BLOCKS, MODELS, config_of, make

TOP2 = {"groups": 4, "keep_groups": 2, "group_score": "top2_sum"}
FOUR_GROUPS = {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 3}

FOUND = {  # model, more of its configuration, settings that are not their defaults
    "Mixtral": ({}, {"renormalize": "sum"}),
    "Olmoe": ({}, {}),
    "Qwen3Moe": ({"norm_topk_prob": True}, {"renormalize": "sum"}),
    "Qwen2Moe": ({}, {}),
    "DeepseekV2": ({}, {"groups": 4, "keep_groups": 2, "scale": 1.5, "top_k": 3}),
    "DeepseekV3": (FOUR_GROUPS, TOP2 | {"score": "sigmoid", "renormalize": "sum_eps",
                                        "epsilon": 1e-20, "scale": 2.5, "top_k": 3}),
    "GptOss": ({}, {"score": "identity", "renormalize": "softmax_top_k"}),
    "Glm4Moe": ({"routed_scaling_factor": 1.25, "norm_topk_prob": False},
                {"score": "sigmoid", "scale": 1.25}),
    "Ernie4_5_Moe": ({}, {"renormalize": "clamp", "epsilon": 1e-12}),
    "Phimoe": ({}, {"mixer": 0.02}),
}
TABLES = {  # what is added to logits, and to what is compared
    "GptOss": ("router.bias", None),
    "DeepseekV3": (None, "gate.e_score_correction_bias"),
    "Glm4Moe": (None, "gate.e_score_correction_bias"),
    "Ernie4_5_Moe": (None, "gate.moe_statics.e_score_correction_bias"),
}
SHARED = {"Qwen2Moe": "shared_expert_gate.weight", "DeepseekV2": None, "DeepseekV3": None,
          "Glm4Moe": None, "Ernie4_5_Moe": None}


def blocks_of(name, **more):
    model = make(config_of(name, **((MODELS | BLOCKS)[name][1] | more)), "moeaccel")
    return [module for module in model.modules() if experts_in(module)]


@pytest.mark.parametrize("name", FOUND)
def test_routers_and_shared_experts_are_recognised(name):
    more, expected = FOUND[name]
    module = blocks_of(name, **more)[0]
    found = block_of(module)
    settings = found.recognised.settings
    for setting, value in {"top_k": 2, "scale": 1.0, "groups": 1, **expected}.items():
        assert getattr(settings, setting) == value, setting
    for setting in ("score", "renormalize", "mixer"):
        if setting not in expected:
            assert getattr(settings, setting) == {"score": "softmax", "renormalize": "none",
                                                  "mixer": None}[setting]
    assert (found.recognised.bias, found.recognised.selection_bias) == TABLES.get(
        name, (None, None))
    assert (found.shared is not None) == (name in SHARED)
    if found.shared is not None:
        assert found.shared.gate == SHARED[name]
        assert [part.split(".")[-2] for part in found.shared.gate_up] == ["gate_proj", "up_proj"]
        assert found.shared.factor == 1.0
        gate = SHARED[name] and SHARED[name].split(".")[0]
        apart = found.apart()
        assert apart.shared is None
        assert apart.beside == (found.shared.down.split(".")[0], gate, 1.0)
        assert not any("shared" in tensor for tensor in apart.names)
    else:
        assert found.apart() is found
    assert found.returned == (("y", "weights") if name == "GptOss" else None)


def test_alike_layers_are_looked_at_once(monkeypatch):
    first, second = blocks_of("Olmoe", num_experts=6)
    found = block_of(first)
    monkeypatch.setattr(blocks, "_look", None)
    assert block_of(second) is found
    second.gate.top_k = 3
    with pytest.raises(TypeError):
        block_of(second)


def test_nothing_of_the_block_changes():
    module = blocks_of("Mixtral", router_jitter_noise=0.5)[0].train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    block_of(module)
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks for part in module.modules())


class Sharp(torch.nn.Module):
    """A router that is none of the device's."""

    def __init__(self, inner, power):
        super().__init__()
        self.inner, self.power = inner, power

    def forward(self, x):
        logits, weights, ids = self.inner(x)
        return logits, weights**self.power, ids


class Asking(torch.nn.Module):
    """One that is to be told something."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, mask):
        return self.inner(x * mask)


class Last(torch.nn.Module):
    """One that takes the smallest."""

    def __init__(self, inner):
        super().__init__()
        self.weight = inner.weight

    def forward(self, x):
        logits = x @ self.weight.T
        weights, ids = torch.softmax(logits, 1).topk(2, largest=False)
        return logits, weights, ids


def changed(name, **parts):
    module = blocks_of(name)[0]
    for part, make_part in parts.items():
        setattr(module, part, make_part(getattr(module, part)))
    return module


REFUSED = {
    "weights": (lambda: changed("Olmoe", gate=lambda gate: Sharp(gate, 2)),
                "its own gives experts other weights"),
    "choice": (lambda: changed("Olmoe", gate=Last), "weighs experts as one of those but chooses"),
    "activation": (lambda: shared_with(torch.nn.ReLU()), "but shared_experts computes something e"),
    "bias": (lambda: shared_with_bias(), r"there is shared_experts\.up_proj\.bias"),
    "more": (lambda: with_more(), "no tensors but those of a router .* but there is idle"),
    "norm": (lambda: class_of("axk1", "AXK1MoE"), "y that is its experts' times a number"),
    "tokens": (lambda: class_of("deepseek_v4", "DeepseekV4SparseMoeBlock"),
               "DeepseekV4SparseMoeBlock must have a router of the device's flavours"),
    "experts": (lambda: class_of("inkling2", "Inkling2SparseMoeBlock"),
                "must have experts that the device has: Inkling2Experts must have a gate without"),
    "outputs": (lambda: class_of("ernie4_5_vl_moe", "Ernie4_5_VLMoeSparseMoeBlock"),
                r"outputs that are y, ids or weights, but there is a tensor of shape \(24576,\)"),
    "state": (lambda: class_of("zaya", "ZayaSparseMoeBlock"),
              r"ZayaSparseMoeBlock must have a router with one weight \(4, 64\), but there are 0"),
    "input": (lambda: changed("Olmoe", gate=Asking),
              "hidden states alone, but with these it ended in TypeError: .* 'mask'"),
}


NOT_TAKEN = {
    "AXK1MoE", "DeepseekV4SparseMoeBlock", "DiffusionGemmaDecoderTextLayer",
    "DiffusionGemmaEncoderTextLayer", "Ernie4_5_VLMoeSparseMoeBlock", "HYV4MoE", "InklingMoE",
    "Inkling2SparseMoeBlock", "MuseSparkMoE", "ZayaSparseMoeBlock"}


def shared_with(activation):
    module = blocks_of("DeepseekV3")[0]
    module.shared_experts.act_fn = activation
    return module


def shared_with_bias():
    module = blocks_of("DeepseekV3")[0]
    module.shared_experts.up_proj = torch.nn.Linear(64, 32)
    return module


def with_more():
    module = blocks_of("Olmoe")[0]
    module.idle = torch.nn.Parameter(torch.ones(3))
    return module


def class_of(model, name):
    return small_block(getattr(modelling(model), name))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_device_has_not_is_named(name):
    module, message = REFUSED[name]
    with pytest.raises(UnsupportedExperts, match=message):
        block_of(module())


def test_factors_are_those_of_the_whole_block():
    """Cohere: the average of both; Laguna: experts times a number, shared ones not."""
    cohere = modelling("cohere2_moe")
    config = small_config(cohere.Cohere2MoeConfig, num_experts_per_tok=2)
    config.num_shared_experts, config.shared_expert_combination_strategy = 2, "average"
    found = block_of(cohere.Cohere2MoeSparseMoeBlock(config))
    assert (found.recognised.settings.scale, found.shared.factor) == (0.5, 0.5)
    assert found.apart().beside == ("shared_experts", None, 0.5)
    laguna = modelling("laguna")
    config = small_config(laguna.LagunaConfig, num_experts_per_tok=2)
    config.moe_routed_scaling_factor = 3.0
    found = block_of(laguna.LagunaSparseMoeBlock(config))
    assert (found.recognised.settings.scale, found.shared.factor) == (3.0, 1.0)


def test_shared_experts_that_are_no_child_cannot_be_left_to_torch():
    found = block_of(blocks_of("DeepseekV3")[0])
    whole = replace(found, shared=replace(found.shared, beside=None))
    with pytest.raises(UnsupportedExperts, match=(
            r"must be a child of their block, .* but 'shared_experts.down_proj.weight' is none's")):
        whole.apart()


@pytest.mark.slow
def test_every_block_of_transformers():
    """Most are the device's; what is not has a router, experts or outputs of its own."""
    refused, taken = {}, set()
    for cls in block_classes():
        try:
            module = small_block(cls)
        except LookupError:
            continue
        if experts_in(module) is None:
            continue
        try:
            block_of(module).apart()
            taken.add(cls.__name__)
        except UnsupportedExperts as error:
            refused[cls.__name__] = str(error)
    assert len(taken) >= 53
    assert refused.keys() == NOT_TAKEN, refused
