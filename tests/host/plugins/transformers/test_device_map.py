"""Models whose parameters accelerate moves: the same bits, and uploaded once."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeaccel.host.transformers_plugin as plugin
from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.plugins.transformers import uploads
from moeaccel.host.plugins.transformers.modules import Weights
from moeaccel.host.plugins.transformers.watch import Watch
from tests.support.experts import CALL, toy

EVERYWHERE = {"": "cpu"}
ON_DISK = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu",
           "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
           "model.layers.2": "disk"}


class Hook:
    """As accelerate's AlignDevicesHook says that it loads parameters for each call."""

    offload = True


@torch.no_grad()
@pytest.mark.parametrize("keep", [True, False])
def test_parameters_that_are_loaded_for_each_call_are_uploaded_once(device, keep):
    """What accelerate does, without it; and it keeps them, whoever else gives them up."""
    plugin.use_device(device, weight_format="mxint8", activation_bits=16, keep_host_weights=keep)
    module = toy()
    expected = toy()(*CALL)
    module._hf_hook = Hook()
    free, layers = device.memory.free_bytes, []
    for _ in range(3):
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
        assert torch.equal(module(*CALL), expected)
        layers.append(uploads.uploaded(uploads.plain(Weights.of(module))))
    assert layers[0] is layers[1] is layers[2] is not None
    one = device.memory.free_bytes
    with torch.no_grad():  # what came is something else
        module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj * 2)
    assert not torch.equal(module(*CALL), expected)
    assert uploads.uploaded(uploads.plain(Weights.of(module))) is not layers[0]
    layers.clear()
    assert device.memory.free_bytes == one
    del module
    gc.collect()
    uploads.drop_all()
    assert device.memory.free_bytes >= free


def test_every_upload_is_restored_when_all_are_forgotten(device, monkeypatch):
    restored = set()
    monkeypatch.setattr(uploads._Upload, "restore", lambda one: restored.add(one.experts))
    modules = [toy(), toy()]
    modules[0]._hf_hook = Hook()
    with torch.no_grad():
        layers = {uploads.experts_of(Weights.of(module)) for module in modules}
    uploads.drop_all()
    assert layers <= restored


def test_contents_are_compared_wherever_they_lie():
    tensor = torch.randn(40, 50)
    watch = Watch(tensor)
    other = tensor.clone()
    assert watch.holds(other, range(256)) and not watch.same(other, range(256))
    other[39, 49] += 1
    assert not watch.holds(other, range(256))
    assert not watch.holds(tensor.double(), range(256)) and not watch.holds(tensor[1:], range(256))
    assert Watch(torch.empty(0)).holds(torch.empty(0), range(256))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{}, {"policy": "static-hot-set", "gpu_bytes": 1 << 20,
                                         "resident_math": "exact"}])
@pytest.mark.parametrize("places", [EVERYWHERE, ON_DISK])
@torch.no_grad()
def test_device_maps(device, ids, tmp_path, places, policy):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ids = ids % 40
    # A grid on which float32 holds both sides' parts of sums.
    stored = {"weight_format": "mxint8", "activation_bits": 16, "grid_exponent": -12}
    plugin.use_device(device, **stored)
    plain = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, experts_implementation="moeaccel").eval()
    expected = plain(ids).logits
    plugin.use_device(device, **stored, **policy)
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, experts_implementation="moeaccel", device_map=places,
        offload_folder=tmp_path).eval()
    assert plugin.check_model(model) == 3
    for _ in range(2):
        assert torch.equal(model(ids).logits, expected)
    before = device.memory.free_bytes
    assert torch.equal(model(ids).logits, expected) and device.memory.free_bytes == before
    plugin.release(model)
    assert device.memory.free_bytes > before
