"""Shared experts and a dense MLP beside the experts: every token goes through them."""

import numpy as np
import pytest
import torch

from moeaccel.formats import weight_format
from moeaccel.golden import experts_float64
from moeaccel.host import errors, open_device
from moeaccel.image import Expert

E, D, I, WIDE = 3, 64, 32, 96


def matrices(rng, count, width):
    return [(rng.standard_normal((2 * width, D), np.float32) / 8,
             rng.standard_normal((D, width), np.float32) / 6) for _ in range(count)]


@pytest.fixture
def device():
    with open_device("golden", config="tiny", memory_bytes=1 << 22) as opened:
        yield opened


@pytest.fixture
def layer():
    rng = np.random.default_rng(1)
    routed = matrices(rng, E, I)
    call = (rng.standard_normal((9, D), np.float32), rng.integers(-1, E + 3, (9, 2)),
            rng.random((9, 2), np.float32))
    return routed, matrices(rng, 1, WIDE)[0], matrices(rng, 1, I)[0], call


def stacks(routed):
    return [np.stack(part) for part in zip(*routed, strict=True)]


def test_every_token_goes_through_shared_experts(device, layer):
    routed, one, other, (x, ids, scores) = layer
    loaded = device.load_experts(*stacks(routed), weight_format="mxint8", shared=[one, other])
    assert loaded.num_experts == E and len(loaded.shapes) == E
    assert [shape.d_expert for shape in loaded.shared_shapes] == [WIDE, I]
    y = loaded(x, ids, scores)
    plain = np.where(ids < E, ids, -1)  # ids that a shared expert has in the table, too
    every = np.hstack([plain, np.full((9, 1), E), np.full((9, 1), E + 1)])
    exact = experts_float64(x, every, np.hstack([scores, np.ones((9, 2))]),
                            *zip(*routed, one, other, strict=True))
    assert np.linalg.norm(y - exact) < 0.03 * np.linalg.norm(exact)
    # Bits and cost are those of any pair.
    experts = [Expert.quantise(*pair, "mxint8") for pair in (*routed, one, other)]
    pairs = device.load_quantised(experts, grid_exponent=loaded.grid_exponent)
    assert np.array_equal(
        pairs(x, every, np.hstack([scores, np.ones((9, 2), np.float32)])), y)
    assert pairs.last.cycles == loaded.last.cycles
    again = device.load_quantised(
        experts[:E], shared=experts[E:], grid_exponent=loaded.grid_exponent)
    assert np.array_equal(again(x, ids, scores), y)


def test_a_pair_is_one_shared_expert(device, layer):
    routed, one, _, (x, ids, scores) = layer
    options = {"weight_format": "mxint8", "grid_exponent": -20}
    alone = device.load_experts(*stacks(routed), shared=[one], **options)(x, ids, scores)
    assert np.array_equal(
        device.load_experts(*stacks(routed), shared=one, **options)(x, ids, scores), alone)
    tensors = tuple(map(torch.from_numpy, one))
    y = device.load_experts(*map(torch.from_numpy, stacks(routed)), shared=tensors, **options)(
        torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(scores))
    assert np.array_equal(y.numpy(), alone)
    none = device.load_experts(*stacks(routed), shared=one, **options)(
        x, np.zeros((9, 0), np.int64), np.zeros((9, 0), np.float32))
    without = device.load_experts(*stacks(routed), **options)(x, ids, scores)
    assert np.linalg.norm(alone - without - none) < 1e-4 * np.linalg.norm(alone)


def test_a_shared_expert_may_have_another_format(device, layer):
    routed, one, _, _ = layer
    formats = ["int4_g32", "mxfp4", "int4_g32"]
    with pytest.raises(errors.InvalidOption, match="shared_format must be given where"):
        device.load_experts(*stacks(routed), weight_format=formats, shared=one)
    loaded = device.load_experts(*stacks(routed), weight_format=formats, shared=one,
                                 shared_format="mxint8")
    assert [shape.format.name for shape in loaded.shapes] == formats
    assert loaded.shared_shapes[0].format == weight_format("mxint8")


def test_calibration_of_shared_experts_is_all_tokens(device, layer):
    routed, one, _, _ = layer
    x = np.random.default_rng(2).standard_normal((400, D), np.float32)
    x[:, :8] *= 100
    ids = np.zeros((400, 1), np.int64)
    reports = [device.load_experts(*stacks(routed), shared=one, calibration=calibration).report
               for calibration in (None, (x, ids))]
    assert reports[0] != reports[1]


@pytest.mark.parametrize(("shared", "message"), [
    (lambda g, d: (g, d[:32]), r"shared expert 0 must have gate_up \(2 I, 64\) and down \(64, I\)"),
    (lambda g, d: [(g, d), (g[:96], d)], "shared expert 1 must have gate_up"),
    (lambda g, d: [g, d, g], "shared must be a pair .* not ndarray in place 0"),
    (lambda g, d: [(g, d, d)], "shared must be a pair"),
])
def test_shapes_are_checked(device, layer, shared, message):
    routed, one, _, _ = layer
    free = device.memory.free_bytes
    with pytest.raises(errors.InvalidTensor, match=message):
        device.load_experts(*stacks(routed), shared=shared(*one))
    assert device.memory.free_bytes == free


def test_shared_experts_take_places_of_a_token(device, layer):
    routed, one, other, (x, _, _) = layer
    loaded = device.load_experts(*stacks(routed), shared=[one, other])
    with pytest.raises(errors.LimitExceeded, match=r"at most 14 .* not 15: 2 of 16 are shared"):
        loaded(x, np.zeros((9, 15), np.int64), np.zeros((9, 15), np.float32))
    assert loaded(x, np.zeros((9, 14), np.int64), np.zeros((9, 14), np.float32)).any()
