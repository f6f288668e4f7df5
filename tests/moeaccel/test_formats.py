import numpy as np
import pytest
from hypothesis import given, strategies as st

from moeaccel import formats
from moeaccel.errors import FormatError
from moeaccel.formats import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_codes_round_trip(name):
    fmt = FORMATS[name]
    codes = np.arange(1 << fmt.weight_bits, dtype=np.uint8)
    integers = formats.decode_integers(fmt, codes)
    assert np.abs(integers.astype(int)).max() <= fmt.max_integer + (
        name == "mxint8"
    )  # -128 is decoded, never encoded
    again = formats.decode_integers(fmt, formats.encode_integers(fmt, integers))
    assert (again == integers).all()


@given(
    st.sampled_from(list(FORMATS)), st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(-30, 30)
)
def test_quantised_weights_are_close(name, blocks, seed, log_scale):
    fmt = FORMATS[name]
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((4, 32 * blocks)) * 2.0**log_scale).astype(np.float32)
    q = formats.quantise(weights, name)
    assert q.integers.shape == weights.shape and np.abs(q.integers).max() <= fmt.max_integer
    assert q.shift.min() >= 0 and q.shift.max() <= fmt.max_shift
    assert q.significand.min() >= 0 and q.significand.max() <= 2047
    assert (
        q.relative_error(weights)
        < {"mxint8": 0.012, "int4_g32": 0.13, "int4_g128": 0.16, "mxfp4": 0.17}[name]
    )


@pytest.mark.parametrize("name", FORMATS)
def test_exact_values_survive(name):
    q = formats.quantise(np.random.default_rng(0).standard_normal((8, 96)).astype(np.float32), name)
    if name in ("mxint8", "mxfp4"):  # power-of-two scales: quantising again changes nothing
        again = formats.quantise(q.dequantise().astype(np.float32), name)
        assert (again.dequantise() == q.dequantise()).all()


def test_mxfp4_rounds_to_the_nearest_code_ties_to_even():
    weights = np.zeros((1, 32), np.float32)
    weights[0, :9] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5.1]  # 6 fixes the scale at 1
    q = formats.quantise(weights, "mxfp4")
    assert q.dequantise()[0, :9].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -6]


def test_small_groups_are_coarsened_and_counted():
    weights = np.ones((1, 64), np.float32)
    weights[0, 32:] = 1e-6
    q = formats.quantise(weights, "int4_g32")
    assert q.coarsened == 1
    assert formats.quantise(np.ones((1, 64), np.float32), "int4_g32").coarsened == 0


def test_zero_rows_and_groups():
    weights = np.zeros((2, 64), np.float32)
    weights[1, :32] = 1
    for name in FORMATS:
        q = formats.quantise(weights, name)
        assert (q.dequantise()[0] == 0).all() and (q.dequantise()[1, 32:] == 0).all()


def test_short_last_group():
    q = formats.quantise(np.ones((2, 160), np.float32), "int4_g128")
    assert q.significand.shape == (2, 2) and q.dequantise().shape == (2, 160)


@pytest.mark.parametrize(
    ("weights", "name", "message"),
    [
        (np.ones((2, 0)), "mxint8", "K must be at least 1, not 0"),
        (
            np.ones((2, 64)),
            "int3",
            "weight_format must be one of mxint8, int4_g32, int4_g128, mxfp4, not 'int3'",
        ),
        (np.full((2, 64), np.nan), "mxint8", "weights must be finite"),
        (np.ones(64), "mxint8", "weights must be a matrix"),
    ],
)
def test_bad_input_is_named(weights, name, message):
    with pytest.raises(FormatError, match=message):
        formats.quantise(weights, name)
