import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel.errors import FormatError
from moeaccel.formats import (
    FORMATS,
    QUANTISERS,
    check_matrix,
    prune,
    quantise,
    weight_format,
)

GAUSSIAN_ERRORS = {  # relative errors of ("amax", "search"), measured once on 4096 x 2048 weights
    "mxint8": (0.00826, 0.00821), "int4_g32": (0.0970, 0.0862), "int4_g64": (0.1076, 0.0949),
    "int4_g128": (0.1174, 0.1013), "mxfp4": (0.1150, 0.1116)}


def correlated(k, tokens=512, seed=0):
    """Return inputs, (tokens, k), that lie near a subspace, with channels of different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, k // 8)) @ rng.standard_normal((k // 8, k))
    return (x + rng.standard_normal((tokens, k))) * np.exp(rng.standard_normal(k) / 2)


def output_error(matrix, weights, x):
    y = x @ weights.T.astype(np.float64)
    return float(np.linalg.norm(x @ matrix.dequantise().T - y) / np.linalg.norm(y))


@pytest.mark.parametrize("name", FORMATS)
def test_searched_scales_have_the_errors_that_were_measured(name):
    weights = np.random.default_rng(1).standard_normal((256, 1024)).astype(np.float32)
    for quantiser, expected in zip(("amax", "search"), GAUSSIAN_ERRORS[name], strict=True):
        found = quantise(weights, name, quantiser=quantiser).relative_error(weights)
        assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_a_formats_value_already_stays(name):
    """Where a group reaches the format's largest integers, its scale is found again exactly."""
    fmt, rng = FORMATS[name], np.random.default_rng(2)
    integers = rng.choice(fmt.integers[(fmt.integers >= fmt.low)], (64, 4, fmt.group))
    integers[:, :, 0] = fmt.low
    significand = rng.integers(1024, 2048, (64, 4, 1)) if fmt.real_scale else 1
    scale = significand * 2.0 ** rng.integers(-fmt.max_shift, 1, (64, 4, 1))
    weights = (integers * scale).reshape(64, -1)
    for quantiser in QUANTISERS[:1] if fmt.real_scale else QUANTISERS[:2]:
        matrix = quantise(weights, name, quantiser=quantiser)
        assert (matrix.dequantise() == weights).all() and matrix.coarsened == 0


def test_moments_move_the_error_to_where_inputs_are_small():
    x = correlated(256)
    weights = np.random.default_rng(3).standard_normal((64, 256)).astype(np.float32)
    plain = quantise(weights, "int4_g32")
    weighted = quantise(weights, "int4_g32", moments=(x * x).mean(axis=0))
    assert weighted.relative_error(weights) > plain.relative_error(weights)
    size = np.sqrt((x * x).mean(axis=0))
    errors = [np.linalg.norm((m.dequantise() - weights) * size) for m in (plain, weighted)]
    assert errors[1] < 0.97 * errors[0]
    # Second moments hold mean squares, and units do not matter.
    again = quantise(weights, "int4_g32", moments=1e6 * x.T @ x)
    assert np.array_equal(again.integers, weighted.integers)


@pytest.mark.parametrize("name", [
    *FORMATS, "int4_g32_zp", "int4_g128_zp", "int4_g32_min", "int4_g32+2:4", "mxint8+1:4"])
def test_error_feedback_halves_the_outputs_error_on_correlated_inputs(name):
    x = correlated(200)
    weights = np.random.default_rng(4).standard_normal((48, 200)).astype(np.float32)
    weights = prune(weights, weight_format(name), "magnitude")
    moments = x.T @ x
    searched = quantise(weights, name, moments=moments)
    fed_back = quantise(weights, name, quantiser="gptq", moments=moments)
    check_matrix(fed_back)
    for field in ("significand", "shift", "row_exponent", "minimum"):
        assert np.array_equal(getattr(fed_back, field), getattr(searched, field))
    if searched.format.parts > 1:
        assert not fed_back.integers[weights == 0].any()
    share = 0.6 if searched.format.parts == 1 else 0.75  # fewer weights make up for less
    assert output_error(fed_back, weights, x) < share * output_error(searched, weights, x)


@given(st.sampled_from(list(FORMATS)), st.sampled_from(QUANTISERS), st.integers(0, 2**32 - 1),
       st.integers(-140, 120), st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_any_finite_weights_become_what_the_format_can_say(name, quantiser, seed, log_size, k):
    """Also weights whose squares float32 does not hold, rows that differ and groups of zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((3, k)) * np.exp2(rng.integers(-20, 6, (3, k)))
    weights = (np.ldexp(weights, log_size) * (rng.random((3, k)) < 0.7)).astype(np.float32)
    moments = np.diag(rng.random(k)) if quantiser == "gptq" else None
    matrix = quantise(weights, name, quantiser=quantiser, moments=moments)
    check_matrix(matrix)
    assert (np.abs(matrix.dequantise()).max(axis=1) <= 2 * np.abs(weights).max(axis=1)).all()
    if quantiser == "search":
        amax = quantise(weights, name, quantiser="amax")
        errors = [np.linalg.norm((m.dequantise() - weights) / (2.0 ** log_size))
                  for m in (matrix, amax)]
        assert errors[0] <= 1.01 * errors[1] + 1e-3 * np.linalg.norm(weights / 2.0 ** log_size)


def test_inputs_that_are_always_zero_cost_nothing():
    weights = np.random.default_rng(5).standard_normal((4, 64)).astype(np.float32)
    dead = np.zeros(64)
    assert np.array_equal(quantise(weights, "int4_g32", moments=dead).integers,
                          quantise(weights, "int4_g32").integers)
    check_matrix(quantise(weights, "int4_g32", quantiser="gptq", moments=np.diag(dead)))


@pytest.mark.parametrize(("quantiser", "moments", "message"), [
    ("best", None, "quantiser must be one of search, amax, gptq, not 'best'"),
    ("gptq", None, r"moments of quantiser 'gptq' must be an array of .* \(64, 64\), not left out"),
    ("gptq", np.ones(64), r"'gptq' must be an array of the shape \(64, 64\), not of \(64,\)"),
    ("search", np.ones(63), r"'search' must be .* \(64,\) or \(64, 64\), not of \(63,\)"),
    ("amax", np.ones(64), r"'amax' must be left out, not of \(64,\)"),
    ("search", np.full(64, np.nan), "moments must be finite"),
    ("search", -np.ones(64), "mean squares at least 0"),
    ("gptq", 2 * np.ones((64, 64)) - np.eye(64), "moments must be those of real inputs"),
])
def test_bad_input_is_named(quantiser, moments, message):
    with pytest.raises(FormatError, match=message):
        quantise(np.ones((2, 64), np.float32), "int4_g32", quantiser=quantiser, moments=moments)
