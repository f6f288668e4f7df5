"""Experts in blocks of hidden rows, of which a call takes the leading ones."""

import numpy as np
import pytest

from moeaccel.host import open_device
from moeaccel.host.errors import InvalidOption, LimitExceeded

E, H, I, BLOCKS = 3, 96, 128, 4


@pytest.fixture(scope="module")
def device():
    with open_device("golden", config="tiny", memory_bytes=1 << 24) as opened:
        yield opened


def draw(gated=True):
    rng = np.random.default_rng(0)
    parts = 2 if gated else 1
    return (rng.standard_normal((E, parts * I, H), np.float32) / 10,
            rng.standard_normal((E, H, I), np.float32) / 10,
            rng.standard_normal((5, H), np.float32),
            np.array([[0, 2, -1], [1, 1, 0], [2, 0, 3], [0, 1, 2], [-4, 9, 1]]),
            rng.standard_normal((5, 3), np.float32))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("leading", [1, 3, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_leading_blocks_are_narrower_experts(device, gated, leading, biased):
    gate_up, down, x, ids, scores = draw(gated)
    first, biases = gate_up.mean(axis=2), {}  # of no zero mean over the rows
    width = leading * I // BLOCKS
    rows = gate_up.reshape(E, -1, I, H)[:, :, :width].reshape(E, -1, H)
    if biased:
        biases = {"gate_up_bias": first, "down_bias": down.mean(axis=2) * 8}
    with device.load_experts(gate_up, down, gated=gated, weight_format="mxint8",
                             row_blocks=BLOCKS, grid_exponent=-28, **biases) as layer:
        assert (layer.num_experts, layer.row_blocks, len(layer.shapes)) == (E, BLOCKS, E * BLOCKS)
        y = layer(x, ids, scores, leading_blocks=leading)
        if leading == BLOCKS:
            assert np.array_equal(layer(x, ids, scores), y)
        cycles = layer.last.cycles
        layer(x, ids, scores, leading_blocks=1)
        assert layer.last.cycles <= cycles
    if biased:
        biases["gate_up_bias"] = first.reshape(E, -1, I)[:, :, :width].reshape(E, -1)
    with device.load_experts(rows, down[:, :, :width], gated=gated, weight_format="mxint8",
                             grid_exponent=-28, **biases) as narrow:
        expected = narrow(x, ids, scores)
    # Each block's output is rounded by itself; the exponent of h is a token's within a block.
    assert np.linalg.norm(y - expected) < 1e-3 * np.linalg.norm(expected)
    assert (y[4] == 0).all() == (expected[4] == 0).all()


def test_errors(device):
    gate_up, down, x, ids, scores = draw()
    for wrong in (5, 0, 2.0):
        with pytest.raises(InvalidOption, match=r"row_blocks must (divide I = 128, and|be .*at l)"):
            device.load_experts(gate_up, down, row_blocks=wrong)
    with device.load_experts(gate_up[:2], down[:2], row_blocks=8) as layer:
        with pytest.raises(LimitExceeded, match=r"at most 2 experts .* not 3: each has 8 blocks"):
            layer(x, ids, scores)
        for wrong in (0, 9):
            with pytest.raises(InvalidOption, match="leading_blocks must be from 1 to the layer's"):
                layer(x, ids, scores, leading_blocks=wrong)
