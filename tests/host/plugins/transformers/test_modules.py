import pytest
import torch

from moeaccel.host import errors
from tests.support.experts import CALL, fp8, toy
from tests.support.models import FOUR, config_of, make


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


class OtherSilu(torch.nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


@torch.no_grad()
def test_any_class_that_computes_silu_will_do(device):
    expected = toy()(*CALL)
    assert torch.equal(toy(lambda m: setattr(m, "act_fn", OtherSilu()))(*CALL), expected)


def test_other_activations_are_refused(device, ids):
    model = make(config_of("Mixtral", **FOUR, hidden_act="gelu"), "moeaccel")
    with pytest.raises(errors.UnsupportedExperts, match="activation SiLU, but act_fn is GELU"):
        model(ids)


# -- FP8
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
