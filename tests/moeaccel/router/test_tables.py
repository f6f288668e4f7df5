"""The tables' stated errors, at every argument that lies somewhere else within a segment."""

import numpy as np
import pytest

from moeaccel.router import tables

VALUES = np.append(np.arange(0, 1 << 23, 37), (1 << 23) - 1)


@pytest.mark.parametrize(("table", "f", "bits"), [
    (tables.EXP2, lambda v: 2.0**-v, 23),
    (tables.RECIPROCAL, lambda v: 1 / (1 + v), 24),
    (tables.LOG1P, lambda v: np.log1p(v) / v, 24),
])
def test_lines(table, f, bits):
    positions = VALUES << (bits - 23) | 1
    got = table(positions)
    assert np.abs(got / 2.0**24 - f(positions / 2.0**bits)).max() < 2.0**-20.8
    assert (np.diff(got) <= 0).all()
    assert got.max() < 1 << 24


def test_sqrt():
    one, two = 1 + VALUES / 2.0**23, 2 + VALUES / 2.0**22
    got = tables.SQRT(np.concatenate([VALUES, VALUES | 1 << 23]))
    assert np.abs(got / 2.0**23 - np.sqrt(np.concatenate([one, two]))).max() < 2.0**-21
    assert (np.diff(got) >= 0).all()
    assert got.min() >= 1 << 23
    assert got.max() < 1 << 24


@pytest.mark.parametrize("table", [tables.EXP2, tables.RECIPROCAL, tables.LOG1P, tables.SQRT])
def test_words_have_40_bits(table):
    assert all(word < 1 << 40 for word in table.packed())
    assert len(table.packed()) == table.segments


@pytest.mark.parametrize(("score", "f", "relative"), [
    (tables.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 2.0**-19),
    (tables.sqrt_softplus, lambda x: np.sqrt(np.logaddexp(0, x)), 2.0**-19),
])
def test_scores(score, f, relative):
    s = np.linspace(-40 * 2.0**20, 40 * 2.0**20, 100001).astype(np.int64)
    x = s / 2.0**20
    error = score(s) / 2.0**36 - f(x)
    assert np.abs(error / np.maximum(f(x), 1)).max() < 2.0**-19.4  # stated: 2**-18
    assert np.abs(error / f(x))[x > -10].max() < relative


def test_exponential_ends():
    d = np.array([0, 1, tables.EXPONENTIAL_LIMIT - 1, tables.EXPONENTIAL_LIMIT, 1 << 32])
    got = tables.exponential(d)
    assert got.mantissa[3:].tolist() == [0, 0]
    assert got.mantissa[:3].min() > (1 << 23) - 8  # the lines are off by as much
    assert got.score[:2] / 2.0**36 == pytest.approx(1, abs=2.0**-19)


def test_fixed():
    values = np.array([0.5, -0.5, 1.5, 2.5, np.nan, -np.inf, 4e9, -4e9], np.float32)
    got, beyond = tables.fixed(values, 0)
    low, high = -(1 << 31), (1 << 31) - 1
    assert got.tolist() == [0, 0, 2, 2, low, low, high, low]
    assert beyond.tolist() == [False] * 6 + [True] * 2


def test_leading():
    mantissa, position = tables.leading(np.array([0, 1, 5, 0b110111]), 3)
    assert mantissa.tolist() == [0, 4, 5, 6]
    assert position.tolist() == [-1, 0, 2, 5]
