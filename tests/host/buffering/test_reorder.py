"""Loads in order and in windows."""

import numpy as np
import pytest

from moeaccel.host.buffering import loads
from moeaccel.host.errors import InvalidOption

IDS = np.array([[0, 1], [2, 0], [1, 2], [0, 1], [-1, 2], [1, 0]])


def test_in_order_an_expert_is_loaded_again_when_its_slot_was_taken():
    found = loads(IDS, window=1, slots=1)
    assert (found.pairs, found.loads) == (11, 11)
    assert loads(IDS, window=1, slots=2).loads == 10  # but for the last 1
    assert loads(IDS, window=1, slots=3).loads == 3


def test_a_window_loads_each_of_its_experts_once():
    assert [loads(IDS, window=w, slots=1).loads for w in (2, 3, 6)] == [7, 5, 3]
    assert loads(IDS, window=100, slots=1).reuse == 11 / 3


def test_a_larger_window_never_loads_more_here():
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(16)[:4] for _ in range(64)])
    found = [loads(ids, window=1 << i, slots=2).loads for i in range(7)]
    assert found == sorted(found, reverse=True) and found[-1] == 16


@pytest.mark.parametrize(("window", "slots"), [(0, 1), (1, 0)])
def test_sizes(window, slots):
    with pytest.raises(InvalidOption, match="window and slots must be at least 1"):
        loads(IDS, window=window, slots=slots)
