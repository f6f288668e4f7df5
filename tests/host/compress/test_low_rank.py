"""Experts as products, on the golden device: three commands."""

from dataclasses import replace

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.host import errors, open_device
from moeaccel.host.compress.layer import FloatExpert, MoELayer
from moeaccel.host.compress.low_rank import LowRankLayer, factored, triples
from moeaccel.host.compress.method import method, report, stored
from moeaccel.host.compress.models import DeviceLayer, RoutedExperts
from moeaccel.host.errors import InvalidTensor
from moeaccel.host.weights import load_linears

H, I, E, T = 128, 96, 4, 12


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(9).standard_normal((T, H)).astype(np.float32)


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
    made = [FloatExpert(draw(2 * I, H), draw(H, I)) for _ in range(E)]
    return MoELayer.of(made, 2 * draw(E, H), 2, weight_format="mxint8")


@pytest.fixture(scope="module")
def smaller(layer):
    """Return the layer with experts of rank 32 and 64, and a whole one."""
    return replace(layer, experts=tuple(
        expert if rank is None else factored(expert, rank)
        for expert, rank in zip(layer.experts, (32, None, 64, 40), strict=True)))


def test_factors_are_the_nearest_of_their_rank(layer):
    expert = layer.experts[0]
    low = factored(expert, 40)  # multiples of 32
    assert np.linalg.matrix_rank(low.gate_up) == np.linalg.matrix_rank(low.down) == 32
    for made, exact in ((low.gate_up, expert.gate_up), (low.down, expert.down)):
        lost = np.linalg.svd(exact)[1][32:]
        assert np.linalg.norm(made - exact) == pytest.approx(np.linalg.norm(lost), rel=1e-4)
    assert np.allclose(low.factors.gate_up @ low.factors.into, low.gate_up, atol=1e-6)
    assert np.allclose(low.factors.out @ low.factors.inside, low.down, atol=1e-6)
    # 3 H I numbers are fewer than those of factors from rank 69 on.
    assert factored(expert, 64).factors is not None and factored(expert, 90) is expert


def test_three_commands_give_what_the_products_do(layer, smaller, x):
    assert [triple.experts for triple in triples(smaller)] == [(0, 3), (2,)]
    with open_device("golden", config="small", timing=True) as device:
        loaded = DeviceLayer(device, smaller)
        commands = device.counters()["commands"]
        y = loaded(x)
        assert device.counters()["commands"] - commands == 1 + 3 * 2
        cycles = device.total_cycles
        one = loaded(x[:1])
        cycles = device.total_cycles - cycles
    exact, products = smaller(x), stored(smaller)(x)
    assert np.linalg.norm(y - products) < 2e-3 * np.linalg.norm(products)
    assert np.linalg.norm(y - exact) < 0.03 * np.linalg.norm(exact)
    assert np.allclose(one, y[:1], rtol=1e-6, atol=1e-6)
    found = report([layer], [smaller], [x[:1]], PRESETS["small"])
    assert found.decode_cycles == cycles
    numbers = {None: 3 * H * I, 32: 32 * (2 * H + 3 * I), 64: 64 * (2 * H + 3 * I)}
    kept = sum(numbers[rank] for rank in (32, None, 64, 32)) / (4 * numbers[None])
    assert found.stored_bytes / found.stored_bytes_before == pytest.approx(kept, rel=0.05)
    routed = RoutedExperts(smaller)
    import torch

    assert np.allclose(routed(torch.from_numpy(x), None, None).numpy(), products, atol=1e-4)


def test_layers_of_a_device_are_closed(layer, smaller, x):
    with open_device("golden", config="small") as device:
        free = device.memory.free_bytes
        for given in (layer, smaller):  # whole experts, and products
            with DeviceLayer(device, given) as loaded:
                assert loaded(x).shape == x.shape and device.memory.free_bytes < free
            assert device.memory.free_bytes == free
            loaded.close()
            with pytest.raises(errors.DeviceClosed, match="layer must not be used after it was"):
                loaded(x)
        with LowRankLayer(device, smaller) as loaded:
            assert np.array_equal(loaded(x), DeviceLayer(device, smaller)(x))


def test_products_without_room_leave_nothing_behind(smaller):
    with open_device("golden", config="small", memory_bytes=1 << 17) as device:
        free = device.memory.free_bytes
        fill = device.memory.allocate(free - (48 << 10))
        with pytest.raises(errors.OutOfDeviceMemory):
            DeviceLayer(device, smaller)
        fill.free()
        assert device.memory.free_bytes == free


def test_moe_i2_gives_products_and_whole_experts(layer, x):
    (after,) = method("moe-i2")([layer], [x], share=1, rank=0.35)
    assert all(expert.factors is not None for expert in after.experts)
    (after,) = method("moe-i2")([layer], [x], share=1, rank=1)
    assert any(e is one for e in after.experts for one in layer.experts)  # left whole


@pytest.mark.parametrize(("name", "options"), [
    ("magnitude", {}), ("mc-smoe", {"share": 0.5}), ("hc-smoe", {"share": 0.5}),
    ("eep", {"generations": 1})])
def test_a_pass_over_products_leaves_none_of_other_weights(smaller, x, name, options):
    """What the device stores is what the pass made, not what the products were."""
    (after,) = method(name)([smaller], [x], **options)
    exact = after(x)
    assert np.linalg.norm(stored(after)(x) - exact) < 0.02 * np.linalg.norm(exact)


def test_linears_are_checked(layer):
    with open_device("golden", config="small") as device:
        (triple, _) = triples(replace(layer, experts=tuple(
            factored(e, rank) for e, rank in zip(layer.experts, (32, 32, 64, 64), strict=True))))
        loaded = load_linears(device, triple.into)
        y = loaded(np.ones((3, H), np.float32), np.array([0, 1, 7]), np.ones(3, np.float32))
        assert y.shape == (3, 32) and y[0].any() and y[1].any() and not y[2].any()
        with pytest.raises(InvalidTensor, match=r"ids must have the shape \(T,\) with T = 3"):
            loaded(np.ones((3, H), np.float32), np.array([0, 1]), np.ones(3, np.float32))
        with pytest.raises(InvalidTensor, match=r"matrices must be some of one shape, not of \(32"):
            load_linears(device, [triple.into[0], triple.out[0]])
        with pytest.raises(InvalidTensor, match="not of none"):
            load_linears(device, [])
