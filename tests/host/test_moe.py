"""A layer that routes on the device: the golden device against float models."""

import copy

import numpy as np
import pytest
import torch

from moeaccel.config import preset
from moeaccel.golden.reference import experts_float64
from moeaccel.golden.router_reference import route_float
from moeaccel.host import Router, open_device
from moeaccel.host.device import Device
from moeaccel.host.errors import (
    DeviceClosed,
    DeviceTimeout,
    HandleConsumed,
    InvalidOption,
    InvalidTensor,
    LimitExceeded,
    NonFiniteInput,
    NotCopyable,
    OutOfDeviceMemory,
)
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.router.settings import RouterError
from tests.support.device import Hung

CONFIG = preset("tiny").replace(
    router=("softmax", "sigmoid", "identity"), router_top_k=8, max_experts=64,
    router_modes=("gates",))
E_, H, I = 16, 64, 32


@pytest.fixture(scope="module")
def device():
    with open_device("golden", config=CONFIG, memory_bytes=1 << 26) as device:
        yield device


@pytest.fixture
def layer():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    return {"weight": draw(E_, H) * 3, "gate_up": draw(E_, 2 * I, H), "down": draw(E_, H, I),
            "shared": (draw(4 * I, H), draw(H, 2 * I)),
            "x": rng.standard_normal((100, H)).astype(np.float32)}


SETTINGS = [
    {"top_k": 4}, {"top_k": 2, "renormalize": "sum"},
    {"top_k": 3, "score": "identity", "renormalize": "softmax_top_k"},
    {"top_k": 4, "score": "sigmoid", "renormalize": "sum_eps", "epsilon": 1e-20, "groups": 4,
     "keep_groups": 2, "group_score": "top2_sum", "scale": 2.5}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_it_is_the_float_layer(device, layer, settings, shared):
    router = Router(layer["weight"], **settings, selection_bias=(
        np.linspace(-0.1, 0.1, E_) if "groups" in settings else None))
    x = layer["x"]
    with device.load_moe(router, layer["gate_up"], layer["down"], weight_format="mxint8",
                         shared=layer["shared"] if shared else None) as moe:
        y = moe(x)
        ids, weights = moe.route(x)
    logits = torch.from_numpy(x.astype(np.float64) @ layer["weight"].T.astype(np.float64))
    want_ids, want = route_float(logits, router.settings, selection_bias=(
        None if router.selection_bias is None else torch.from_numpy(router.selection_bias)))
    same = (ids == want_ids.numpy()).all(1)
    assert same.mean() > 0.97
    np.testing.assert_allclose(weights[same], want.numpy()[same], rtol=2e-3)
    gate_up, down = list(layer["gate_up"]), list(layer["down"])
    if shared:
        gate_up, down = [*gate_up, layer["shared"][0]], [*down, layer["shared"][1]]
        ids = np.concatenate([ids, np.full((len(x), 1), E_)], axis=1)
        weights = np.concatenate([weights, np.ones((len(x), 1))], axis=1)
    exact = experts_float64(x, ids, weights, gate_up, down)
    assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.02


@pytest.mark.parametrize("gates", ["sigmoid", "sum"])
def test_gates_of_shared_experts(device, layer, gates):
    """Qwen2-MoE: the sigmoid of one more row; Inkling: that in one sum with the chosen."""
    x, rows = layer["x"], layer["weight"][:2]
    shared = [layer["shared"], layer["shared"]]
    if gates == "sigmoid":
        router = Router(layer["weight"], top_k=3, renormalize="sum", scale=2.0)
        shared = [(*pair, row) for pair, row in zip(shared, rows, strict=True)]
    else:
        router = Router(np.concatenate([layer["weight"], rows]), top_k=3, score="sigmoid",
                        renormalize="sum", scale=2.0, gates="sum", shared=2)
    with device.load_moe(router, layer["gate_up"], layer["down"], weight_format="mxint8",
                         shared=shared) as moe:
        y, (ids, weights) = moe(x), moe.route(x)
    every = np.concatenate([layer["weight"], rows]).astype(np.float64)
    logits = torch.from_numpy(x.astype(np.float64) @ every.T)
    own = torch.sigmoid(logits[:, E_:]).numpy()
    if gates == "sum":
        chosen = torch.sigmoid(logits[:, :E_]).gather(1, torch.from_numpy(ids)).numpy()
        total = chosen.sum(1, keepdims=True) + own.sum(1, keepdims=True)
        np.testing.assert_allclose(weights, 2 * chosen / total, rtol=2e-3)
        own = 2 * own / total
    ids = np.concatenate([ids, np.tile([E_, E_ + 1], (len(x), 1))], axis=1)
    exact = experts_float64(
        x, ids, np.concatenate([weights, own], axis=1),
        [*layer["gate_up"], *[layer["shared"][0]] * 2], [*layer["down"], *[layer["shared"][1]] * 2])
    assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.02


def check_selection(device, experts, top_k, tokens, narrow):
    """Count tokens that a float32 router sends elsewhere: logits are within 2**-17 of theirs."""
    rng = np.random.default_rng(experts)
    weight = torch.from_numpy(rng.standard_normal((experts, 256)) / 16).float()
    weight = weight.bfloat16().float() if narrow else weight
    router = Router(weight, top_k=top_k)
    zeros = torch.zeros(1, 1)
    different = 0
    with device.load_moe(router, zeros.expand(experts, 64, 256), zeros.expand(experts, 256, 32)
                         ) as moe:
        for first in range(0, tokens, 2000):
            x = torch.from_numpy(rng.standard_normal((min(2000, tokens - first), 256))).float()
            x = x.bfloat16().float() if narrow else x
            ids, _ = moe.route(x)
            want, _ = route_float(x @ weight.T, router.settings)
            different += int((ids.sort(1).values != want.sort(1).values).any(1).sum())
    assert different <= (0.001 if narrow else 0.002) * tokens


def test_selection_is_that_of_float32(device):
    check_selection(device, 64, 8, 2000, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (256, 8), (512, 10)])
@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "float32"])
def test_selection_of_many_tokens_is_that_of_float32(experts, top_k, narrow):
    config = CONFIG.replace(max_experts=512, max_dim=512, max_tokens=2048,
                            max_assignments=32768, router_top_k=16)
    with open_device("golden", config=config, memory_bytes=1 << 30) as device:
        check_selection(device, experts, top_k, 100_000, narrow)


def test_torch_and_bfloat16(device, layer):
    router = Router(torch.from_numpy(layer["weight"]), top_k=2)
    x = torch.from_numpy(layer["x"])
    with device.load_moe(router, layer["gate_up"], layer["down"]) as moe:
        y = moe(x)
        narrow = moe(x.bfloat16())
        ids, weights = moe.route(x)
        assert y.dtype == torch.float32
        assert narrow.dtype == torch.bfloat16
        assert (y - narrow).norm() / y.norm() < 0.03
        assert ids.dtype == torch.int64
        assert weights.shape == (100, 2)
        assert moe(x[:0]).shape == (0, H)
        assert (moe(x[:3]) == y[:3]).all()


def test_weights_on_the_input(device, layer):
    """Llama 4: the expert sees x times the weight, the shared one x."""
    router = Router(layer["weight"], top_k=1, score="sigmoid", weight_on="input")
    x = layer["x"]
    with device.load_moe(router, layer["gate_up"], layer["down"], weight_format="mxint8",
                         shared=layer["shared"]) as moe:
        y, (ids, weights) = moe(x), moe.route(x)
        narrow = moe(torch.from_numpy(x).bfloat16())
    one = np.ones((len(x), 1))
    exact = experts_float64(x * weights, ids, one, list(layer["gate_up"]), list(layer["down"]))
    exact += experts_float64(x, 0 * ids, one, [layer["shared"][0]], [layer["shared"][1]])
    assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.02
    assert narrow.dtype == torch.bfloat16


def test_the_golden_device_says_how_long_it_takes(layer):
    with open_device("golden", config=CONFIG, memory_bytes=1 << 26, timing=True) as device:
        with device.load_moe(Router(layer["weight"], top_k=2), layer["gate_up"], layer["down"]
                             ) as moe:
            moe.route(layer["x"])
            routing = device.last_cycles
            moe(layer["x"])
            assert device.last_cycles > routing > 5000


def test_memory_is_given_back(device, layer):
    free = device.memory.free_bytes
    with device.load_moe(Router(layer["weight"], top_k=2, bias=np.ones(E_)), layer["gate_up"],
                         layer["down"]) as moe:
        inside = device.memory.free_bytes
        moe(layer["x"])
        assert device.memory.free_bytes == inside
    assert device.memory.free_bytes == free
    moe.close()
    with pytest.raises(DeviceClosed, match="layer must not be used after it was closed"):
        moe(layer["x"])


def test_bad_input_is_named(device, layer):
    router = Router(layer["weight"], top_k=2)
    experts = layer["gate_up"], layer["down"]
    free = device.memory.free_bytes
    with pytest.raises(InvalidOption, match=r"router must have a weight, \(E, H\)"):
        device.load_moe(Router(experts=E_, top_k=2), *experts)
    for wrong in (None, layer["weight"]):
        with pytest.raises(InvalidOption, match=r"router must be a moeaccel\.host\.Router, with"):
            device.load_moe(wrong, *experts)
        with pytest.raises(InvalidOption, match=f"not {type(wrong).__name__}"):
            device.route(wrong, layer["x"])
    with pytest.raises(InvalidTensor, match="down must have E = 16 experts, the router's, not 15"):
        device.load_moe(router, experts[0][1:], experts[1][1:])
    with pytest.raises(InvalidTensor, match=r"weight must have the shape \(16, 64\) of a router"):
        device.load_moe(Router(layer["weight"][:, 1:], top_k=2), *experts)
    with pytest.raises(InvalidTensor, match="shared must have a gate of 64 elements for each"):
        device.load_moe(router, *experts, shared=(*layer["shared"], layer["x"][:2]))
    with pytest.raises(InvalidTensor, match="shared must have 2 experts, for which router has ga"):
        device.load_moe(Router(layer["weight"], top_k=2, gates="sigmoid", shared=2),
                        experts[0][:14], experts[1][:14], shared=layer["shared"])
    with pytest.raises(InvalidOption, match=r"option of load_moe must be one of .*, not 'bogus'"):
        device.load_moe(router, *experts, bogus=1)
    with pytest.raises(LimitExceeded, match="top_k must be 1 with weights on the input"):
        device.load_moe(Router(layer["weight"], top_k=2, weight_on="input"), *experts)
    with pytest.raises(LimitExceeded, match="threshold must be None without 'threshold' in r"):
        device.load_moe(Router(layer["weight"], top_k=2, threshold=0.5), *experts)
    with pytest.raises(RouterError, match="experts must be 16, the rows of weight, not 8"):
        Router(layer["weight"], experts=8, top_k=2)
    assert device.memory.free_bytes == free
    with device.load_moe(router, *experts) as moe:
        with pytest.raises(InvalidTensor, match=r"x must have the shape \(T, 64\) of this layer"):
            moe(layer["x"][:, 1:])
        x = layer["x"].copy()
        x[70, 3] = np.nan
        with pytest.raises(NonFiniteInput, match="x must be finite, but token 70 holds NaN"):
            moe(x)
        moe(layer["x"])


def test_a_device_without_a_router_says_so(layer):
    with open_device("golden", config="tiny") as device, pytest.raises(
            LimitExceeded, match="there is no router in config 'tiny'; presets that can: small, "):
        device.load_moe(Router(layer["weight"], top_k=2), layer["gate_up"], layer["down"])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_router_alone_says_what_a_layer_does(device, layer, settings):
    tables = {"bias": np.linspace(-1, 1, E_)} if "groups" not in settings else {
        "selection_bias": np.linspace(-0.1, 0.1, E_)}
    router, x, free = Router(layer["weight"], **settings, **tables), layer["x"], (
        device.memory.free_bytes)
    with device.load_moe(router, layer["gate_up"], layer["down"]) as moe:
        expected = moe.route(x)
    with device.load_router(router) as alone:
        before = device.counters()["commands"]
        for given in (x, torch.from_numpy(x)):
            ids, weights = alone.route(given)
            assert np.array_equal(ids, expected[0]) and np.array_equal(weights, expected[1])
        assert isinstance(ids, torch.Tensor)
        assert device.counters()["commands"] - before == 2 * -(-len(x) // 64)
        bad = x.copy()
        bad[70, 3] = np.nan
        with pytest.raises(NonFiniteInput, match="token 70"):
            alone.route(bad)
        with pytest.raises(InvalidTensor, match=r"x must have the shape \(T, 64\)"):
            alone.route(x[:, :32])
    assert device.memory.free_bytes == free and alone.closed
    with pytest.raises(DeviceClosed, match="layer must not be used after it was closed"):
        alone.route(x)


def test_what_a_router_alone_must_be(device, layer):
    free = device.memory.free_bytes
    rows = np.concatenate([layer["weight"], layer["weight"][:2]])
    for router, message in (
            (Router(experts=E_, top_k=2), "router must have a weight"),
            (Router(rows, top_k=2, gates="sigmoid", shared=2), "gates must be none, not those of")):
        with pytest.raises(InvalidOption, match=message):
            device.load_router(router)
    with pytest.raises(LimitExceeded, match="top_k must be at most 8, not 9"):
        device.load_router(Router(layer["weight"], top_k=9))
    assert device.memory.free_bytes == free


def test_several_routers_for_the_same_experts(device, layer):
    """M3ViT: a call names the one of its task; each is as it would be alone."""
    experts, x, free = (layer["gate_up"], layer["down"]), layer["x"], device.memory.free_bytes
    routers = [Router(layer["weight"], top_k=4), Router(
        layer["weight"][::-1].copy(), top_k=2, score="sigmoid", bias=np.linspace(-1, 1, E_))]
    alone = []
    for router in routers:
        with device.load_moe(router, *experts, shared=layer["shared"]) as moe:
            alone.append((moe(x), *moe.route(x)))
    with device.load_moe(routers, *experts, shared=layer["shared"]) as moe:
        assert moe.routers == tuple(routers) and moe.router is routers[0]
        for task in (0, 1, 0, 1, 1):
            found = moe(x, task=task), *moe.route(x, task=task)
            assert all((one == other).all()
                       for one, other in zip(found, alone[task], strict=True))
        assert not (alone[0][0] == alone[1][0]).all()
        assert (moe(x, task=np.int64(1)) == alone[1][0]).all()
        for task in (2, -1, 1.0, True):
            with pytest.raises(InvalidOption, match=r"task must be .*from 0 to 1, of the routers"):
                moe(x, task=task)
    with pytest.raises(InvalidTensor, match=r"router of task 1: down must have E = 15 experts, th"):
        device.load_moe([routers[0], Router(layer["weight"][1:], top_k=2)], *experts)
    with pytest.raises(LimitExceeded, match="router of task 1: threshold must be None without"):
        device.load_moe([routers[0], Router(layer["weight"], top_k=2, threshold=0.5)], *experts)
    with pytest.raises(InvalidTensor, match=r"router of task 1: weight must have the shape"):
        device.load_moe([routers[0], Router(layer["weight"][:, 1:], top_k=2)], *experts)
    with pytest.raises(InvalidOption, match="router must be at least one, not an empty sequence"):
        device.load_moe([], *experts)
    assert device.memory.free_bytes == free


def test_calls_that_are_taken_later(device, layer):
    """In any order; what nobody takes is given back."""
    free, x = device.memory.free_bytes, layer["x"]
    with device.load_moe(Router(layer["weight"], top_k=2), layer["gate_up"], layer["down"]) as moe:
        inside, y = device.memory.free_bytes, moe(x)
        handles = [moe.submit(x[first:]) for first in range(5)]
        assert device.memory.free_bytes < inside
        for first in (3, 0, 4, 1):
            assert (moe.sync(handles[first]) == y[first:]).all()
            assert handles[first].cycles >= 0
        with pytest.raises(HandleConsumed, match="its result was already taken"):
            moe.sync(handles[3])
        x = x.copy()
        x[1, 1] = np.inf
        wrong = moe.submit(x)
        with pytest.raises(NonFiniteInput, match="token 1 holds"):
            moe.sync(wrong)
        del handles[2]
        moe(x[2:])
        assert device.memory.free_bytes == inside
        moe.submit(x[2:])
    assert device.memory.free_bytes == free
    with device.load_moe(Router(layer["weight"], top_k=1, score="sigmoid", weight_on="input"),
                         layer["gate_up"], layer["down"]) as moe, pytest.raises(
                             InvalidOption, match="weight_on must be 'output' for submit"):
        moe.submit(x)


def test_a_handle_outlives_a_timeout(layer):
    transport, x = Hung(CONFIG, memory_bytes=1 << 26), layer["x"]
    with Device(transport, CONFIG) as device:
        moe, other = (device.load_moe(Router(layer["weight"], top_k=2), layer["gate_up"],
                                      layer["down"]) for _ in range(2))
        y, free = moe(x), device.memory.free_bytes
        transport.hang = True
        handle = moe.submit(x)
        with pytest.raises(DeviceTimeout, match="completion of MOE must come within 0 s"):
            moe.sync(handle, timeout_s=0)
        transport.hang = False
        with pytest.raises(HandleConsumed, match="one that this layer's submit"):
            other.sync(handle)
        for wrong in (None, other.experts.submit(x, np.zeros((100, 1), int), x[:, :1])):
            with pytest.raises(InvalidOption, match="handle must be what submit\\(\\) returned"):
                moe.sync(wrong)
        with pytest.raises(InvalidOption, match="timeout_s must be"):
            moe.sync(handle, timeout_s="soon")
        assert (moe.sync(handle) == y).all()
        del wrong
        moe(x)
        assert device.memory.free_bytes == free


def test_handles_are_those_of_a_layer(device, layer):
    both = [device.load_moe(Router(layer["weight"], top_k=2), layer["gate_up"], layer["down"])
            for _ in range(2)]
    with both[0] as moe, both[1] as two:
        handle = moe.submit(layer["x"])
        for wrong in (None, layer["x"], "handle"):
            with pytest.raises(InvalidOption, match=r"handle must be what submit\(\) returned"):
                moe.sync(wrong)
        with pytest.raises(HandleConsumed, match="handle must be one that this layer's submit"):
            two.sync(handle)
        with pytest.raises(InvalidOption, match="timeout_s must be 0 seconds or more, not -1"):
            moe.sync(handle, timeout_s=-1)
        for bound in (moe, handle):
            with pytest.raises(NotCopyable):
                copy.copy(bound)
        assert (moe.sync(handle, timeout_s=0) == moe(layer["x"])).all()


def test_a_handle_whose_sync_was_interrupted_can_be_used_again(device, layer, monkeypatch):
    with device.load_moe(Router(layer["weight"], top_k=2), layer["gate_up"], layer["down"]) as moe:
        handle = moe.submit(layer["x"])
        for error in (KeyboardInterrupt, DeviceTimeout):
            with monkeypatch.context() as patch:
                patch.setattr(device, "wait", raising(error))
                with pytest.raises(error):
                    moe.sync(handle)
        assert (moe.sync(handle) == moe(layer["x"])).all()


def raising(error):
    def call(*_, **__):
        raise error
    return call


def test_a_layer_whose_experts_were_closed(device, layer):
    with device.load_moe(Router(layer["weight"], top_k=2), layer["gate_up"], layer["down"]) as moe:
        moe.experts.close()
        for call in (moe, moe.route):
            with pytest.raises(DeviceClosed, match="layer must not be used after it was closed"):
                call(layer["x"])


def test_handles_that_wait_give_their_memory_to_others(layer):
    x = layer["x"][:10]
    with open_device("golden", config=CONFIG, memory_bytes=1 << 18) as device, device.load_moe(
            Router(layer["weight"], top_k=2), layer["gate_up"], layer["down"]) as moe:
        fill = device.memory.allocate(device.memory.largest_free_block - 30_000)
        handles = [moe.submit(x) for _ in range(12)]
        y = moe(x)
        assert all((moe.sync(handle) == y).all() for handle in handles)
        fill.free()


def test_stacks_and_shared_experts_that_are_none(device, layer):
    router, free = Router(layer["weight"], top_k=2), device.memory.free_bytes
    for down in (None, 3, iter(layer["down"])):
        with pytest.raises(InvalidTensor, match=r"down must be a torch.Tensor or a numpy"):
            device.load_moe(router, layer["gate_up"], down)
    with pytest.raises(InvalidTensor, match=r"shared must be a pair .*, not int"):
        device.load_moe(router, layer["gate_up"], layer["down"], shared=3)
    assert device.memory.free_bytes == free


def test_memory_for_a_few_tokens(layer):
    """Calls become commands that fit; without room for one token they fail."""
    x = layer["x"]
    found = []
    for size in (1 << 26, 1 << 18):
        with open_device("golden", config=CONFIG, memory_bytes=size) as device:
            with device.load_moe(Router(layer["weight"], top_k=2), layer["gate_up"],
                                 layer["down"]) as moe:
                full = []
                if size < 1 << 26:
                    full.append(device.memory.allocate(device.memory.free_bytes - 12_000))
                before = device.counters()["commands"]
                found.append((moe(x), device.counters()["commands"] - before))
                if full:
                    while device.memory.free_bytes >= 1024:
                        full.append(device.memory.allocate(512))
                    with pytest.raises(OutOfDeviceMemory):
                        moe(x)
    (y, few), (again, many) = found
    assert (y == again).all() and many > few


class Watched(GoldenTransport):
    """Notes verbs of a thread that does not hold the device's lock."""

    device = None

    def _note(self, name):
        if self.device is not None and not self.device._lock._is_owned():
            self.alone.append(name)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alone = []


for verb in ("register_read", "register_write", "memory_read", "memory_write", "wait_interrupt"):
    def watched(self, *args, _verb=verb):
        self._note(_verb)
        return getattr(GoldenTransport, _verb)(self, *args)
    setattr(Watched, verb, watched)


def test_a_thread_that_speaks_to_the_device_holds_its_lock(layer):
    """A transport serves one thread at a time."""
    transport = Watched(CONFIG, memory_bytes=1 << 26)
    with Device(transport, CONFIG) as device:
        transport.device = device
        router = Router(layer["weight"], top_k=2, bias=np.ones(E_))
        with device.load_moe(router, layer["gate_up"], layer["down"]) as moe:
            moe(layer["x"])
            device.route(router, moe.route(layer["x"])[1] @ np.ones((2, E_), np.float32))
    assert transport.alone == []


def test_a_layer_whose_experts_were_closed_is_closed(device, layer):
    """Their memory may be another's."""
    with device.load_moe(Router(layer["weight"], top_k=2), layer["gate_up"], layer["down"]) as moe:
        moe.experts.close()
        free = device.memory.free_bytes
        with pytest.raises(DeviceClosed, match="layer must not be used after it was closed"):
            moe(layer["x"])
        assert device.memory.free_bytes == free
