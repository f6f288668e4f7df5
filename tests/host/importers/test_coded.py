import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel.formats import ALL_FORMATS, check_matrix, quantise
from moeaccel.host.importers import (
    CheckpointError,
    Coded,
    Fit,
    ForeignCheckpoint,
    convert,
    expert_rows,
)

DENSE = [name for name, fmt in ALL_FORMATS.items() if fmt.parts == 1]


@given(st.sampled_from(DENSE), st.integers(1, 9), st.sampled_from([16, 32, 64, 96, 256]),
       st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=80, deadline=None)
def test_what_is_counted_as_exact_is(name, n, group, k, seed, powers):
    """Groups that were neither quantised again nor coarsened have the checkpoint's weights."""
    fmt, rng = ALL_FORMATS[name], np.random.default_rng(seed)
    integers = rng.integers(fmt.low - 1, fmt.high + 2, (n, k)).astype(np.int8)
    integers[rng.random((n, k)) < 0.3] = 0
    scales = np.exp2(rng.integers(-9, 1, (n, -(-k // group))))
    if not powers:
        scales *= rng.integers(1, 2048, scales.shape)
    coded = Coded(integers, scales * rng.choice([-1, 1], scales.shape), group)
    matrix, fit = convert(coded, fmt)
    check_matrix(matrix)
    exact = coded.floats().astype(np.float64)
    error = np.square(matrix.dequantise() - exact)
    assert np.isclose(fit.error, error.sum(), rtol=1e-3, atol=1e-9 * (exact**2).sum())
    assert np.isclose(fit.total, (exact**2).sum(), rtol=1e-4)
    assert fit.groups == matrix.shift.size and fit.coarsened == matrix.coarsened
    padded = np.pad(error, ((0, 0), (0, -k % fmt.group)))
    wrong = (padded.reshape(n, -1, fmt.group) > 0).any(axis=2).sum()
    assert wrong <= fit.requantised + fit.coarsened
    if fit.exact:
        assert fit.error == 0


@pytest.mark.parametrize(("group", "requantised"), [(16, 8), (32, 0), (64, 0), (128, 0)])
def test_groups_of_another_size(group, requantised):
    """A group of the format has one scale where it lies within the checkpoint's."""
    rng = np.random.default_rng(0)
    scales = rng.integers(1024, 2048, (2, 128 // group)).astype(np.float32)
    coded = Coded(rng.integers(-8, 8, (2, 128)).astype(np.int8), scales, group)
    assert convert(coded, "int4_g32")[1].requantised == requantised


def test_a_matrix_of_many_rows_is_that_of_its_parts():
    rng = np.random.default_rng(0)
    coded = Coded(rng.integers(-8, 9, (300, 1024)).astype(np.int8),
                  rng.random((300, 32)).astype(np.float16), 32)
    whole, fit = convert(coded, "int4_g32")
    parts = [convert(coded[rows], "int4_g32") for rows in (slice(0, 7), slice(7, 300))]
    assert fit.requantised == sum(part.requantised for _, part in parts) > 0
    assert np.array_equal(whole.integers, np.concatenate([m.integers for m, _ in parts]))
    assert np.array_equal(whole.significand, np.concatenate([m.significand for m, _ in parts]))


def test_floats_are_quantised_and_measured():
    weights = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    matrix, fit = convert(weights, "mxfp4")
    expected = quantise(weights, "mxfp4")
    assert np.array_equal(matrix.integers, expected.integers)
    assert fit.relative_error == pytest.approx(expected.relative_error(weights), rel=1e-4)
    tiny, huge = (convert(weights * np.float32(size), "mxfp4")[1] for size in (2.0**-120, 2.0**120))
    assert tiny.relative_error == pytest.approx(fit.relative_error, rel=1e-3)
    assert huge.relative_error == pytest.approx(fit.relative_error, rel=1e-3)
    assert (fit + Fit()).groups == fit.groups and Fit().relative_error == 0


def test_rows_of_gate_and_up_alternate():
    gate, up = (convert(Coded(np.full((2, 32), i, np.int8), np.ones((2, 1)), 32), "int4_g32")[0]
                for i in (3, -5))
    assert expert_rows(gate, up).dequantise()[:, 0].tolist() == [3, -5, 3, -5]
    with pytest.raises(ForeignCheckpoint, match=r"gate and up must have one format and shape, not "
                                                r"int4_g32 \(2, 32\) and int4_g32 \(1, 32\)"):
        expert_rows(gate, up[:1])


@pytest.mark.parametrize(("arguments", "message"), [
    ((np.zeros(3, np.int8), np.ones((1, 1)), 32), r"weights must be a matrix \(n, K\)"),
    ((np.zeros((1, 33), np.int8), np.ones((1, 1)), 32), r"scales must have the shape \(1, 2\)"),
    ((np.zeros((1, 32), np.int8), np.array([[np.inf]]), 32), "scales must be finite, but row 0"),
    ((np.zeros((1, 32), np.int8), np.ones((1, 1)), 32, np.ones((2, 1))), "minimum must have the"),
])
def test_arrays_that_are_no_matrix(arguments, message):
    with pytest.raises(CheckpointError, match=message):
        Coded(*arguments)
