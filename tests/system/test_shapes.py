"""Dimensions that are no multiples of 32, and scales at the ends of their range, on RTL and golden
model."""

from dataclasses import replace

import numpy as np
import pytest

from moeaccel import golden
from moeaccel.formats import FORMATS, ROW_EXPONENTS, quantise
from moeaccel.image import Expert
from tests.support.pair import assert_same_bits, draw_experts


def filled(array, *shape):
    """Return an array with zeros behind it."""
    return np.pad(array, [(0, to - size) for to, size in zip(shape, array.shape, strict=True)])


@pytest.mark.parametrize(("name", "bits"), [
    ("int4_g32", 16), ("int4_g128", 8), ("mxint8", 16), ("mxfp4", 8)])
@pytest.mark.parametrize(("d_model", "d_expert"), [(40, 48), (48, 100), (100, 40)])
def test_experts_are_filled_up_with_zeros(tiny, name, bits, d_model, d_expert):
    rng = np.random.default_rng(d_model)
    gate_up, down = draw_experts(rng, 3, d_model, d_expert)
    x = rng.standard_normal((11, d_model), np.float32)
    ids, scores = rng.integers(-1, 3, (11, 2)), rng.standard_normal((11, 2)).astype(np.float32)
    grids = set()

    def script(device):
        with device.load_experts(gate_up, down, weight_format=name,
                                 activation_bits=bits) as loaded:
            grids.add(loaded.grid_exponent)
            return loaded(x, ids, scores)

    y = tiny.same(script)
    halves = filled(gate_up.reshape(3, 2, d_expert, d_model), 3, 2, 128, 128)
    wide = [Expert.quantise(*matrices, name) for matrices in zip(
        halves.reshape(3, 256, 128), filled(down, 3, 128, 128), strict=True)]
    expected = golden.experts(filled(x, 11, 128), ids, scores, wide, planes=bits // 8,
                              grid_exponent=grids.pop())
    assert_same_bits(y, expected.y[:, :d_model].copy())


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 100), (100, 48), (1, 1)])
def test_linear_layers_are_filled_up_with_zeros(tiny, d_out, d_in):
    rng = np.random.default_rng(d_in)
    weight = rng.standard_normal((d_out, d_in), np.float32)
    x = rng.standard_normal((70, d_in), np.float32)

    def script(device):
        with device.load_linear(weight, weight_format="mxint8", grid_exponent=-20) as loaded:
            return loaded(x)

    expected = golden.gemm(filled(x, 70, 128), quantise(filled(weight, 128, 128), "mxint8"),
                           grid_exponent=-20)
    assert_same_bits(tiny.same(script), expected.y[:, :d_out].copy())


@pytest.mark.parametrize("name", FORMATS)
def test_row_exponents_at_both_ends(tiny, name):
    """No exponent of the chain wraps for what load_quantised accepts, whatever x and weights."""
    rng = np.random.default_rng(0)
    gate_up, down = draw_experts(rng, 4, 64, 64)
    layer = [Expert.quantise(*matrices, name) for matrices in zip(gate_up, down, strict=True)]
    low, high = ROW_EXPONENTS[0], ROW_EXPONENTS[-1]
    ends = [(low, low), (low, high), (high, low), (high, high)]
    layer = [
        replace(e, gate_up=replace(e.gate_up, row_exponent=np.full(128, of_gate_up, np.int16)),
                down=replace(e.down, row_exponent=np.full(64, of_down, np.int16)))
        for e, (of_gate_up, of_down) in zip(layer, ends, strict=True)]
    x = rng.standard_normal((12, 64), np.float32) * np.float32([2**-120, 1, 2**124])[
        np.arange(12) % 3, None]
    one = np.array([[2.0**-120], [1.0], [2.0**126]], np.float32)

    for expert in range(4):
        for grid in (-100, 60):
            def script(device, grid=grid, expert=expert):
                with device.load_quantised(layer, grid_exponent=grid) as loaded:
                    return loaded(x, np.full((12, 1), expert), np.repeat(one, 4, axis=0))

            tiny.same(script)
