import zlib

import numpy as np

from moeaccel import tables
from moeaccel.activations import ACTIVATIONS
from moeaccel.arithmetic import InternalFloat, normalise

SILU = tables.activation_table(ACTIVATIONS["silu"])


def test_gate_keeps_its_stated_error_at_every_argument():
    position = np.arange(-(1 << 22), 1 << 22)
    g = normalise(position, -18)
    got = tables.gate(g, SILU).to_float64()
    assert np.abs(got * (1 + np.exp(-g.to_float64())) - 1).max() <= tables.MAX_RELATIVE_ERROR


def test_gate_beyond_the_table():
    huge = InternalFloat(np.array([1 << 16, -(1 << 16), 1 << 16]), np.array([-12, -11, 1000]))
    f = tables.gate(huge, SILU)
    assert f.to_float64().tolist() == [1.0, 0.0, 1.0]


def test_entries_fit_the_rom():
    table = SILU
    assert table.value.min() >= 1 << 16 and table.value.max() < 1 << 17
    assert table.slope.min() >= 0 and table.slope.max() < 1 << tables.SLOPE_BITS
    assert table.exponent.min() >= 0 and table.exponent.max() < 1 << tables.EXPONENT_BITS


def test_table_is_the_same_on_every_machine():
    words = np.array(SILU.packed(), "<u8")
    assert zlib.crc32(words.tobytes()) == TABLE_CRC


TABLE_CRC = 3372175117


def test_an_activation_without_a_table_is_exact():
    g = InternalFloat(np.array([-65536, 0, 65536, 70000]), np.array([-16, 0, -600, 500]))
    u = InternalFloat(np.full(4, 1 << 16), np.full(4, -16))  # 1
    relu = ACTIVATIONS["relu"]
    assert tables.factor(g, relu).to_float64().tolist() == [0, 0, 1, 1]
    significand, exponent = tables.gated(g, u, relu)
    assert np.ldexp(significand.astype(float), exponent.astype(int)).tolist() == [
        0, 0, 2.0**-584, 70000 * 2.0**500]
