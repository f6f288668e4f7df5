import pytest
import torch
from transformers.activations import ACT2FN

from moeaccel.host import errors
from tests.support.experts import CALL, fp8, limited, toy


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
    ({"has_post_expert_norm": True}, "has_post_expert_norm is True"),
    ({"transform": lambda m: setattr(m, "act_fn", torch.nn.Tanh())}, "but act_fn is Tanh"),
    ({"transform": lambda m: setattr(type(m), "_apply_gate", lambda self, g: g)},
     "but _apply_gate computes something else"),
    ({"has_post_expert_norm": True, "transform": lambda m: setattr(m, "act_fn", torch.nn.Tanh())},
     "no norm behind its experts, but .*, and an activation among .*; the device runs"),
])
def test_what_the_device_does_not_do_is_refused(device, flags, message):
    with pytest.raises(errors.UnsupportedExperts, match=f"ToyExperts must have .*{message}"):
        toy(**flags)(*CALL)


ACTIVATIONS = {
    "silu": torch.nn.SiLU(), "relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU("tanh"), "relu2": ACT2FN["relu2"],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@torch.no_grad()
def test_every_activation_with_and_without_up_rows(device, name, gated):
    module = toy(lambda m: setattr(m, "act_fn", ACTIVATIONS[name]), has_gate=gated)
    expected = device.load_experts(
        *module.plain, weight_format="mxint8", activation=name, gated=gated)(*CALL)
    assert torch.equal(module(*CALL), expected)


@pytest.mark.parametrize("flags", [
    {}, {"is_transposed": True}, {"is_concatenated": False}, {"has_gate": False},
    {"is_transposed": True, "is_concatenated": False}])
@torch.no_grad()
def test_biases(device, flags):
    module = toy(has_bias=True, **flags)
    gated = flags.get("has_gate", True)
    expected = device.load_experts(
        *module.plain, **module.biases, weight_format="mxint8", gated=gated)(*CALL)
    assert torch.equal(module(*CALL), expected)
    module.down_proj_bias[2] += 1  # watched as weights are
    other = module(*CALL)
    changed = (CALL[1] == 2).any(dim=1)
    assert torch.equal(other[~changed], expected[~changed])
    assert not torch.isclose(other[changed], expected[changed]).any()


@torch.no_grad()
def test_every_layout_without_up_rows(device):
    expected = toy(has_gate=False)(*CALL)
    # Nothing alternates where there are no up rows.
    for flags in ({"is_transposed": True}, {"is_concatenated": False}):
        assert torch.equal(toy(has_gate=False, **flags)(*CALL), expected)


@torch.no_grad()
def test_limits(device):
    module = limited(0.5)
    expected = device.load_experts(*module.plain, weight_format="mxint8", limit=0.5)(*CALL)
    assert torch.equal(module(*CALL), expected)
    assert not torch.equal(toy()(*CALL), expected)


@torch.no_grad()
def test_layers_that_share_weights_keep_their_gates_apart(device):
    first, second, third = limited(0.5), limited(7.0), toy()
    expected = [module(*CALL) for module in (first, second, third)]
    for module in (second, third):
        module.gate_up_proj, module.down_proj = first.gate_up_proj, first.down_proj
    third.act_fn = torch.nn.ReLU()
    for _ in range(2):
        assert torch.equal(first(*CALL), expected[0])
        assert torch.equal(second(*CALL), expected[1])
        assert not torch.equal(third(*CALL), expected[2])
    first.limit = 7.0
    assert torch.equal(first(*CALL), expected[1])


# -- FP8
@pytest.mark.parametrize("block", [(128, 128), None])
@pytest.mark.parametrize("limit", [None, 7.0])
@torch.no_grad()
def test_fp8_weights_are_dequantised(device, block, limit):
    module = fp8(block, swiglu_limit=limit)
    x = 16 * torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    _, ids, weights = CALL
    expected = device.load_experts(
        plain(module, "gate_up_proj"), plain(module, "down_proj"), weight_format="mxint8",
        limit=limit)(x, ids, weights)
    assert torch.equal(module(x, ids, weights), expected)


def plain(module, name):
    """Return FP8 weights of a module as float32."""
    weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
    parts = [dimension // count for dimension, count in
             zip(weight.shape[1:], scale.shape[1:], strict=True)]
    return weight.float() * torch.kron(scale, torch.ones(parts))


@torch.no_grad()
def test_fp8_experts_without_up_rows(device):
    module = fp8(gated=False)
    x, (_, ids, weights) = torch.randn(6, 256), CALL
    expected = device.load_experts(
        plain(module, "up_proj"), plain(module, "down_proj"), weight_format="mxint8", gated=False,
        activation="silu")(x, ids, weights)
    assert torch.equal(module(x, ids, weights), expected)


def test_fp8_experts_with_another_gate_are_refused(device):
    with pytest.raises(errors.UnsupportedExperts, match=r"FP8Experts must .*swiglu_alpha is 1.5"):
        fp8(swiglu_limit=7.0, swiglu_alpha=1.5)(torch.zeros(6, 256), *CALL[1:])


def test_packed_fp4_is_refused(device):
    module = fp8()
    for name in ("gate_up_proj", "down_proj"):
        packed = getattr(module, name)[..., ::2].view(torch.int8).contiguous()
        setattr(module, name, torch.nn.Parameter(packed, requires_grad=False))
    with pytest.raises(errors.UnsupportedExperts, match="its weights are packed FP4"):
        module(torch.zeros(6, 256), *CALL[1:])
