"""Layers whose experts differ in format, width and how rows become h: the golden model's bits, and
the cost of their parts."""

import numpy as np
import pytest

from moeaccel import golden
from moeaccel.activations import ACTIVATIONS
from moeaccel.formats import FORMATS
from moeaccel.host.compress.layer import FloatExpert, MoELayer
from moeaccel.host.compress.low_rank import factored
from moeaccel.host.compress.models import DeviceLayer
from moeaccel.image import Expert
from tests.support.pair import assert_same_bits, draw_experts

D_MODEL = 96
WIDTHS = (32, 160, 64, 96, 256)
NAMES = list(FORMATS)


def draw_expert(rng, name, down, d_expert, activation, *, gated=True, limit=None, gate_limit=None,
                biases=0):
    """``biases``: 1 of gate and up rows, 2 of down rows, 3 of both."""
    gate_up, matrix = draw_experts(rng, 1, D_MODEL, d_expert, spread=6)
    rows = gate_up[0] if gated else gate_up[0][:d_expert]
    return Expert.quantise(
        rows, matrix[0], name, down_format=down, activation=activation, limit=limit,
        gate_limit=gate_limit,
        gate_up_bias=rng.standard_normal(len(rows)) if biases & 1 else None,
        down_bias=rng.standard_normal(D_MODEL) if biases & 2 else None)


def draw_layer(seed):
    """Return one expert of each format, no two alike in anything."""
    rng = np.random.default_rng(seed)
    downs, widths = rng.permutation(NAMES), rng.permutation(WIDTHS)
    activations = np.roll(list(ACTIVATIONS), seed)[:len(NAMES)]
    return [draw_expert(rng, name, str(down), int(width), str(activation),
                        gated=bool((seed + e) & 1), limit=(None, 0.5, 7.0)[(seed + e) % 3],
                        gate_limit=(None, 0.62345123291015625)[(seed + e) % 5 == 0],
                        biases=(seed + e) % 4)
            for e, (name, down, width, activation) in enumerate(
                zip(NAMES, downs, widths, activations, strict=True))]


def test_products_in_three_commands(tiny):
    """Layers between other widths than d_model, of matrices and of experts: low-rank factors."""
    rng = np.random.default_rng(3)
    experts = [factored(FloatExpert(*(w[0] for w in draw_experts(rng, 1, D_MODEL, 96))),
                        32) for _ in range(3)]
    layer = MoELayer.of(experts, rng.standard_normal((3, D_MODEL)), 2)
    x = rng.standard_normal((9, D_MODEL), np.float32)
    tiny.reset()

    def script(device):
        return DeviceLayer(device, layer)(x)

    y = tiny.same(script)
    exact = layer(x)
    assert np.linalg.norm(y - exact) < 0.3 * np.linalg.norm(exact)  # of four matrices each


@pytest.mark.parametrize("config", ["tiny", "small"])
@pytest.mark.parametrize(("tokens", "bits"), [(1, 16), (3, 8), (40, 16), (40, 8)])
def test_mixed_layers(request, config, tokens, bits):
    pair = request.getfixturevalue(config)
    for seed in range(3):
        layer = draw_layer(seed)
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((tokens, D_MODEL), np.float32)
        ids = rng.integers(-1, len(layer) + 1, (tokens, 3))
        scores = rng.standard_normal(ids.shape).astype(np.float32)
        pair.reset()

        def script(device, layer=layer, call=(x, ids, scores)):
            with device.load_quantised(layer, activation_bits=bits, grid_exponent=-24) as loaded:
                return loaded(*call)

        expected = golden.experts(x, ids, scores, layer, planes=bits // 8, grid_exponent=-24)
        assert_same_bits(pair.same(script), expected.y)
        pair.check()


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize(("one", "other"), [
    (("mxint8", "mxint8", 160), ("int4_g32", "int4_g32", 160)),
    (("int4_g32", "mxint8", 96), ("mxfp4", "int4_g128", 256)),
    (("mxfp4", "mxfp4", 32), ("mxfp4", "mxfp4", 256))])
def test_a_mixed_layer_costs_what_its_parts_cost(tiny, one, other, tokens):
    """Half of a layer of each kind: experts in turn of one kind and the other."""
    rng = np.random.default_rng(0)
    parts = [draw_expert(rng, *kind, "silu") for kind in (one, other)]
    x, scores = np.ones((tokens, D_MODEL), np.float32), np.ones((tokens, 4), np.float32)
    ids = np.tile(np.arange(4), (tokens, 1))

    def cycles(layer):
        with tiny.rtl.load_quantised(layer, grid_exponent=-10) as loaded:
            loaded(x, ids, scores)
            return loaded.last.cycles

    alone = sum(cycles([part] * 4) for part in parts)
    assert 2 * cycles(parts * 2) <= 1.002 * alone + 64


def test_shared_and_identity_experts(tiny):
    """They are entries of the table: an expert of another width, and a matrix behind all."""
    rng = np.random.default_rng(4)
    gate_up, down = draw_experts(rng, 3, D_MODEL, 64)
    shared = tuple(part[0] for part in draw_experts(rng, 1, D_MODEL, 160))
    x = rng.standard_normal((7, D_MODEL), np.float32)
    ids, scores = rng.integers(-1, 6, (7, 2)), rng.standard_normal((7, 2)).astype(np.float32)
    tiny.reset()

    def script(device):
        with device.load_experts(gate_up, down, activation="gpt_oss", limit=7.0, shared=shared,
                                 identity=2, grid_exponent=-24) as loaded:
            return loaded(x, ids, scores)

    y = tiny.same(script)
    assert y.any(axis=1).all()
    tiny.check()
