import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from moeaccel.activations import ACTIVATIONS
from moeaccel.host.plugins.transformers.gates import Gate, gate_of
from tests.support.experts import fp8, toy


def acting(act_fn, **flags):
    """Return an experts module with an activation, a module or a function."""
    module = toy(**flags)
    del module.act_fn
    module.act_fn = act_fn
    return module


def gated_by(gate, **attributes):
    """Return an experts module with a gate of its own, a function of gate and up rows."""
    class Rule(torch.nn.Module):
        has_gate = True

        def _apply_gate(self, rows):
            return gate(*rows.chunk(2, dim=-1))

    module = Rule()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def clamped(limit, act=functional.silu, low=None, offset=0):
    return lambda g, u: act(g.clamp(low, limit)) * (u.clamp(-limit, limit) + offset)


# -- activations
@pytest.mark.parametrize(("act_fn", "name"), [
    *((ACT2FN[name], "gelu_tanh") for name in (
        "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")),
    (ACT2FN["gelu"], "gelu"), (ACT2FN["gelu_python"], "gelu"), (ACT2FN["relu2"], "relu2"),
    (torch.nn.ReLU(inplace=True), "relu"), (torch.nn.SiLU(), "silu"), (functional.silu, "silu"),
    (torch.nn.GELU("tanh"), "gelu_tanh"), (torch.nn.GELU(), "gelu"),
])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_are_known_by_their_values(act_fn, name, gated):
    assert gate_of(acting(act_fn, has_gate=gated)) == Gate(name)


def test_an_offset_is_one_of_up_rows():
    """Without them gpt-oss's activation is a known one, with them it is not."""
    assert gate_of(acting(ACT2FN["quick_gelu"], has_gate=False)) == Gate("gpt_oss")
    assert "but act_fn is" in gate_of(acting(ACT2FN["quick_gelu"])).missing


@pytest.mark.parametrize("name", [
    "gelu_10", "hardswish", "leaky_relu", "linear", "mish", "relu6", "sigmoid",
    "sqrtsoftplus", "tanh", "laplace", "prelu"])
def test_other_activations_are_none_of_them(name):
    gate = gate_of(acting(ACT2FN[name], has_gate=False))
    assert f"an activation among {', '.join(ACTIVATIONS)}, but act_fn is" in gate.missing


@pytest.mark.parametrize("act_fn", [
    lambda x: functional.silu(x) + 1e-4,
    lambda x: functional.gelu(x).clamp(max=1000),
    lambda x: functional.silu(x).bfloat16(),
    lambda x: functional.silu(x[:-1]),
    lambda x: None,
    lambda x, y: functional.silu(x) * y,
])
def test_what_is_nearly_one_is_none(act_fn):
    assert "but act_fn is <lambda>" in gate_of(acting(act_fn)).missing


# -- gates
@pytest.mark.parametrize("limit", [10, 7.0, 0.5, 2.0**-6, 300, 1.0078125])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_limits_are_found(limit, name):
    act = {"silu": functional.silu, "relu": functional.relu, "gelu": functional.gelu,
           "gelu_tanh": ACT2FN["gelu_pytorch_tanh"], "relu2": ACT2FN["relu2"],
           "gpt_oss": ACT2FN["quick_gelu"]}[name]
    offset = ACTIVATIONS[name].up_offset
    assert gate_of(gated_by(clamped(limit, act, offset=offset))) == Gate(name, limit)


@pytest.mark.parametrize("limit", [None, 7.0])
def test_gates_with_an_offset_in_float32(limit):
    def gate(g, u):
        g, u = g.float(), u.float()
        if limit is not None:
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return (g * torch.sigmoid(1.702 * g) * (u + 1)).to(torch.float64)

    assert gate_of(gated_by(gate)) == Gate("gpt_oss", limit)
    assert gate_of(gated_by(lambda g, u: gate(g, u + 1e-3))).missing is not None
    assert gate_of(gated_by(lambda g, u: gate(g * 0.999, u))).missing is not None


def test_gates_that_only_look_different():
    assert gate_of(gated_by(
        lambda g, u: (functional.silu(g.float()) * u.float()).to(g.dtype))) == Gate("silu")
    assert gate_of(gated_by(
        lambda g, u: clamped(7)(g.float(), u.float()).to(g.dtype))) == Gate("silu", 7)
    interleaved = gated_by(None, is_concatenated=False)
    type(interleaved)._apply_gate = lambda self, rows: clamped(7)(rows[..., ::2], rows[..., 1::2])
    assert gate_of(interleaved) == Gate("silu", 7)


@pytest.mark.parametrize("gate", [
    lambda g, u: functional.silu(u) * g,
    lambda g, u: functional.silu(g) * (u + 1e-4),
    lambda g, u: functional.silu(g.clamp(max=7)) * u,
    lambda g, u: functional.silu(g) * u.clamp(-7, 7),
    lambda g, u: functional.silu(g.clamp(max=7)) * u.clamp(max=7),
    lambda g, u: functional.silu(g.clamp(max=7)) * u.clamp(-8, 7),
    lambda g, u: functional.silu(g.clamp(max=8)) * u.clamp(-7, 7),
    lambda g, u: functional.silu(g).clamp(max=7) * u.clamp(-7, 7),
    clamped(7, low=-7),
    lambda g, u: functional.silu(g) * u.clamp(-7, 7) * 0,
    lambda g, u: functional.silu(g),
    lambda g, u: torch.tanh(functional.silu(g) * u / 100) * 100,
    clamped(7, torch.sigmoid),
    lambda g, u: torch.empty(0),
    lambda g, u: g.clamp(max=None) * u,
])
def test_other_gates_are_none_of_these(gate):
    assert "but _apply_gate computes something else" in gate_of(gated_by(gate)).missing


def test_a_limit_that_the_device_cannot_hold():
    missing = gate_of(gated_by(clamped(10.01))).missing
    assert missing.startswith("a limit with at most 8 significant bits")
    assert missing.endswith("but it is 10.01")


@pytest.mark.parametrize(("attributes", "missing"), [
    ({"alpha": 1}, "with an alpha of 1.702 and 1 added to up rows, or without both, but alpha is"),
    ({"swiglu_alpha": 2}, "or without both, but swiglu_alpha is 2"),
    ({"gate_softcap": 4.0}, "without soft caps, but there is a gate_softcap"),
])
def test_gates_have_names(attributes, missing):
    gate = gated_by(lambda g, u: functional.silu(g) * (u + 1), **attributes)
    assert missing in gate_of(gate).missing


@pytest.mark.parametrize(("config", "gate"), [
    ({}, Gate()), ({"swiglu_limit": 7.0}, Gate("silu", 7.0)),
    ({"hidden_act": "relu"}, Gate("relu")),
    ({"hidden_act": "gelu_pytorch_tanh", "swiglu_limit": 0.5}, Gate("gelu_tanh", 0.5)),
    ({"swiglu_limit": 7.0, "swiglu_alpha": 1.702}, Gate("gpt_oss", 7.0)),
])
def test_gates_of_fp8_experts(config, gate):
    assert gate_of(fp8(**config)) == gate


@pytest.mark.parametrize(("config", "missing"), [
    ({"swiglu_limit": 7.0, "swiglu_alpha": 1.7}, "swiglu_alpha is 1.7"),
    ({"mlp_gate_softcap": 4.0, "mlp_up_softcap": 25.0}, "there is a gate_softcap"),
    ({"swiglu_limit": 7.3}, "it is 7.3"),
])
def test_gates_of_fp8_experts_that_are_none_of_these(config, missing):
    assert missing in gate_of(fp8(**config)).missing


# -- what is remembered
def test_a_changed_module_is_looked_at_again():
    module = fp8(swiglu_limit=7.0)
    assert gate_of(module) is gate_of(module) == Gate("silu", 7.0)
    module.limit = 8.0
    assert gate_of(module) == Gate("silu", 8.0)
    module.act_fn = torch.nn.ReLU()
    assert gate_of(module) == Gate("relu", 8.0)
    other = copy.deepcopy(module)
    other.limit = None
    assert gate_of(other) == Gate("relu")
    assert gate_of(module) == Gate("relu", 8.0)


@pytest.mark.parametrize("bound", [True, False])
def test_modules_are_not_kept_alive(bound):
    module = acting(torch.nn.SiLU())
    if bound:
        del module.act_fn
        module.act_fn = lambda x, own=module: functional.silu(x) if own.has_gate else x
    assert gate_of(module) == Gate()
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
