"""Images hold experts: what is built passes its check and comes back, and damage is named."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel import image
from moeaccel.errors import FormatError, ImageError
from moeaccel.formats import FORMATS, quantise
from moeaccel.image import Expert, ExpertShape

names = st.sampled_from(list(FORMATS))


def expert(name="int4_g32", d_model=64, d_expert=96, seed=0, **options):
    rng = np.random.default_rng(seed)
    return Expert.quantise(
        rng.standard_normal((2 * d_expert, d_model)), rng.standard_normal((d_model, d_expert)),
        name, **options)


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


@pytest.mark.parametrize("down", FORMATS)
@pytest.mark.parametrize("name", FORMATS)
def test_built_images_pass_their_check(name, down):
    e = expert(name, down_format=down)
    built = image.build_image(e.gate_up, e.down, 2)
    shape = image.check_image(built)
    assert shape == e.shape(2) == ExpertShape(FORMATS[name], 64, 96, 2, down_format=FORMATS[down])
    assert [section.format.name for section in shape.sections] == [name, down]
    assert len(built) == shape.image_bytes <= shape.memory_bytes
    assert shape.memory_bytes % image.ALIGNMENT == 0


def test_a_shape_is_that_of_its_formats():
    one, other = FORMATS["int4_g32"], FORMATS["mxint8"]
    plain, mixed = ExpertShape(one, 64, 96, 2), ExpertShape(one, 64, 96, 2, down_format=other)
    assert plain == ExpertShape(one, 64, 96, 2, down_format=one) != mixed
    down = mixed.image_bytes - plain.image_bytes, mixed.stored_bytes - plain.stored_bytes
    assert down == (64 * (mixed.down.words - plain.down.words), 64 * 3 * (32 + 1 - 16 - 2))
    with pytest.raises(FormatError, match=r"activation must be one of silu, .*, not 'mish'"):
        ExpertShape(one, 64, 96, 2, activation="mish")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (0, "this is no expert image"),
        (4, "version must be 3"),
        (6, "must have the 2 sections of an expert, not"),
        (7, "it is truncated"),
        (8, "part of channel 0, not of 85 of 1 channels"),
        (10, "format code of gate and up must be"),
        (11, "format code of down must be"),
        (12, "image sinks must be .* not .85, 1.; its header was damaged"),
        (13, "image sinks must be .* not .0, 84.; its header was damaged"),
        (14, "must say of biases .* not .85, 0.; its header was damaged"),
        (15, "must say of biases .* not .0, 85.; its header was damaged"),
        (16, "dimensions must be positive multiples of 32, not 213 and 96"),
        (21, "must be 4808640 bytes for its header, not 21440"),
        (26, "it is truncated"),
        (32, "it was damaged, load it again"),
        (200, "it was damaged, load it again"),
    ],
)
def test_damage_is_named(where, message):
    e = expert(d_model=100)
    built = image.build_image(e.gate_up, e.down, 2).copy()
    built[where] ^= 0x55
    with pytest.raises(ImageError, match=message):
        image.check_image(built)


def test_a_format_of_the_same_size_is_seen():
    """Both codes are known, and all words are as many: the CRC-32 tells."""
    e = expert("int4_g32", 32, 32)
    built = image.build_image(e.gate_up, e.down, 2).copy()
    built[10] = FORMATS["int4_g64"].code
    with pytest.raises(ImageError, match="CRC-32 must be"):
        image.check_image(built)


def test_an_array_without_multipliers_is_none():
    e = expert()
    built = image.build_image(e.gate_up, e.down, 2).copy()
    built[7] = 0
    with pytest.raises(ImageError, match="1 row multiplier or more, not 0"):
        image.check_image(built)


def test_truncation_is_named():
    e = expert()
    built = image.build_image(e.gate_up, e.down, 2)
    with pytest.raises(ImageError, match="truncated"):
        image.check_image(built[:-1])
    with pytest.raises(ImageError, match="at least 64 bytes, not 10"):
        image.check_image(built[:10])


def test_a_linear_image_is_no_expert():
    matrix = quantise(np.ones((64, 96)), "mxint8")
    with pytest.raises(ImageError, match="2 sections of an expert, not 1; a linear layer has 1"):
        image.check_image(image.build_linear_image(matrix, 2))


def test_gate_and_up_rows_alternate():
    rows = np.arange(8.0).reshape(8, 1)
    assert image.interleave_gate_up(rows)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert quantise(np.ones((2, 32)), "mxint8").integers.shape == (2, 32)


@settings(deadline=None)
@given(
    names, names,
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([2, 4, 8, 16]),
    st.sampled_from([1, 2, 4, 32]),
    st.integers(0, 1 << 30),
    st.booleans(), st.booleans(),
)
def test_unpacking_gives_back_what_was_packed(
    name, down_name, steps, hidden, row_multipliers, channels, seed, biased, down_biased
):
    rng = np.random.default_rng(seed)
    spread = np.exp(4 * rng.standard_normal((64 * hidden, 1)))
    before = Expert.quantise(
        rng.standard_normal((64 * hidden, 32 * steps)) * spread,
        rng.standard_normal((32 * steps, 32 * hidden)) * (rng.random((32 * steps, 1)) > 0.3),
        name, down_format=down_name,
        gate_up_bias=rng.standard_normal(64 * hidden) if biased else None,
        down_bias=rng.standard_normal(32 * steps) if down_biased else None)
    places = [{"channel": c, "channels": channels} for c in range(channels)]
    after = image.unpack_image(*(
        image.build_image(before.gate_up, before.down, row_multipliers, **place)
        for place in places))
    for a, b in ((before.gate_up, after.gate_up), (before.down, after.down)):
        assert a.format == b.format
        for field in ("integers", "significand", "shift", "row_exponent"):
            old, new = getattr(a, field), getattr(b, field)
            assert old.dtype == new.dtype
            assert np.array_equal(old, new)
        assert (a.bias is None) == (b.bias is None)
        assert np.array_equal(a.bias_values, b.bias_values)
    linear = [image.build_linear_image(before.down, row_multipliers, **place) for place in places]
    shape = image.LinearShape(FORMATS[down_name], 32 * steps, 32 * hidden, row_multipliers,
                              channels, down_biased)
    assert {len(part) for part in linear} == {shape.image_bytes}
    assert shape.image_bytes <= shape.memory_bytes
    down = image.unpack_section(
        [part[shape.header_bytes :] for part in linear], shape.section)
    assert np.array_equal(down.dequantise(), before.down.dequantise())
    assert np.array_equal(down.bias_values, before.down.bias_values)


@pytest.mark.parametrize("name", ["int4_g32", "mxint8"])
def test_biases_lie_behind_the_row_exponents_of_their_tile(name):
    bias = np.random.default_rng(1).standard_normal(192)
    plain, e = expert(name, 64, 96), expert(name, 64, 96, gate_up_bias=bias)
    built = image.build_image(e.gate_up, e.down, 2)
    shape, rows = image.check_image(built), FORMATS[name].rows(2)
    assert shape.gate_up.tiles_per_row_word == plain.shape(2).gate_up.tiles_per_row_word // 2
    entry = built[64:][: 4 * rows].view("<i2")
    assert entry[:rows].tolist() == e.gate_up.row_exponent[:rows].tolist()
    assert entry[rows:].view(np.uint16).tolist() == e.gate_up.bias[:rows].tolist()
    gate, up = bias[0], bias[96]  # rows alternate
    assert e.gate_up.bias_values[:2] == pytest.approx([gate, up], rel=2**-8)
    row_words = shape.gate_up.row_words - plain.shape(2).gate_up.row_words
    assert shape.gate_up.words - plain.shape(2).gate_up.words == row_words > 0
    assert shape.down == plain.shape(2).down


def test_biases_are_bfloat16_numbers():
    matrix = quantise(np.ones((4, 32)), "mxint8")
    half = 2.0**-8  # of the last bit
    values = [1 + half, 1 + 3 * half, -(1 + half * 1.01), 1e-40]
    assert matrix.with_bias(values).bias_values.tolist() == [1, 1 + 4 * half, -1 - 2 * half, 0]
    assert matrix.with_bias(values).with_bias(None).bias is None
    for wrong in (np.nan, -np.inf, 3.4e38):
        with pytest.raises(FormatError, match=f"bfloat16 has, .* number 3 is {str(wrong)[:2]}"):
            matrix.with_bias([0, 0, 0, wrong])
    with pytest.raises(FormatError, match=r"bias must have the shape \(4,\), .* not \(3,\)"):
        matrix.with_bias(np.zeros(3))


def test_damaged_images_are_not_unpacked():
    e = expert()
    with pytest.raises(ImageError, match="truncated"):
        image.unpack_image(image.build_image(e.gate_up, e.down, 2)[:-1])


def test_rows_are_dealt_one_by_one():
    e = expert(down_format="mxfp4")
    parts = [image.build_image(e.gate_up, e.down, 2, channel=c, channels=4) for c in range(4)]
    shape = image.check_image(parts[2], channel=2)
    split = shape.header_bytes + shape.gate_up.words * shape.gate_up.word_bytes
    rows = np.arange(shape.gate_up.rows).reshape(-1, 4, 2)[:, 2].reshape(-1)
    own = image.Section(shape.format, len(rows), shape.d_model, 2)
    part = image.unpack_section([parts[2][shape.header_bytes : split]], own, together=2)
    assert np.array_equal(part.integers, e.gate_up.integers[rows])
    own = image.Section(shape.down.format, shape.d_model // 4, shape.d_expert, 2)
    part = image.unpack_section([parts[2][split:]], own)
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
