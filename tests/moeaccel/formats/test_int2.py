"""Two bits a weight: what is stored, and how floats become it."""

import numpy as np
import pytest

from moeaccel.formats import ALL_FORMATS, check_matrix, quantise
from moeaccel.image import Section, pack_section, unpack_section

INT2, TERNARY = ALL_FORMATS["int2_g32"], ALL_FORMATS["ternary_g256"]


def test_bits_a_weight():
    assert (INT2.bits_per_weight(), TERNARY.bits_per_weight()) == (2.5, 2.0625)


@pytest.mark.parametrize(("fmt", "integers"), [(INT2, [-3, -1, 1, 3]), (TERNARY, [-1, 0, 1])])
def test_every_integer_is_nearest_to_itself(fmt, integers):
    assert fmt.known == integers
    assert fmt.nearest(np.array(integers, np.float64)).tolist() == integers
    assert fmt.nearest(np.array([-9.0, 9.0])).tolist() == [integers[0], integers[-1]]
    assert fmt.decode(fmt.encode(np.array(integers, np.int8))).tolist() == integers


@pytest.mark.parametrize(("fmt", "most"), [(INT2, 0.335), (TERNARY, 0.44)])
def test_errors(fmt, most):
    """Of normally distributed weights; with calibration the error of what is computed is less."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64, 512)).astype(np.float32)
    found = quantise(weights, fmt)
    check_matrix(found)
    assert 0.95 * most < found.relative_error(weights) < most
    inputs = rng.standard_normal((256, 64)) @ rng.standard_normal((64, 512))
    moments = inputs.T @ inputs

    def error(matrix):
        off = matrix.dequantise() - weights
        return float(np.einsum("ij,jk,ik->", off, moments, off))

    gptq = quantise(weights, fmt, quantiser="gptq", moments=moments)
    check_matrix(gptq)
    assert error(gptq) < 0.6 * error(found)


def test_zeros_stay_zeros():
    """int2 has none: a scale says so, or what they are multiplied with."""
    weights = np.zeros((4, 96), np.float32)
    weights[:2, 32:64] = 1
    for fmt in (INT2, TERNARY):
        found = quantise(weights, fmt)
        assert np.array_equal(found.dequantise()[:, :32], weights[:, :32])
        assert not found.dequantise()[2:].any()
        filled = found.filled(8, 128)
        check_matrix(filled)
        assert not filled.dequantise()[4:].any()


@pytest.mark.parametrize("k", [32, 64, 96, 288, 544])
@pytest.mark.parametrize("fmt", [INT2, TERNARY], ids=lambda fmt: fmt.name)
def test_a_word_has_two_steps(fmt, k):
    """Half of the weight words of int4, those of odd rows rounded up; images are whole."""
    rng = np.random.default_rng(k)
    matrix = quantise(rng.standard_normal((24, k)).astype(np.float32), fmt)
    section = Section(fmt, 24, k, 2)
    assert section.weight_words == (k // 32 + 1) // 2
    assert (section.kinds() == 2).sum() == section.tiles * section.weight_words
    assert len(section.kinds()) == section.words
    words = pack_section(matrix, 2)
    again = unpack_section([words], section)
    for part in matrix.parts:
        assert np.array_equal(getattr(again, part), getattr(matrix, part)), part
    first = words.reshape(-1, 64)[section.kinds() == 2][0]
    codes = fmt.encode(matrix.integers[:2, :64] if k > 32 else matrix.integers[:2])
    assert first[0] & 0x33 == codes[0, 0] | codes[1, 0] << 4
    assert first[0] >> 2 & 0x33 == (codes[0, 32] | codes[1, 32] << 4 if k > 32 else 0)
