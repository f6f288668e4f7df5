import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel import image
from moeaccel.errors import ImageError
from moeaccel.formats import FORMATS, quantise
from moeaccel.image import Expert, ExpertShape, Section


def expert(name="int4_g32", d_model=64, d_expert=96, seed=0):
    rng = np.random.default_rng(seed)
    return Expert.quantise(
        rng.standard_normal((2 * d_expert, d_model)), rng.standard_normal((d_model, d_expert)), name
    )


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


@pytest.mark.parametrize("name", FORMATS)
def test_large_images_waste_less_than_one_percent(name):
    for d_model, d_expert in ((2048, 1024), (2880, 2880), (7168, 2048)):
        shape = ExpertShape(FORMATS[name], d_model, d_expert, 2)
        assert shape.stored_bytes / shape.image_bytes > 0.99


def test_first_weight_word_holds_the_first_rows():
    e = expert("int4_g32")
    built = image.build_image(e.gate_up, e.down, 2)
    word = built[64 + 2 * 64 : 64 + 3 * 64].reshape(2, 32)  # behind a row word and a scale word
    assert ((word & 15) == (e.gate_up.integers[0::2][:2, :32].view(np.uint8) & 15)).all()
    assert ((word >> 4) == (e.gate_up.integers[1::2][:2, :32].view(np.uint8) & 15)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_built_images_pass_their_check(name):
    e = expert(name)
    built = image.build_image(e.gate_up, e.down, 2)
    shape = image.check_image(built)
    assert (shape.d_model, shape.d_expert, shape.format.name) == (64, 96, name)
    assert len(built) == shape.image_bytes <= shape.stride


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (0, "this is no expert image"),
        (4, "version must be 1"),
        (6, "format code must be"),
        (200, "it was damaged, load it again"),
    ],
)
def test_damage_is_named(where, message):
    e = expert()
    built = image.build_image(e.gate_up, e.down, 2).copy()
    built[where] ^= 0x55
    with pytest.raises(ImageError, match=message):
        image.check_image(built)


def test_truncation_is_named():
    e = expert()
    built = image.build_image(e.gate_up, e.down, 2)
    with pytest.raises(ImageError, match="truncated"):
        image.check_image(built[:-1])
    with pytest.raises(ImageError, match="at least 64 bytes, not 10"):
        image.check_image(built[:10])


def test_gate_and_up_rows_alternate():
    rows = np.arange(8.0).reshape(8, 1)
    assert image.interleave_gate_up(rows)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert quantise(np.ones((2, 32)), "mxint8").integers.shape == (2, 32)


@settings(deadline=None)
@given(
    st.sampled_from(list(FORMATS)),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([2, 4, 8, 16]),
    st.sampled_from([1, 2, 4, 32]),
    st.integers(0, 1 << 30),
)
def test_unpacking_gives_back_what_was_packed(
    name, steps, hidden, row_multipliers, channels, seed
):
    rng = np.random.default_rng(seed)
    spread = np.exp(4 * rng.standard_normal((64 * hidden, 1)))
    before = Expert.quantise(
        rng.standard_normal((64 * hidden, 32 * steps)) * spread,
        rng.standard_normal((32 * steps, 32 * hidden)) * (rng.random((32 * steps, 1)) > 0.3),
        name,
    )
    places = [{"channel": c, "channels": channels} for c in range(channels)]
    after = image.unpack_image(*(
        image.build_image(before.gate_up, before.down, row_multipliers, **place)
        for place in places))
    for a, b in ((before.gate_up, after.gate_up), (before.down, after.down)):
        for field in ("integers", "significand", "shift", "row_exponent"):
            old, new = getattr(a, field), getattr(b, field)
            assert old.dtype == new.dtype
            assert np.array_equal(old, new)
    linear = [image.build_linear_image(before.down, row_multipliers, **place) for place in places]
    shape = image.LinearShape(FORMATS[name], 32 * steps, 32 * hidden, row_multipliers, channels)
    assert {len(part) for part in linear} == {shape.image_bytes}
    assert shape.image_bytes <= shape.stride
    down = image.unpack_section(
        [part[shape.header_bytes :] for part in linear], shape.section, paired=False)
    assert np.array_equal(down.dequantise(), before.down.dequantise())


def test_damaged_images_are_not_unpacked():
    e = expert()
    built = image.build_image(e.gate_up, e.down, 2)
    with pytest.raises(ImageError, match="truncated"):
        image.unpack_image(built[:-1])
    shape = image.check_image(built)
    with pytest.raises(ImageError, match="section must be"):
        image.unpack_section([built[:64]], shape.down, paired=False)


def test_rows_are_dealt_one_by_one():
    e = expert()
    parts = [image.build_image(e.gate_up, e.down, 2, channel=c, channels=4) for c in range(4)]
    shape = image.check_image(parts[2], channel=2)
    split = shape.header_bytes + shape.gate_up.words * shape.gate_up.word_bytes
    rows = np.arange(shape.gate_up.rows).reshape(-1, 4, 2)[:, 2].reshape(-1)
    own = image.Section(shape.format, len(rows), shape.d_model, 2)
    part = image.unpack_section([parts[2][shape.header_bytes : split]], own, paired=True)
    assert np.array_equal(part.integers, e.gate_up.integers[rows])
    own = image.Section(shape.format, shape.d_model // 4, shape.d_expert, 2)
    part = image.unpack_section([parts[2][split:]], own, paired=False)
    assert np.array_equal(part.integers, e.down.integers[2::4])


def test_parts_of_several_images_do_not_make_one():
    e = expert()
    one, two = (image.build_image(e.gate_up, e.down, 2, channel=c, channels=2) for c in range(2))
    with pytest.raises(ImageError, match="part of channel 1, not of 0 of 2 channels"):
        image.unpack_image(one, one)
    with pytest.raises(ImageError, match="parts must be all those of one image, not 1"):
        image.unpack_image(one)
    with pytest.raises(ImageError, match="CRC-32"):
        image.unpack_image(one, np.r_[two[:-1], two[-1] ^ 1])
