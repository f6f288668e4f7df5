"""INT4 with zero points: what is stored, and how floats become it."""

import numpy as np
import pytest

from moeaccel.errors import FormatError
from moeaccel.formats import ALL_FORMATS, QuantisedMatrix, check_matrix, quantise

FMT = ALL_FORMATS["int4_g32_zp"]


def matrix(integers):
    n, k = integers.shape
    return QuantisedMatrix(FMT, integers.astype(np.int8), np.ones((n, k // 32), np.int16),
                           np.zeros((n, k // 32), np.int8), np.zeros(n, np.int16), 0)


def test_all_codes_with_all_zero_points_are_stored_and_restored():
    zero = np.arange(16)
    integers = np.concatenate([np.arange(16)[None] - zero[:, None]] * 2, axis=1)
    found = matrix(integers)
    check_matrix(found)
    codes, entries = FMT.stored(found)
    assert codes.max() <= 15 and ((entries >> 16) == zero[:, None]).all()
    again = FMT.restored(codes, entries, found.row_exponent)
    assert np.array_equal(again.integers, integers)
    assert np.array_equal(again.significand, found.significand)


def test_integers_of_a_group_must_share_a_zero_point():
    integers = np.zeros((2, 64), np.int8)
    integers[1, 40:42] = -8, 8
    with pytest.raises(FormatError, match=r"must lie within 15 .* those of row 1, group 1 do not"):
        check_matrix(matrix(integers))
    integers[1, 41] = 7
    check_matrix(matrix(integers))


@pytest.mark.parametrize("quantiser", ["search", "amax"])
@pytest.mark.parametrize("offset", [0, 2, -10])
def test_ranges_beside_zero_cost_little(quantiser, offset):
    """Where weights are not symmetric a zero point saves what int4 wastes."""
    rng = np.random.default_rng(0)
    weights = (np.abs(rng.standard_normal((16, 256))) + offset).astype(np.float32)
    found = quantise(weights, FMT, quantiser=quantiser)
    check_matrix(found)
    error = found.relative_error(weights)
    assert error < quantise(weights, "int4_g32", quantiser=quantiser).relative_error(weights)
    assert error < 0.07


def test_moments_say_what_counts():
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((16, 128)).astype(np.float32)
    moments = np.exp(3 * rng.standard_normal(128))

    def error(found):
        return float(((found.dequantise() - weights) ** 2 * moments).sum())

    assert error(quantise(weights, FMT, moments=moments)) < error(quantise(weights, FMT))
    with pytest.raises(FormatError, match=r"moments of quantiser 'gptq' must be .* not left out"):
        quantise(weights, FMT, quantiser="gptq")
    with pytest.raises(FormatError, match="moments must be finite, of the shape"):
        quantise(weights, FMT, moments=np.ones(3))
    with pytest.raises(FormatError, match="weights must be finite"):
        quantise(np.full((1, 32), np.inf), FMT)
