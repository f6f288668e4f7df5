from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st

from moeaccel import arithmetic

INT62 = st.integers(-(1 << 62) + 1, (1 << 62) - 1)


def half_even(value: Fraction) -> int:
    magnitude = abs(value)
    rounded = round(magnitude)  # Python rounds half to even
    return -rounded if value < 0 else rounded


@given(INT62)
def test_bit_length(value):
    assert arithmetic.bit_length(np.array([value]))[0] == abs(value).bit_length()


@given(INT62, st.integers(0, 100))
def test_round_shift_is_half_to_even(value, shift):
    got = arithmetic.round_shift(np.array([value]), shift)[0]
    assert got == half_even(Fraction(value, 1 << shift))


@given(INT62, st.integers(-300, 300))
def test_normalise(value, exponent):
    f = arithmetic.normalise(np.array([value]), exponent)
    m, e = int(f.mantissa[0]), int(f.exponent[0])
    if value == 0:
        assert (m, e) == (0, 0)
        return
    assert 1 << 16 <= abs(m) < 1 << 17
    shift = abs(value).bit_length() - 17
    rounded = half_even(Fraction(value) / Fraction(2) ** shift)
    assert Fraction(m) * Fraction(2) ** e == Fraction(rounded) * Fraction(2) ** (exponent + shift)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=64, max_size=64),
    st.sampled_from([1, 2]),
)
def test_quantised_elements_are_nearest(values, planes):
    x = np.array([values], np.float32)
    x[np.abs(x) < 2.0**-126] = 0
    q, nonfinite = arithmetic.quantise_float32(x, planes)
    assert not nonfinite.any()
    assert np.abs(q.mantissa).max() <= (127 if planes == 1 else 32639)
    assert (q.shift >= 0).all() and (q.shift <= (10 if planes == 1 else 11)).all()
    unit = np.ldexp(1.0, (np.repeat(q.shift, 32, axis=1) + q.base[:, None]).astype(int))
    limit = np.where(np.abs(q.mantissa) == 127, 1.0, 0.5) if planes == 1 else 0.5
    assert (np.abs(q.to_float64() - x) <= limit * unit).all()


def test_planes_are_balanced_and_join():
    mantissa = np.arange(-32639, 32640).reshape(1, -1)
    q = arithmetic.BlockFloat(mantissa, np.zeros((1, 1), int), np.zeros(1, int), 2)
    hi, lo = q.plane_mantissas()
    assert (256 * hi + lo == mantissa).all()
    assert np.abs(hi).max() <= 127 and lo.min() >= -128 and lo.max() <= 127


def test_raised_exponent_only_where_rounding_exceeds_the_digits():
    edge = np.float32(arithmetic.RAISE_THRESHOLD)
    for value, mantissa in ((np.nextafter(edge, np.float32(0)), 32639), (edge, 16320)):
        x = np.zeros((1, 32), np.float32)
        x[0, 5] = value
        q, _ = arithmetic.quantise_float32(x, 2)
        assert q.mantissa[0, 5] == mantissa


def test_zero_blocks_do_not_count_and_exponents_are_clamped():
    x = np.zeros((1, 96), np.float32)
    x[0, 0] = 1.0
    x[0, 32] = 2.0**-20
    q, _ = arithmetic.quantise_float32(x, 1)
    assert q.shift.tolist() == [[10, 0, 0]]
    assert q.mantissa[0, 0] == 64 and q.mantissa[0, 32] == 0
    assert arithmetic.quantise_float32(np.zeros((1, 32), np.float32), 2)[0].mantissa.sum() == 0


def test_nonfinite_tokens_are_named_and_subnormals_are_zero():
    x = np.ones((3, 32), np.float32)
    x[1, 3], x[2, 0], x[0, 0] = np.nan, -np.inf, 1e-40
    q, nonfinite = arithmetic.quantise_float32(x, 2)
    assert nonfinite.tolist() == [False, True, True]
    assert q.mantissa[0, 0] == 0 and q.mantissa[1, 3] == 0


def internal(value):
    m, e = np.frexp(value)
    return arithmetic.InternalFloat(np.array([int(m * 2**17)]), np.array([int(e) - 17]))


@given(
    st.integers(1 << 16, (1 << 17) - 1),
    st.integers(1 << 16, (1 << 17) - 1),
    st.integers(-64, 30),
    st.booleans(),
)
def test_weighted_output_is_rounded_once(a, b, exponent, negative):
    sign = -1 if negative else 1
    term, overflow, underflow = arithmetic.weighted_output(
        arithmetic.InternalFloat(np.array([sign * a]), np.array([exponent])),
        arithmetic.InternalFloat(np.array([b]), np.array([-16])),
        -28,
    )
    exact = Fraction(sign * a * b) * Fraction(2) ** (exponent - 16 + 28)
    if abs(exact) < 1 << 42:
        assert term[0] == half_even(exact) and not overflow[0]
    if abs(exact) >= 1 << 43:
        assert term[0] == 0 and overflow[0]
    assert underflow[0] == (term[0] == 0 and not overflow[0])


def test_only_what_is_not_zero_can_underflow():
    weights = arithmetic.float32_to_internal(
        np.array([1, 0, -0.0, 1e-45, -1.1754942e-38, -(2.0**-126), np.nan, np.inf], np.float32))
    for mantissa, exponent in [(0, 0), (1 << 16, 1000)]:
        output = arithmetic.InternalFloat(np.array([mantissa]), np.array([exponent]))
        term, overflow, underflow = arithmetic.weighted_output(output, weights, -100)
        assert not term.any()
        assert overflow.tolist() == ([1, 0, 0, 0, 0, 1, 0, 0] if mantissa else [0] * 8)
        assert underflow.tolist() == ([0, 0, 0, 1, 1, 0, 0, 0] if mantissa else [0] * 8)


@given(st.integers(-(1 << 47), (1 << 47) - 1), st.integers(-100, 60))
def test_grid_to_float32_is_nearest(total, exponent):
    got = arithmetic.grid_to_float32(np.array([total]), exponent)[0]
    shift = max(0, abs(total).bit_length() - 24)
    expected = half_even(Fraction(total, 1 << shift)) * Fraction(2) ** (shift + exponent)
    assert Fraction(float(got)) == expected


@pytest.mark.parametrize("value", [1.0, -0.3, 65504.0])
def test_weights_round_to_internal_floats(value):
    f = arithmetic.float32_to_internal(np.array([value], np.float32))
    assert abs(f.to_float64()[0] / np.float32(value) - 1) <= 2.0**-17
