import gc
import threading

import pytest
import torch

import moeaccel.host.transformers_plugin as plugin
from moeaccel.host import errors, open_device
from moeaccel.host.plugins.transformers import uploads
from moeaccel.host.plugins.transformers.given_up import is_given_up
from moeaccel.host.plugins.transformers.modules import Weights
from moeaccel.host.plugins.transformers.uploads import plain, uploaded
from moeaccel.host.plugins.transformers.watch import PARTS
from tests.support.experts import CALL, relative, toy
from tests.support.models import FOUR, config_of, make


def in_memory(module):
    return uploaded(plain(Weights.of(module)))


def eager(module):
    """Return what a module's float weights give."""
    x, ids, weights = CALL
    gate_up, down = module.gate_up_proj.float(), module.down_proj.float()
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(2):
            if (e := int(ids[t, k])) < 4:
                gate, up = (gate_up[e] @ x[t]).chunk(2)
                y[t] += weights[t, k] * (down[e] @ (torch.nn.functional.silu(gate) * up))
    return y


def replaced(parameter):
    return torch.nn.Parameter(parameter.detach() * -2)


def in_inference_mode(parameter):
    with torch.inference_mode():
        parameter.data.mul_(-2)


WRITES = {
    "in place": lambda p: p.mul_(-2),
    "data": lambda p: p.data.mul_(-2),
    "data replaced": lambda p: setattr(p, "data", p.data * -2),
    "detached": lambda p: p.detach().mul_(-2),
    "copied": lambda p: p.data.copy_(p.data.flip(0)),
    "foreach": lambda p: torch._foreach_mul_([p.data], -2),
    "numpy": lambda p: p.detach().numpy().__imul__(-2),
    "inference mode": in_inference_mode,
    "one expert": lambda p: p.data[2].mul_(-2),
}


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_writes_of_every_kind_are_seen_at_once(device, name):
    module = toy()
    module(*CALL)
    for parameter in module.parameters():
        WRITES[name](parameter)
        assert relative(module(*CALL), eager(module)) < 0.05


@torch.no_grad()
def test_a_parameter_at_the_address_of_another_is_seen(device):
    memory = torch.empty(4 * 64 * 96)

    def parameter(scale):
        # Another storage, which does not own the bytes: the same address for certain.
        storage = torch.from_numpy(memory.numpy()).view(4, 64, 96)
        storage.numpy()[:] = scale * toy().plain[1].numpy()
        return torch.nn.Parameter(storage)

    module = toy()
    for scale in (1, -2, 1):
        module.down_proj = None
        module.down_proj = parameter(scale)
        assert module.down_proj.data_ptr() == memory.data_ptr()
        assert relative(module(*CALL), eager(module)) < 0.05


@torch.no_grad()
def test_one_element_is_seen_within_as_many_calls_as_there_are_parts(device):
    module = toy()
    before = module(*CALL)
    module.gate_up_proj.detach().numpy()[1, 3, 5] = 50
    calls = next(n for n in range(PARTS) if not torch.equal(module(*CALL), before))
    assert calls > 0
    assert relative(module(*CALL), eager(module)) < 0.05


@torch.no_grad()
def test_one_element_is_seen_at_once_when_everything_is_verified(device):
    plugin.use_device(device, weight_format="mxint8", verify="full")
    module = toy()
    before = module(*CALL)
    experts = in_memory(module)
    assert torch.equal(module(*CALL), before)
    assert in_memory(module) is experts
    module.gate_up_proj.detach().numpy()[1, 3, 5] = 50
    assert relative(module(*CALL), eager(module)) < 0.05


@torch.no_grad()
def test_refresh_makes_it_true_at_once(device, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    assert plugin.refresh(model) == 0
    before = model(ids).logits
    assert plugin.refresh(model) == 0
    changed = model.model.layers[1].mlp.experts
    changed.down_proj.detach().numpy()[:, 3, 5] = 50
    kept = in_memory(model.model.layers[0].mlp.experts)
    assert plugin.refresh(model) == 1
    assert in_memory(model.model.layers[0].mlp.experts) is kept
    assert relative(model(ids).logits, before) > 0.01


@torch.no_grad()
def test_what_did_not_change_is_uploaded_once(device, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    first = model(ids).logits
    layers = [layer.mlp.experts for layer in model.model.layers]
    before = [in_memory(module) for module in layers]
    for _ in range(5):
        model(ids[:1, :1])
    assert torch.equal(model(ids).logits, first)
    layers[1].down_proj.mul_(2)
    second = model(ids).logits
    assert not torch.equal(second, first)
    assert in_memory(layers[0]) is before[0]
    assert in_memory(layers[1]) is not before[1]
    layers[1].down_proj = torch.nn.Parameter(layers[1].down_proj / 2)
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
    taken = device.memory.free_bytes
    assert taken < before
    for _ in range(3):
        model.model.layers[0].mlp.experts.down_proj.mul_(2)
        model(ids)
        assert device.memory.free_bytes == taken
    plugin.release(model)
    assert device.memory.free_bytes == before
    model(ids)
    del model
    gc.collect()
    assert device.memory.free_bytes == before


@torch.no_grad()
def test_weights_that_change_during_a_call_do_not_close_what_it_uses(device):
    """Re-uploads and releases between a call's look and its command, in another thread."""
    module = toy()
    first = module(*CALL)
    using = in_memory(module)
    module.down_proj.data.mul_(-2)
    second = module(*CALL)
    plugin.release(module)
    assert not using.closed
    assert torch.equal(using(*CALL), first)
    assert not torch.equal(second, first)


@torch.no_grad()
def test_threads_run_while_another_changes_weights(device):
    module = toy()
    expected = {}
    for scale in (1, -2):
        module.down_proj.data.copy_(scale * module.plain[1])
        expected[scale] = module(*CALL)
    failed = []
    done = threading.Event()

    @torch.no_grad()
    def run():
        try:
            while not done.is_set():
                module(*CALL)
        except errors.HostError as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        module.down_proj.data.copy_((1, -2)[turn % 2] * module.plain[1])
        if turn % 3 == 2:
            plugin.release(module)
        module(*CALL)
    done.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert torch.equal(module(*CALL), expected[-2])


@torch.no_grad()
def test_weights_that_the_host_gives_up(device):
    module = toy()
    expected = module(*CALL)
    size = sum(p.untyped_storage().nbytes() for p in module.parameters())
    plugin.use_device(device, weight_format="mxint8", keep_host_weights=False)
    assert torch.equal(module(*CALL), expected) and torch.equal(module(*CALL), expected)
    left = sum(p.untyped_storage().nbytes() for p in module.parameters())
    assert left <= 16 < size and all(p.isnan().all() for p in module.parameters())
    gc.collect()
    assert torch.equal(module(*CALL), expected)  # the upload outlives the weights it was made from
    other = toy()
    plugin.use_device(device, weight_format="int4_g32", keep_host_weights=True)
    with pytest.raises(errors.WeightsGivenUp, match="load the model again"):
        module(*CALL)
    assert not torch.equal(other(*CALL), expected)


@torch.no_grad()
@pytest.mark.parametrize("everything", [False, True])
def test_what_the_host_gave_up_comes_back_on_release(device, everything):
    module = toy()
    before = [p.detach().clone() for p in module.parameters()]
    plugin.use_device(device, weight_format="mxint8", keep_host_weights=False)
    expected = module(*CALL)
    assert all(p.isnan().all() for p in module.parameters())
    plugin.release(None if everything else module)
    for parameter, was in zip(module.parameters(), before, strict=True):
        assert 0 < (parameter - was).norm() < 0.02 * was.norm()  # as it was quantised
        assert parameter.dtype == was.dtype and parameter.is_contiguous()
    assert torch.equal(module(*CALL), expected)  # and given up again
    plugin.release(module)
    plugin.use_device(device, weight_format="int4_g32", keep_host_weights=True)
    assert relative(module(*CALL), expected) < 0.2


@torch.no_grad()
@pytest.mark.parametrize("layout", [
    {"transposed": True}, {"interleaved": True}, {"transposed": True, "interleaved": True},
    {"gated": False, "activation": "relu"}])
def test_every_layout_comes_back(device, layout):
    torch.manual_seed(2)
    rows = 48 if layout.get("gated", True) else 24
    shapes = [(3, rows, 40), (3, 40, 24)]
    if layout.get("transposed"):
        shapes = [(e, k, n) for e, n, k in shapes]
    weights = Weights(*map(torch.randn, shapes), None, None, layers=1, block=None,
                      **{"transposed": False, "interleaved": False} | layout)
    before = [tensor.clone() for tensor in weights.tensors]
    plugin.use_device(device, weight_format="mxint8", keep_host_weights=False)
    uploads.experts_of(weights)
    assert is_given_up(weights)
    uploads.drop(weights)
    for tensor, was in zip(weights.tensors, before, strict=True):
        assert relative(tensor, was) < 0.02


def test_weights_of_a_device_that_is_gone_stay_given_up(caplog):
    module = toy()
    with open_device("golden", config="small", memory_bytes=1 << 24) as other:
        plugin.use_device(other, weight_format="mxint8", keep_host_weights=False)
        with torch.no_grad():
            module(*CALL)
    plugin.release(module)
    assert "stay given up: device must be open" in caplog.text
    plugin.use_device(None)


@torch.no_grad()
def test_the_quantiser_is_chosen(device):
    module = toy()
    plugin.use_device(device, weight_format="int4_g32")
    found = module(*CALL)
    plugin.use_device(device, weight_format="int4_g32", quantiser="amax")
    largest = module(*CALL)
    assert relative(found, eager(module)) < relative(largest, eager(module))
    with pytest.raises(errors.InvalidOption, match="quantiser must be one of search, amax"):
        plugin.use_device(device, quantiser="gptq")
    with pytest.raises(errors.InvalidOption, match="keep_host_weights must be one of True, False"):
        plugin.use_device(device, keep_host_weights="no")
