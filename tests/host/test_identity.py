"""Identity experts: their weight times x, as the device has quantised it."""

import numpy as np
import pytest

from moeaccel.arithmetic import quantise_float32
from moeaccel.config import PRESETS
from moeaccel.golden import experts_float64
from moeaccel.host import errors, open_device
from moeaccel.image import Expert

E, D, I, N = 3, 70, 40, 2


@pytest.fixture
def device():
    with open_device("golden", config="tiny", memory_bytes=1 << 22) as opened:
        yield opened


def draw(seed=1):
    rng = np.random.default_rng(seed)
    stacks = (rng.standard_normal((E, 2 * I, D), np.float32) / 8,
              rng.standard_normal((E, D, I), np.float32) / 6)
    x, scores = rng.standard_normal((9, D), np.float32), rng.random((9, 3), np.float32)
    return stacks, x, rng.integers(-1, E + N + 2, (9, 3)), scores


@pytest.mark.parametrize("bits", [8, 16])
def test_identity_experts_are_exact(device, bits):
    """On a grid that is fine enough nothing but x is rounded."""
    stacks, x, ids, scores = draw()
    ids[:] = np.array([E, E + 1, E])
    loaded = device.load_experts(*stacks, identity=N, activation_bits=bits, grid_exponent=-40)
    assert (loaded.num_experts, loaded.num_identity, len(loaded.shapes)) == (E, N, E)
    scores = np.exp2(np.round(np.log2(scores))).astype(np.float32)
    padded = np.zeros((9, 96), np.float32)
    padded[:, :D] = x
    stored = quantise_float32(padded, bits // 8)[0].to_float64()[:, :D]
    total = scores.astype(np.float64).sum(axis=1, keepdims=True)
    assert np.array_equal(loaded(x, ids, scores), (stored * total).astype(np.float32))


def test_identity_routed_and_shared_experts_together(device):
    stacks, x, ids, scores = draw()
    shared = (stacks[0][0] / 2, stacks[1][0] / 2)
    y = device.load_experts(*stacks, weight_format="mxint8", identity=N, shared=shared)(
        x, ids, scores)
    exact = experts_float64(x, np.where(ids < E, ids, -1), scores, *stacks)
    exact += experts_float64(x, np.zeros((9, 1), int), np.ones((9, 1)), *([m] for m in shared))
    exact += (scores * ((ids >= E) & (ids < E + N))).sum(axis=1, keepdims=True) * x
    assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)
    experts = [Expert.quantise(*pair, "mxint8") for pair in zip(*stacks, strict=True)]
    again = device.load_quantised(experts, identity=N, shared=[Expert.quantise(*shared, "mxint8")])
    assert np.linalg.norm(again(x, ids, scores) - y) < 1e-5 * np.linalg.norm(y)


def test_ids_beyond_are_skipped(device):
    stacks, x, _, scores = draw()
    loaded = device.load_experts(*stacks, identity=N)
    assert not loaded(x, np.full((9, 3), E + N), scores).any()
    with pytest.raises(errors.InvalidOption, match="identity must be at least 0 experts, not -1"):
        device.load_experts(*stacks, identity=-1)
    with pytest.raises(errors.InvalidTensor, match="number of experts must be at least 1, not 0"):
        device.load_experts([], [], identity=1)


def test_some_format_must_hold_it():
    stacks, *_ = draw()
    config = PRESETS["tiny"].replace(name="odd", formats=("int4_g32",))
    with open_device("golden", config=config, memory_bytes=1 << 22) as device, pytest.raises(
            errors.InvalidOption, match="identity must be 0 in config 'odd', none of whose"):
        device.load_experts(*stacks, identity=1)


def test_identity_beside_blocks_of_experts(device):
    """An expert of several blocks is several entries of the table; the identity stays one."""
    stacks, x, ids, scores = draw()
    whole, blocks = (device.load_experts(*stacks, weight_format="mxint8", identity=N,
                                         row_blocks=count)(x, ids, scores) for count in (1, 2))
    assert np.linalg.norm(whole - blocks) < 0.01 * np.linalg.norm(whole)
