"""How many words a section takes, and which rows a channel has."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from moeaccel import image
from moeaccel.errors import ImageError
from moeaccel.formats import FORMATS, quantise
from moeaccel.image import Section


@given(
    st.sampled_from(list(FORMATS)),
    st.integers(1, 20),
    st.integers(1, 95),
    st.sampled_from([2, 4, 8, 16]),
)
def test_section_counts_agree_with_its_word_sequence(name, row_blocks, steps, row_multipliers):
    section = Section(FORMATS[name], 32 * row_blocks, 32 * steps, row_multipliers)
    kinds = section.kinds()
    assert len(kinds) == section.words
    assert (kinds == 0).sum() == section.row_words and (kinds == 1).sum() == section.scale_words
    assert kinds[:3].tolist() == [0, 1, 2]
    assert section.stored_bytes <= section.words * section.word_bytes


def test_a_section_of_another_size_is_not_unpacked():
    section = Section(FORMATS["int4_g32"], 64, 96, 2)
    words = image.pack_section(quantise(np.ones((64, 96)), "int4_g32"), 2)
    assert len(words) == section.words * section.word_bytes
    with pytest.raises(ImageError, match=f"section must be {len(words)} bytes, not 64"):
        image.unpack_section([words[:64]], section)
