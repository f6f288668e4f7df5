import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from moeaccel import formats
from moeaccel.errors import FormatError
from moeaccel.formats import ALL_FORMATS, FORMATS, int4


@pytest.mark.parametrize("name", FORMATS)
def test_codes_round_trip(name):
    fmt = FORMATS[name]
    codes = np.arange(1 << fmt.weight_bits, dtype=np.uint8)
    integers = fmt.decode(codes)
    assert np.array_equal(integers, fmt.integers)
    assert np.abs(fmt.integers).max() <= (15 if fmt.packed else 128)  # every code, legal or not
    again = fmt.decode(fmt.encode(integers))
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
        < {"mxint8": 0.02, "int4_g32": 0.13, "int4_g64": 0.15, "int4_g128": 0.16, "mxfp4": 0.17}[
            name]
    )


@pytest.mark.parametrize("name", FORMATS)
def test_exact_values_survive(name):
    q = formats.quantise(np.random.default_rng(0).standard_normal((8, 96)).astype(np.float32), name)
    if not FORMATS[name].real_scale:  # power-of-two scales: quantising again changes nothing
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
            re.escape(f"weight_format must be one of {', '.join(ALL_FORMATS)}, not 'int3'"),
        ),
        (np.full((2, 64), np.nan), "mxint8", "weights must be finite"),
        (np.ones(64), "mxint8", "weights must be a matrix"),
    ],
)
def test_bad_input_is_named(weights, name, message):
    with pytest.raises(FormatError, match=message):
        formats.quantise(weights, name)


@pytest.mark.parametrize(("change", "expected"), [
    ({"code": 256}, "code of weight format 'int4_g32' must be from 0 to 255, not 256"),
    ({"weight_bits": 3}, "weight_bits of weight format 'int4_g32' must be 2, 4 or 8, not 3"),
    ({"weight_bits": 2, "nonzeros": 2}, "nonzeros .* must be 4 for 2-bit weights, and with minima"),
    ({"weight_bits": 2, "zero_point": True}, "zero_point .* must be false but for 4-bit"),
    ({"minimum": True, "nonzeros": 1}, "nonzeros .* must be 4 for 2-bit weights, and with minima"),
    ({"minimum": True, "group": 16}, "group .* must be a power of two from 32 on, not 16"),
    ({"minimum": True, "weight_bits": 8}, "minimum .* must be false but for 4-bit"),
    ({"minimum": True, "zero_point": True}, "minimum .* and without zero points"),
    ({"minimum": True, "low": 0, "max_shift": 6}, "max_shift .* must be such that a scaled block"),
    ({"group": 8}, "group .* must be a power of two from 16 on, not 8"),
    ({"group": 16, "nonzeros": 2}, "group .* must be a power of two from 32 on, not 16"),
    ({"group": 16, "weight_bits": 8}, "group .* must be a power of two from 32 on, not 16"),
    ({"zero_point": True, "real_scale": False}, "zero_point .* must be false but for 4-bit"),
    ({"nonzeros": 3}, "nonzeros .* must be 1, 2 or 4, not 3"),
    ({"group": 96}, "group .* must be a power of two from 16 on, not 96"),
    ({"high": 8}, "high .* must be an integer of the table"),
    ({"table": (0, 16) * 8, "low": 0, "high": 16}, "table .* must be of integers up to 15"),
    ({"table": (0, 1)}, "table .* must be one integer for each code"),
    ({"max_shift": 7}, "max_shift .* must be such that a scaled block has 32 bits at most, not 7"),
])
def test_what_the_array_cannot_hold_is_no_format(change, expected):
    with pytest.raises(FormatError, match=expected):
        dataclasses.replace(FORMATS["int4_g32"], **change)


def test_a_code_or_name_cannot_be_taken_twice(monkeypatch):
    for change, what in (({"name": "again"}, r"code .*\[1\] twice"),
                         ({"code": 77}, r"name .*\['int4_g32'\] twice")):
        again = dataclasses.replace(FORMATS["int4_g32"], **change)
        monkeypatch.setattr(int4, "FORMATS", (FORMATS["int4_g32"], again))
        with pytest.raises(FormatError, match=what):
            formats._registry("FORMATS")
