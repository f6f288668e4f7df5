"""What the buffer holds, byte by byte."""

import pytest
from hypothesis import given, strategies as st

from moeaccel.host.buffering import ExpertBuffer
from moeaccel.host.errors import InvalidOption

A, B, C = (0, 1), (0, 2), (1, 1)


def test_a_fetch_takes_as_many_bytes_as_there_is_time_for():
    buffer = ExpertBuffer(2, 1000, unit=64)  # 960 bytes of a slot are whole units
    assert buffer.fetch([A, B], 5000, 1000) == 960
    assert buffer.held == {A: 960}
    assert buffer.fetch([A, B], 5000, 700) == 640  # A is there
    assert buffer.held == {A: 960, B: 640}
    assert (buffer.use(A, 5000), buffer.use(B, 5000), buffer.use(C, 5000)) == (960, 640, 0)
    counts = buffer.counts
    assert (counts.hits, counts.partial, counts.misses) == (1, 1, 1)
    assert (counts.hit_bytes, counts.fetched_bytes, counts.wasted_bytes) == (1600, 1600, 0)


def test_an_image_shorter_than_a_slot_is_whole():
    buffer = ExpertBuffer(1, 1024)
    assert buffer.fetch([A], 100, 4096) == 128
    assert buffer.use(A, 100) == 128 and buffer.counts.hits == 1


def test_what_no_one_used_is_wasted_when_it_leaves():
    buffer = ExpertBuffer(2, 640)
    buffer.fetch([A, B, C], 640, 10_000)  # C must not take the place of A
    assert buffer.held == {A: 640, B: 640} and buffer.waiting_bytes == 1280
    buffer.use(B, 640)
    buffer.fetch([C], 640, 64)
    assert buffer.held == {B: 640, C: 64}  # A was there longest, unused
    assert buffer.counts.wasted_bytes == 640
    buffer.fetch([A], 640, 64)
    assert buffer.held == {C: 64, A: 64} and buffer.counts.wasted_bytes == 640  # B was used


def test_what_memory_brought_stays_when_asked_for():
    buffer = ExpertBuffer(1, 640)
    assert buffer.use(A, 1280, keep=True) == 0
    assert buffer.use(A, 1280, keep=True) == 640
    assert buffer.use(B, 1280, keep=True) == 0 and buffer.held == {B: 640}
    assert buffer.counts.fetched_bytes == buffer.counts.wasted_bytes == 0


KEYS = st.tuples(st.integers(0, 2), st.integers(0, 3))


@given(st.integers(0, 3), st.integers(1, 20), st.lists(st.one_of(
    st.tuples(st.lists(KEYS, max_size=4), st.integers(0, 4000)), KEYS), max_size=40))
def test_bytes_add_up(slots, units, calls):
    """Every byte that was fetched was used, wasted, or waits; none is used that was not there."""
    buffer = ExpertBuffer(slots, 64 * units)
    first_used = 0
    for call in calls:
        if isinstance(call[0], list):
            keys, budget = call
            before = buffer.counts.fetched_bytes
            moved = buffer.fetch(keys, 1000, budget)
            assert moved <= budget and moved % 64 == 0
            assert buffer.counts.fetched_bytes == before + moved
        else:
            waiting = buffer.waiting_bytes
            assert buffer.use(call, 1000) == buffer.held.get(call, 0)
            first_used += waiting - buffer.waiting_bytes
        assert len(buffer.held) <= slots
        assert all(0 <= valid <= min(64 * units, 1024) for valid in buffer.held.values())
    counts = buffer.counts
    assert counts.fetched_bytes == first_used + counts.wasted_bytes + buffer.waiting_bytes


@pytest.mark.parametrize(("slots", "size"), [(-1, 64), (1, 63)])
def test_sizes(slots, size):
    with pytest.raises(InvalidOption, match=f"0 slots or more, of at least 64 .* not {slots} of"):
        ExpertBuffer(slots, size)
