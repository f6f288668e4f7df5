"""N:M patterns: found, made, refused, stored."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel.errors import FormatError
from moeaccel.formats import ALL_FORMATS, check_matrix, prune, quantise
from moeaccel.formats.patterns import expanded, places
from moeaccel.image import (
    Expert,
    Section,
    build_image,
    pack_section,
    unpack_image,
    unpack_section,
)

SPARSE = [name for name, fmt in ALL_FORMATS.items() if fmt.parts > 1]


@given(st.sampled_from(SPARSE), st.sampled_from([2, 4]), st.integers(1, 3), st.integers(1, 9),
       st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_sections_hold_pruned_matrices(name, row_multipliers, blocks, steps, seed):
    fmt, rng = ALL_FORMATS[name], np.random.default_rng(seed)
    weights = rng.standard_normal((32 * blocks, 32 * steps)).astype(np.float32)
    matrix = quantise(prune(weights, fmt, "magnitude", together=2), fmt)
    check_matrix(matrix)
    section = Section(fmt, *weights.shape, row_multipliers)
    words = pack_section(matrix, row_multipliers)
    assert words.size == section.words * section.word_bytes
    if section.channel_rows % section.tile_rows == 0:
        found = unpack_section([words], section)
        for part in ("integers", "significand", "shift", "row_exponent"):
            assert np.array_equal(getattr(found, part), getattr(matrix, part))


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_images_of_pruned_experts(name, channels):
    """Rows that share a multiplier on some channel share a pattern."""
    rng = np.random.default_rng(0)
    expert = Expert.quantise(
        rng.standard_normal((2 * 96, 64), np.float32), rng.standard_normal((64, 96), np.float32),
        name, prune="magnitude", channels=channels)
    parts = [build_image(expert.gate_up, expert.down, 2, channel=c, channels=channels)
             for c in range(channels)]
    found = unpack_image(*parts)
    assert np.array_equal(found.gate_up.integers, expert.gate_up.integers)
    assert np.array_equal(found.down.integers, expert.down.integers)


def test_magnitude_of_both_rows_decides():
    weights = np.array([[1, 2, 3, 0.5], [4, 0, 0, 0.1]] * 2, np.float32)
    found = prune(weights, ALL_FORMATS["int4_g32+2:4"], "magnitude", together=2)
    assert found[:2].tolist() == [[1, 0, 3, 0], [4, 0, 0, 0]]
    found = prune(weights, ALL_FORMATS["int4_g32+2:4"], "magnitude", channels=2)
    assert found[[0, 2]].tolist() == [[0, 2, 3, 0]] * 2
    assert found[1].tolist() == np.array([4, 0, 0, 0.1], np.float32).tolist()
    found = prune(weights, ALL_FORMATS["mxint8+1:4"], "magnitude")
    assert found[:2].tolist() == [[0, 0, 3, 0], [4, 0, 0, 0]]
    assert prune(weights, ALL_FORMATS["mxint8"], "magnitude") is weights


def test_what_has_the_pattern_is_taken_as_it_is():
    rng = np.random.default_rng(0)
    for name in SPARSE:
        dense = ALL_FORMATS[name.split("+")[0]]
        weights = prune(rng.standard_normal((8, 96)).astype(np.float32), ALL_FORMATS[name],
                        "magnitude", together=2)
        found, expected = quantise(weights, name), quantise(weights, dense)
        assert np.array_equal(found.dequantise(), expected.dequantise())


def test_what_has_no_pattern_is_refused():
    weights = np.zeros((4, 64), np.float32)
    weights[2, 40:43] = 1
    with pytest.raises(FormatError, match=r"weights of mxint8\+2:4 must have at most 2 of each 4 "
                       "columns that are not 0, but row 2 has more from column 40 on"):
        quantise(weights, "mxint8+2:4")
    weights[2, 40] = 0
    weights[3, 43] = 1
    assert quantise(weights, "mxint8+2:4") is not None
    matrix = quantise(weights, "int4_g32+2:4")  # each row by itself
    with pytest.raises(FormatError, match=r"rows 2 and 3 together, .* more from column 40 on"):
        pack_section(matrix, 2)
    with pytest.raises(FormatError, match="prune must be 'magnitude', not 'random'"):
        prune(weights, matrix.format, "random")


def test_places_are_different_even_where_all_is_zero():
    fmt = ALL_FORMATS["int8_g32+2:4"]
    integers = np.zeros((2, 8), np.int8)
    integers[1, 7] = 1
    assert places(integers, fmt).tolist() == [[[0, 1], [0, 1]], [[0, 1], [0, 3]]]
    # Nobody stores one place twice; a damaged image may: both count.
    twice = expanded(np.array([[[100, 100]]], np.int8), np.array([[[2, 2]]], np.uint8))
    assert twice.tolist() == [[0, 0, 200, 0]]
