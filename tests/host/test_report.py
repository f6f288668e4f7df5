"""What quantising costs: the numbers, and the one warning."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from moeaccel.arithmetic import quantise_float32
from moeaccel.formats import FORMATS, quantise
from moeaccel.host.report import measure_activations
from moeaccel.image import Expert


def draw_weights(rng, experts=3, d_model=64, d_expert=96):
    return (rng.standard_normal((experts, 2 * d_expert, d_model), np.float32) / 8,
            rng.standard_normal((experts, d_model, d_expert), np.float32) / 8)


def relative(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def call(rng, tokens=6, d_model=64):
    return (rng.standard_normal((tokens, d_model), np.float32), rng.integers(0, 3, (tokens, 2)),
            rng.random((tokens, 2), np.float32))


# -- weights
@pytest.mark.parametrize("name", FORMATS)
def test_the_error_of_each_kind_of_matrix(device, name):
    gate_up, down = draw_weights(np.random.default_rng(0))
    down[1] *= 100  # the error is that of all experts together: the largest weigh most
    report = device.load_experts(gate_up, down, weight_format=name).report
    layer = [Expert.quantise(*matrices, name) for matrices in zip(gate_up, down, strict=True)]
    found = np.stack([e.down.dequantise() for e in layer])
    assert report.relative_error == {
        "gate_up": pytest.approx(relative(
            np.stack([quantise(g, name).dequantise() for g in gate_up]), gate_up)),
        "down": pytest.approx(relative(found, down))}
    each = [np.sqrt(((e.down.dequantise() - d) ** 2).sum()
                    + ((quantise(g, name).dequantise() - g) ** 2).sum())
            / np.sqrt((d.astype(float) ** 2).sum() + (g.astype(float) ** 2).sum())
            for e, g, d in zip(layer, gate_up, down, strict=True)]
    assert report.worst_error == pytest.approx(max(each), rel=1e-6)
    assert report.worst_expert == int(np.argmax(each))
    assert report.groups == 3 * (192 * layer[0].gate_up.shift.shape[1]
                                 + 64 * layer[0].down.shift.shape[1])
    assert report.weight_format == name
    json.dumps(dataclasses.asdict(report), allow_nan=False)


def test_weights_that_are_zero_lost_nothing(device):
    report = device.load_linear(np.zeros((32, 32), np.float32)).report
    assert report.relative_error == {"weight": 0.0}
    assert report.warning is None


def test_quantised_weights_have_no_error_that_one_could_know(device):
    layer = [Expert.quantise(*m, "mxfp4")
             for m in zip(*draw_weights(np.random.default_rng(0)), strict=True)]
    loaded = device.load_quantised(layer)
    assert loaded.report.relative_error is None
    assert loaded.report.worst_expert is loaded.report.worst_error is None
    assert loaded.report.coarsened == loaded.coarsened == 0


def test_coarsened_scales_are_counted_and_warned_of(device, caplog):
    weight = np.random.default_rng(0).standard_normal((32, 256), np.float32)
    weight[:, 32:] *= 2.0**-12
    loaded = device.load_linear(weight, weight_format="int4_g32")
    assert loaded.report.groups == 32 * 8
    coarsened = loaded.report.coarsened  # few of the 224 happen to need no bit that is lost
    assert 210 < coarsened == loaded.coarsened <= 32 * 7
    assert f"{coarsened} of 256 scales of int4_g32 were coarsened" in caplog.text
    caplog.clear()
    assert device.load_linear(weight, weight_format="mxint8").report.coarsened == 0
    assert not caplog.records


def test_large_errors_of_weights_are_warned_of(device, caplog):
    weight = np.random.default_rng(0).standard_normal((32, 256), np.float32)
    weight[:, ::128] = 14  # its group's unit is 2
    assert device.load_linear(weight, weight_format="mxint8").report.warning is None
    assert not caplog.records
    report = device.load_linear(weight, weight_format="int4_g128").report
    assert report.relative_error["weight"] > 0.2
    assert "relative error of weight in int4_g128 is" in caplog.text
    assert "try another weight_format" in caplog.text


# -- x
@pytest.mark.parametrize("planes", [1, 2])
def test_the_error_of_x(planes):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 96), np.float32)
    x[3, 40] = 1000
    x[5] = 0
    report = measure_activations(x, planes)
    found = quantise_float32(x, planes)[0].to_float64()
    each = np.linalg.norm(found - x, axis=1) / np.maximum(np.linalg.norm(x, axis=1), 1e-9)
    assert report.relative_error == pytest.approx(relative(found, x))
    assert report.worst_token == each.argmax()
    assert report.worst_error == pytest.approx(each.max())
    assert (report.tokens, report.elements, report.blocks) == (7, 6 * 96, 6 * 3)
    assert report.flushed == ((x != 0) & (found == 0)).sum()
    json.dumps(dataclasses.asdict(report), allow_nan=False)


def test_an_outlier_flushes_its_block_in_a8_and_not_in_a16():
    x = np.random.default_rng(0).standard_normal((4, 128), np.float32)
    x[:, 7] = 4000
    coarse, fine = measure_activations(x, 1), measure_activations(x, 2)
    assert coarse.flushed >= 4 * 31
    assert coarse.relative_error < 0.01  # the outlier itself hides it
    assert "of x's elements became zero" in coarse.warning
    assert fine.flushed < 4 * 4 and fine.warning is None


def test_blocks_far_below_their_token_are_coarsened():
    x = np.ones((2, 96), np.float32)
    x[0, 32:64] = 2.0**-10
    x[1, 32:64] = 2.0**-11
    x[1, 64:] = 0
    report = measure_activations(x, 1)
    assert (report.blocks, report.coarsened, report.flushed) == (5, 1, 0)


def test_what_is_not_finite_counts_as_zero():
    x = np.full((2, 40), np.nan, np.float32)
    x[1] = 3
    report = measure_activations(x, 2)
    assert (report.elements, report.relative_error) == (40, 0.0)


def test_last_measures_when_it_is_asked(device):
    rng = np.random.default_rng(0)
    experts = device.load_experts(*draw_weights(rng), activation_bits=8)
    x, ids, weights = call(rng, 100)
    x[60, 3] = 500
    experts(x, ids, weights)
    x[:] = 0  # a call keeps what it needs, not the caller's buffer
    report = experts.last.activations
    assert report.tokens == 15 and report.worst_token % 7 == 0
    assert report.relative_error == pytest.approx(0.008, rel=0.3)
    assert experts.last.activations is report
    handle = experts.submit(*call(rng, 0))
    experts.sync(handle)
    assert experts.last.activations is None


def test_a_warning_comes_once_for_each_layer(device, caplog):
    rng = np.random.default_rng(0)
    experts = device.load_experts(*draw_weights(rng), activation_bits=8)
    good = call(rng)
    bad = good[0].copy(), *good[1:]
    bad[0][:, ::32] = 150
    caplog.set_level(logging.WARNING)
    experts(*good)
    assert not caplog.records
    for _ in range(8):
        experts(*bad)
    assert len(caplog.records) == 1
    assert "load the layer with activation_bits=16" in caplog.text
