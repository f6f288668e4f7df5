"""INT4 with minima: what is stored, and how floats become it."""

from dataclasses import replace

import numpy as np
import pytest

from moeaccel.errors import FormatError
from moeaccel.formats import ALL_FORMATS, check_matrix, quantise
from moeaccel.formats.base import minima, minimum_entries
from moeaccel.golden import gemm
from moeaccel.image import Section, pack_section, unpack_section

FMT = ALL_FORMATS["int4_g32_min"]


def test_minima_are_stored_and_restored():
    """All sizes that a significand has, all shifts and signs; larger shifts count as the largest,
    as the device reads what was damaged."""
    size = np.arange(2048)[:, None] << np.arange(9)
    values = np.stack([size, -size]).astype(np.int32)
    assert np.array_equal(minima(minimum_entries(values)), values)
    assert minima(np.array([3 | 15 << 11, 3 | 8 << 11])).tolist() == [3 << 8, 3 << 8]


@pytest.mark.parametrize("quantiser", ["search", "amax"])
@pytest.mark.parametrize("offset", [0.0, 2.0, -10.0])
def test_ranges_beside_zero_cost_nothing(quantiser, offset):
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((16, 288)) + offset).astype(np.float32)
    found = quantise(weights, FMT, quantiser=quantiser)
    check_matrix(found)
    error = np.linalg.norm(found.dequantise() - weights) / np.linalg.norm(weights - offset)
    assert error < 0.08
    assert error < quantise(weights, "int4_g32_zp", quantiser=quantiser).relative_error(
        weights) * np.linalg.norm(weights) / np.linalg.norm(weights - offset)


def test_images_are_whole():
    rng = np.random.default_rng(1)
    matrix = quantise(rng.standard_normal((24, 160)).astype(np.float32) - 1, FMT)
    matrix = matrix.with_bias(rng.standard_normal(24)).filled(32, 192)
    section = Section(FMT, 32, 192, 2, 2, biased=True)
    from moeaccel.image.sections import deal

    parts = [pack_section(deal(matrix, 2, c, 2, 1), 2) for c in range(2)]
    again = unpack_section(parts, section)
    for part in matrix.parts:
        assert np.array_equal(getattr(again, part), getattr(matrix, part)), part


def test_golden_adds_the_minimum_to_every_weight():
    """Integers of x are exact in 16 bits, and so is the result in 17."""
    rng = np.random.default_rng(2)
    x = rng.integers(-8, 8, (3, 64)).astype(np.float32)
    weights = (rng.integers(0, 16, (8, 64)) - 7).astype(np.float32)
    weights[:, [0, 1, 32, 33]] = [-7, 8, -7, 8]  # its whole range is there
    matrix = quantise(weights, FMT, quantiser="amax")
    assert np.array_equal(matrix.dequantise(), weights)
    assert np.array_equal(gemm(x, matrix, grid_exponent=-8).y, x @ weights.T)


def test_a_constant_group_and_no_weights_at_all():
    weights = np.zeros((2, 64), np.float32)
    weights[0, :32] = 3
    found = quantise(weights, FMT)
    check_matrix(found)
    assert np.array_equal(found.dequantise(), weights)


@pytest.mark.parametrize(("change", "message"), [
    ({"minimum": None}, r"minimum must be an array, int32 of the shape \(2, 2\), not NoneType"),
    ({"minimum": np.zeros((2, 2), np.int64)}, "minimum must be an array, int32"),
    ({"minimum": np.array([[0, 0], [0, 2049]], np.int32)},
     "minimum of int4_g32_min must be an integer of 11 bits .* but row 1, group 1 holds 2049"),
    ({"minimum": np.array([[1 << 20, 0], [0, 0]], np.int32)}, "but row 0, group 0 holds 1048576"),
])
def test_what_cannot_be_stored_is_named(change, message):
    matrix = quantise(np.ones((2, 64), np.float32), FMT)
    with pytest.raises(FormatError, match=message):
        check_matrix(replace(matrix, **change))
    plain = quantise(np.ones((2, 64), np.float32), "int4_g32")
    with pytest.raises(FormatError, match="minimum must be None, as int4_g32 has no minima"):
        check_matrix(replace(plain, minimum=matrix.minimum))


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
