import numpy as np
import pytest

from moeaccel import golden
from moeaccel.activations import ACTIVATIONS
from moeaccel.arithmetic import quantise_float32
from moeaccel.formats import FORMATS
from moeaccel.golden.dot_array import matvec
from moeaccel.golden.reference import experts_float64, quantised_float_experts
from moeaccel.image import Expert
from moeaccel.interface.commands import NonFinite, Status


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def gaussian():
    rng = np.random.default_rng(1)
    d_model, d_expert, tokens = 2048, 1024, 512
    gate_up = (rng.standard_normal((2 * d_expert, d_model)) / np.sqrt(d_model)).astype(np.float32)
    down = (rng.standard_normal((d_model, d_expert)) / np.sqrt(d_expert)).astype(np.float32)
    x = rng.standard_normal((tokens, d_model)).astype(np.float32)
    return x, gate_up, down


WEIGHT_ERROR = {"mxint8": 0.015, "int4_g32": 0.18, "int4_g64": 0.2,
                "int4_g128": 0.22, "mxfp4": 0.22}


@pytest.mark.parametrize("name", FORMATS)
def test_error_budget_on_gaussian_data(gaussian, name):
    x, gate_up, down = gaussian
    ids, weights = np.zeros((len(x), 1), np.int64), np.ones((len(x), 1), np.float32)
    layer = [Expert.quantise(gate_up, down, name)]
    rows = layer[0].gate_up.dequantise()
    same_weights = experts_float64(
        x, ids, weights, [np.concatenate([rows[0::2], rows[1::2]])], [layer[0].down.dequantise()]
    )
    exact = experts_float64(x, ids, weights, [gate_up], [down])
    assert relative(same_weights, exact) <= WEIGHT_ERROR[name]
    # The machine's own roundings move an 8-bit mantissa of h here and there.
    for planes, bound, machine in ((1, 0.02, 0.0005), (2, 0.0002, 0.00005)):
        y = golden.experts(x, ids, weights, layer, planes=planes).y
        same_quantisers = quantised_float_experts(x, ids, weights, layer, planes=planes)
        assert relative(y, same_weights) <= bound
        assert relative(y, same_quantisers) <= machine


def test_dot_products_are_exact_integers():
    rng = np.random.default_rng(2)
    from moeaccel.formats import quantise

    w = quantise(rng.standard_normal((32, 2880)).astype(np.float32), "int4_g128")
    x, _ = quantise_float32((rng.standard_normal((3, 2880)) * 100.0).astype(np.float32), 2)
    got = matvec(x, w)
    total = np.zeros((3, 32), object)
    scale = np.repeat(w.significand.astype(int) << w.shift.astype(int), 4, axis=1)[:, :90]
    for n in range(3):
        for r in range(32):
            block = (
                (x.mantissa[n].astype(object) * w.integers[r].astype(int))
                .reshape(90, 32)
                .sum(axis=1)
            )
            total[n, r] = int(
                (block * (scale[r].astype(object) << x.shift[n].astype(object))).sum()
            )
    exponent = x.base[:, None] + w.row_exponent[None, :].astype(int)
    for n in range(3):
        for r in range(32):
            error = abs(got.to_float64()[n, r] - float(total[n, r]) * 2.0 ** exponent[n, r])
            assert error <= 2.0**-17 * abs(float(total[n, r])) * 2.0 ** exponent[n, r]


def small_layer(rng, experts=4, d_model=64, d_expert=32, name="int4_g32"):
    return [
        Expert.quantise(
            rng.standard_normal((2 * d_expert, d_model)).astype(np.float32),
            rng.standard_normal((d_model, d_expert)).astype(np.float32),
            name,
        )
        for _ in range(experts)
    ]


def test_bits_do_not_depend_on_batch_or_order():
    rng = np.random.default_rng(3)
    layer = small_layer(rng)
    x = rng.standard_normal((9, 64)).astype(np.float32)
    ids = rng.integers(0, 4, (9, 3))
    weights = rng.random((9, 3)).astype(np.float32)
    whole = golden.experts(x, ids, weights, layer).y
    for t in range(9):
        alone = golden.experts(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], layer).y
        assert (alone == whole[t]).all()
    order = [2, 0, 1]
    assert (golden.experts(x, ids[:, order], weights[:, order], layer).y == whole).all()


def test_skipped_ids_nonfinite_overflow_and_underflow():
    rng = np.random.default_rng(4)
    layer = small_layer(rng)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    ids = np.array([[-1, 4], [0, -7], [1, 1]])
    weights = np.ones((3, 2), np.float32)
    result = golden.experts(x, ids, weights, layer)
    assert (result.y[0] == 0).all() and result.outcome == (Status.OK, 0, 0)
    assert result.overflows == result.underflows == 0
    twice = golden.experts(x[2:], np.array([[1]]), np.array([[2.0]], np.float32), layer).y
    assert np.allclose(result.y[2], twice[0], rtol=1e-4, atol=1e-6)
    x[0, 0] = x[1, 5] = np.inf
    result = golden.experts(x, ids, weights, layer)
    assert result.outcome == (Status.NONFINITE, 1, NonFinite.X)  # token 0 is routed nowhere
    large = golden.experts(x[2:] * np.float32(1e12), ids[2:], weights[2:], layer)
    assert large.outcome == (Status.OVERFLOW, 2 * 64, 0)
    weights[0], weights[1, 1], weights[2, 0] = np.nan, np.inf, -np.inf  # one of the last counts
    assert result.nonfinite_weights == []
    result = golden.experts(x, ids, weights, layer)
    assert result.nonfinite_weights == [2] and result.outcome == (Status.NONFINITE, 1, NonFinite.X)
    result = golden.experts(x[2:], ids[2:], weights[2:], layer)
    assert result.outcome == (Status.NONFINITE, 0, NonFinite.ROUTING_WEIGHT)
    for weight in (1e-30, 1e-45):  # the first underflows in the product, the second by itself
        small = np.array([[weight, 0]], np.float32)
        result = golden.experts(x[2:], ids[2:], small, layer)
        assert result.underflows == 64 and not result.y.any()
        assert result.outcome == (Status.OK, 0, 0)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_biases(gated, planes):
    rng = np.random.default_rng(10)
    gate_up = rng.standard_normal(((2 if gated else 1) * 64, 64)).astype(np.float32) / 8
    down = rng.standard_normal((64, 64)).astype(np.float32) / 8
    biases = {"gate_up_bias": rng.standard_normal(len(gate_up)),
              "down_bias": rng.standard_normal(64)}
    x = rng.standard_normal((9, 64)).astype(np.float32)
    ids, weights = np.zeros((9, 1), np.int64), rng.random((9, 1)).astype(np.float32)
    for some in ({}, *({name: biases[name]} for name in biases), biases):
        expert = Expert.quantise(gate_up, down, "mxint8", **some)
        y = golden.experts(x, ids, weights, [expert], planes=planes).y
        exact = experts_float64(x, ids, weights, [gate_up], [down],
                                **{name: [bias] for name, bias in some.items()})
        assert relative(y, exact) < 0.03  # 8-bit weights
        same = quantised_float_experts(x, ids, weights, [expert], planes=planes)
        assert relative(y, same) < (0.002 if planes == 1 else 2e-4)
        if some:
            assert relative(experts_float64(x, ids, weights, [gate_up], [down]), exact) > 0.1


def test_gemm():
    rng = np.random.default_rng(5)
    from moeaccel.formats import quantise

    w = rng.standard_normal((96, 64)).astype(np.float32)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    q = quantise(w, "mxint8")
    assert relative(golden.gemm(x, q).y, x.astype(np.float64) @ q.dequantise().T) <= 2e-4


MIXED = (("int4_g32", None, 32, "silu"), ("mxint8", "mxfp4", 128, "relu"),
         ("mxfp4", "int4_g64", 96, "silu"), ("int4_g128", "mxint8", 64, "relu"))


def mixed_layer(rng, d_model=64):
    """Return float weights of experts that differ in formats, widths and activations, and those."""
    floats, layer = [], []
    for name, down_format, d_expert, activation in MIXED:
        gate_up = (rng.standard_normal((2 * d_expert, d_model)) / 8).astype(np.float32)
        down = (rng.standard_normal((d_model, d_expert)) / 8).astype(np.float32)
        layer.append(Expert.quantise(gate_up, down, name, down_format=down_format,
                                     activation=activation))
        floats.append((gate_up, down))
    return floats, layer


@pytest.mark.parametrize("planes", [1, 2])
def test_a_mixed_layer_is_each_of_its_experts(planes):
    rng = np.random.default_rng(6)
    _, layer = mixed_layer(rng)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    one = np.ones((5, 1), np.float32)
    for e, weights in enumerate(layer):
        every = np.full((5, 1), e)
        alone = golden.experts(x, np.zeros((5, 1), int), one, [weights], planes=planes).y
        assert (golden.experts(x, every, one, layer, planes=planes).y == alone).all()
        assert np.abs(alone).max() > 0.01


def test_a_mixed_layer_is_its_float_semantics():
    rng = np.random.default_rng(7)
    floats, layer = mixed_layer(rng)
    x = rng.standard_normal((40, 64)).astype(np.float32)
    ids = np.stack([rng.permutation(4)[:2] for _ in x])
    weights = rng.random(ids.shape).astype(np.float32)
    names = [activation for *_, activation in MIXED]
    y = golden.experts(x, ids, weights, layer).y
    exact = experts_float64(x, ids, weights, *zip(*floats, strict=True), names)
    same_quantisers = quantised_float_experts(x, ids, weights, layer, planes=2)
    assert relative(y, exact) < 0.2  # 4-bit weights
    assert relative(y, same_quantisers) < 0.0001
    for other in (["silu"] * 4, names[::-1]):
        assert relative(experts_float64(x, ids, weights, *zip(*floats, strict=True), other),
                        exact) > 0.1


def test_matrices_are_experts_of_one_section():
    rng = np.random.default_rng(8)
    from moeaccel.formats import quantise

    _, (gated, *_) = mixed_layer(rng)
    matrix = quantise(rng.standard_normal((64, 64)).astype(np.float32), "mxint8")
    x = rng.standard_normal((6, 64)).astype(np.float32)
    ids, weights = np.array([[0, 1]] * 6), np.full((6, 2), 0.5, np.float32)
    one, every = np.ones((6, 1), np.float32), np.zeros((6, 1), int)
    both = golden.experts(x, ids, weights, [matrix, gated]).y
    parts = golden.gemm(x, matrix).y + golden.experts(x, every, one, [gated]).y
    assert relative(both, parts / 2) < 1e-6


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_with_and_without_up_rows_and_limits(activation, gated):
    rng = np.random.default_rng(9)
    gate_up = rng.standard_normal(((2 if gated else 1) * 64, 64)).astype(np.float32)
    down = rng.standard_normal((64, 64)).astype(np.float32)
    x = rng.standard_normal((9, 64)).astype(np.float32) / 8
    ids, weights = np.zeros((9, 1), np.int64), np.ones((9, 1), np.float32)
    found = {}
    for limit in (None, 0.5):
        expert = Expert.quantise(gate_up, down, "mxint8", activation=activation, limit=limit)
        assert expert.gated == gated
        y = golden.experts(x, ids, weights, [expert]).y
        exact = experts_float64(x, ids, weights, [gate_up], [down], activation, limit)
        assert relative(y, exact) < 0.03  # 8-bit weights
        assert relative(y, quantised_float_experts(x, ids, weights, [expert], planes=2)) < 2e-4
        found[limit] = y
    assert relative(found[None], found[0.5]) > 0.1
