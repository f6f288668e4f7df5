import zlib

import numpy as np
import pytest

from moeaccel import tables
from moeaccel.activations import ACTIVATIONS, Factor
from moeaccel.arithmetic import InternalFloat, float32_to_internal, normalise

TABULATED = [a for a in ACTIVATIONS.values() if a.factor is Factor.TABLE]
SILU = tables.activation_table(ACTIVATIONS["silu"])


def test_gate_of_silu_keeps_its_stated_error_at_every_argument():
    position = np.arange(-(1 << 22), 1 << 22)
    g = normalise(position, -18)
    got = tables.gate(g, SILU).to_float64()
    assert np.abs(got * (1 + np.exp(-g.to_float64())) - 1).max() <= tables.MAX_RELATIVE_ERROR


@pytest.mark.parametrize("act", TABULATED, ids=lambda a: a.name)
def test_factors_are_within_the_stated_errors(act):
    """Relative 2**-14 where f is at least 2**-4, else absolute 2**-17."""
    position = np.arange(-(1 << 22), 1 << 22, 5)
    g = normalise(position, -18)
    exact = act.f(g.to_float64())
    error = np.abs(tables.factor(g, act).to_float64() - exact)
    large = exact >= 2.0**-4
    assert (error[large] / exact[large]).max() <= 2.0**-14
    assert error[~large].max() <= 2.0**-17


def test_gate_beyond_the_table():
    huge = InternalFloat(np.array([1 << 16, -(1 << 16), 1 << 16]), np.array([-12, -11, 1000]))
    f = tables.gate(huge, SILU)
    assert f.to_float64().tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("act", TABULATED, ids=lambda a: a.name)
def test_entries_fit_the_rom(act):
    table = tables.activation_table(act)
    there = table.value != 0
    first = there.argmax()
    assert there[first:].all()
    assert not first or act.f(np.array([(first - 1024) / 64])) < 2.0**-24  # 0 below
    assert not table.slope[~there].any()
    assert table.value[there].min() >= 1 << 16 and table.value.max() < 1 << 17
    assert table.slope.min() >= 0 and table.slope.max() < 1 << tables.SLOPE_BITS
    assert table.exponent.min() >= 0 and table.exponent.max() < 1 << tables.EXPONENT_BITS


def test_a_limit_clamps_gate_from_above_and_up_from_both_sides():
    rng = np.random.default_rng(1)
    g, u = (normalise(rng.integers(-(1 << 20), 1 << 20, 4000), -16) for _ in range(2))
    limit = float32_to_internal(np.float32(7))
    relu = ACTIVATIONS["relu"]
    significand, exponent = tables.gated(g, u, relu, limit)
    exact = np.clip(g.to_float64(), 0, 7) * np.clip(u.to_float64(), -7, 7)
    assert np.abs(np.ldexp(significand.astype(float), exponent.astype(int)) - exact).max() <= (
        49 * 2.0**-16)
    significand, exponent = tables.ungated(g, ACTIVATIONS["relu2"], limit)
    exact = np.clip(g.to_float64(), 0, 7)**2
    assert np.abs(np.ldexp(significand.astype(float), exponent.astype(int)) - exact).max() <= (
        49 * 2.0**-16)


def test_an_offset_is_added_to_up_behind_its_limit():
    rng = np.random.default_rng(2)
    g, u = (normalise(rng.integers(-(1 << 20), 1 << 20, 4000), -16) for _ in range(2))
    significand, exponent = tables.gated(
        g, u, ACTIVATIONS["gpt_oss"], float32_to_internal(np.float32(7)))
    gate, up = np.minimum(g.to_float64(), 7), np.clip(u.to_float64(), -7, 7)
    exact = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    assert np.abs(np.ldexp(significand.astype(float), exponent.astype(int)) - exact).max() <= (
        56 * 2.0**-14)


def test_table_is_the_same_on_every_machine():
    words = np.array(SILU.packed(), "<u8")
    assert zlib.crc32(words.tobytes()) == TABLE_CRC


TABLE_CRC = 2584637369


def test_an_activation_without_a_table_is_exact():
    g = InternalFloat(np.array([-65536, 0, 65536, 70000]), np.array([-16, 0, -600, 500]))
    u = InternalFloat(np.full(4, 1 << 16), np.full(4, -16))  # 1
    relu = ACTIVATIONS["relu"]
    assert tables.factor(g, relu).to_float64().tolist() == [0, 0, 1, 1]
    significand, exponent = tables.gated(g, u, relu)
    assert np.ldexp(significand.astype(float), exponent.astype(int)).tolist() == [
        0, 0, 2.0**-584, 70000 * 2.0**500]
