"""The grid of a layer: its two bounds, and the estimate that they lean on."""

import numpy as np
import pytest

from moeaccel.activations import ACTIVATIONS
from moeaccel.formats import FORMATS, quantise
from moeaccel.golden import experts_float64
from moeaccel.grid import gated_output, grid_exponent, linear_output, squares
from moeaccel.image import Expert, interleave_gate_up


def draw_expert(rng, d_model, d_expert, scale=1.0):
    gate_up = rng.standard_normal((2 * d_expert, d_model), np.float32) * (scale / d_model**0.5)
    return gate_up, rng.standard_normal((d_model, d_expert), np.float32) * (scale / d_expert**0.5)


def typical(gate_up, down, x_rms=1.0, name="mxint8", activation="silu"):
    expert = Expert.quantise(gate_up, down, name)
    return gated_output(squares(expert.gate_up, interleave_gate_up(gate_up)),
                        squares(expert.down, down), x_rms=x_rms, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 1.0, 3.0, 1e2, 1e4])
@pytest.mark.parametrize(("d_model", "d_expert"), [(32, 32), (48, 100), (256, 96), (2048, 64)])
def test_the_typical_output_is_that_of_gaussian_x(scale, d_model, d_expert, activation):
    rng = np.random.default_rng(d_model)
    gate_up, down = draw_expert(rng, d_model, d_expert, scale)
    for x_rms in (1.0, 0.01, 30.0):
        x = rng.standard_normal((400, d_model)) * x_rms
        y = experts_float64(x, np.zeros((400, 1), int), np.ones((400, 1)), [gate_up], [down],
                            activation)
        assert typical(gate_up, down, x_rms, activation=activation) == pytest.approx(
            np.sqrt((y**2).mean()), rel=0.15)


def test_a_linear_layer_too():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((96, 200), np.float32) * np.geomspace(1e-3, 10, 96)[:, None]
    y = rng.standard_normal((4000, 200)) @ weight.T * 5
    weight = weight.astype(np.float32)
    found = linear_output(squares(quantise(weight, "mxint8"), weight), x_rms=5)
    assert found == pytest.approx(np.sqrt((y**2).mean()), rel=0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights_say_the_same(name):
    gate_up, down = draw_expert(np.random.default_rng(3), 96, 160)
    expert = Expert.quantise(gate_up, down, name)
    found = gated_output(squares(expert.gate_up), squares(expert.down))
    assert found == pytest.approx(typical(gate_up, down), rel=0.1)
    assert squares(expert.down).rows == pytest.approx((expert.down.dequantise() ** 2).sum(axis=1))
    assert squares(expert.down).error is None


def test_sums_of_squares_are_those_of_the_whole_matrix():
    """Also where it is read in several pieces, the last one short."""
    weights = np.random.default_rng(0).standard_normal((301, 1000), np.float32)
    matrix = quantise(weights, "int4_g32")
    found, exact = squares(matrix, weights), weights.astype(np.float64)
    assert found.rows == pytest.approx((exact**2).sum(axis=1))
    assert found.columns == pytest.approx((exact**2).sum(axis=0))
    assert found.error == pytest.approx(((matrix.dequantise() - exact) ** 2).sum())


def test_both_bounds_hold_for_every_typical_output():
    """Half a unit is 2**-10 of an output 2**16 below; 2**43 units are an output 2**16 above."""
    for size in np.exp2(np.linspace(-70, 80, 3001)):
        g = grid_exponent([size])
        assert 2.0 ** (g - 1) <= size * 2.0**-16 * 2.0**-10
        assert size * 2.0**16 <= 2.0 ** (g + 43)
        assert g % 2 == 0


def test_a_multiple_of_4_would_not_do():
    """Why the grid is a multiple of 2: half of all sizes have no multiple of 4 in both bounds."""
    fits = [any(size - 27 <= g <= size - 25 for g in range(-100, 61, 4))
            for size in np.arange(0, 8, 0.25)]
    assert 0.4 < np.mean(fits) < 0.6


def test_it_is_clamped_to_what_a_layer_descriptor_holds():
    assert [grid_exponent([2.0**e]) for e in (-300, -75, 85, 300)] == [-100, -100, 60, 60]
    assert grid_exponent([np.inf]) == 60


def test_the_median_of_the_experts_counts():
    plain = grid_exponent([1.0] * 8)
    assert plain == -26
    assert grid_exponent([1.0] * 5 + [0.0] * 100) == plain
    assert grid_exponent([1.0] * 5 + [1e30]) == plain
    assert grid_exponent([1.0] * 5 + [1e-30, 1e-30]) == plain
    assert grid_exponent([]) == grid_exponent([0.0]) == plain


def test_experts_of_zeros_have_no_typical_output():
    zeros = np.zeros((64, 32), np.float32), np.zeros((32, 32), np.float32)
    assert typical(*zeros) == 0
