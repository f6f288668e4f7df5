"""Whole models on both sides: the tokens are those of all experts on the device."""

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig

import moeaccel.host.transformers_plugin as plugin
from moeaccel.host import errors, open_device
from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.plugins.transformers import session
from moeaccel.host.policies.costs import machine
from moeaccel.host.policies.errors import PolicyError
from moeaccel.host.policies.systems import SYSTEMS

POLICIES = [name for name, row in SYSTEMS.items() if row.lossless and name != "belady"]
SOME = ["moeaccel", "static-hot-set", "mixtral-offloading"]


def small(kind, **more):
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8,
             "num_experts_per_tok": 2} | more
    torch.manual_seed(5)
    config = kind(**sizes)
    return AutoModelForCausalLM.from_config(config, experts_implementation="moeaccel").eval()


def olmoe():
    return small(OlmoeConfig)


def qwen3():
    return small(Qwen3MoeConfig, moe_intermediate_size=64, head_dim=16)


def demo():
    return AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, experts_implementation="moeaccel").eval()


def generate(model, count=6):
    prompt = torch.arange(1, 21)[None] % model.config.vocab_size
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count,
                          do_sample=False, pad_token_id=0)


def check(model, policies, *, experts, config="small", count=6):
    """Generate with each policy, a quarter of the experts' bytes on the torch device."""
    with open_device("golden", config=config) as device:
        plugin.use_device(device)
        expected = generate(model, count)
        on_torch = 0
        for policy in policies:
            plugin.use_device(device, policy=policy, gpu_bytes=experts // 4,
                              resident_math="exact", on=machine("h100"))
            assert torch.equal(generate(model, count), expected), policy
            hybrid = plugin.current_session().hybrid
            on_torch += sum(layer.on_torch for layer in hybrid.counters)
        assert on_torch
        plugin.release()


@pytest.mark.parametrize("made", [olmoe, qwen3])
def test_models_of_random_weights(made):
    check(made(), SOME, experts=2 * 8 * 3 * 64 * 64 * 2)


def test_the_demo_model():
    check(demo(), ["moeaccel"], experts=4 << 20)


def test_bfloat16_is_within_its_error():
    model = olmoe().to(torch.bfloat16)
    tokens = torch.arange(1, 41)[None]
    with open_device("golden", config="small") as device, torch.no_grad():
        plugin.use_device(device)
        expected = model(tokens).logits.float()
        plugin.use_device(device, policy="all-on-torch", gpu_bytes="1MiB")
        found = model(tokens).logits.float()
        assert (found - expected).norm() < 0.05 * expected.norm()
        counters = plugin.current_session().hybrid.counters
        assert [(layer.on_device, layer.residents) for layer in counters] == [(0, 8), (0, 8)]
        plugin.release()


def test_what_use_device_refuses(device):
    with pytest.raises(PolicyError, match="policy must be one of"):
        plugin.use_device(device, policy="mine")
    with pytest.raises(errors.InvalidOption, match="policy must be given with gpu_bytes"):
        plugin.use_device(device, gpu_bytes=1 << 20)
    with pytest.raises(errors.InvalidOption, match="policy must be given with resident_math, not"):
        plugin.use_device(device, resident_math="exact")
    with pytest.raises(errors.InvalidOption, match=r"option of use_device must be .*, not 'formt'"):
        plugin.use_device(device, formt="mxint8")
    with pytest.raises(errors.InvalidOption, match="gpu_bytes must be a number of bytes"):
        plugin.use_device(device, policy="moeaccel", gpu_bytes="much")
    with pytest.raises(errors.InvalidOption, match=r"\(ids, None\) for the routers' own weights"):
        plugin.use_device(device, routes=torch.zeros(1, 2, 2, dtype=torch.int64))
    with open_device("golden", config="small") as closed:
        pass
    with pytest.raises(errors.DeviceClosed, match="device must be open"):
        plugin.use_device(closed)


@pytest.mark.parametrize(("given", "residents"), [("0", 0), ("25%", 4), ("100%", 16)])
def test_shares_of_the_experts(device, given, residents):
    model = olmoe()
    plugin.use_device(device, policy="static-hot-set", gpu_bytes=given)
    generate(model, 1)
    counters = plugin.current_session().hybrid.counters
    assert sum(layer.residents for layer in counters) == residents
    plugin.release()


def test_a_budget_too_small_is_named_as_it_was_given(device):
    model = olmoe()
    for given in ("10", "1KiB"):
        plugin.use_device(device, policy="moeaccel", gpu_bytes=given)
        with pytest.raises(PolicyError, match=f"gpu_bytes must be 0 or at least .*not '{given}'"):
            generate(model, 1)


def test_images_stay_where_they_are_when_only_the_policy_changes(device):
    model = olmoe()
    plugin.use_device(device)
    generate(model, 1)
    free = device.memory.free_bytes
    plugin.use_device(device, policy="moeaccel", gpu_bytes=1 << 20)
    generate(model, 1)
    assert device.memory.free_bytes == free
    assert session.current_session().hybrid is not None
    plugin.release()


@pytest.mark.slow
@pytest.mark.parametrize("made", [olmoe, qwen3, demo])
def test_every_lossless_policy(made):
    check(made(), POLICIES, experts=2 * 8 * 3 * 64 * 64 * 2 if made is not demo else 4 << 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # minutes each where nothing else runs
@pytest.mark.parametrize(("kind", "sizes"), [
    (OlmoeConfig, {"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
                   "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8}),
    (Qwen3MoeConfig, {"hidden_size": 2048, "moe_intermediate_size": 768, "head_dim": 128,
                      "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
                      "num_experts_per_tok": 8}),
])
def test_layers_of_full_width(kind, sizes):
    width = sizes.get("moe_intermediate_size", sizes.get("intermediate_size"))
    experts = 2 * sizes["num_experts"] * 3 * sizes["hidden_size"] * width * 2
    check(small(kind, **sizes), POLICIES, experts=experts, config="wide512", count=2)
