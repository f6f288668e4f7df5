from collections import Counter

import numpy as np
import pytest

from moeaccel.host.traces import InvalidTrace
from moeaccel.host.traces.segments import segment_hit_rates


def one_by_one(entries, slots, worth):
    """Hits of a cache with the definition of the paper, an entry at a time: (tokens, each).

    `worth(entry, count, time)` says what an entry is worth from the moment of its use."""
    cache, seen, count, hits, time = {}, set(), Counter(), 0, 0
    for token in entries.tolist():
        for entry in token:
            hits += entry in cache or (entry not in seen and len(seen) < slots)
            seen.add(entry)
        for entry in token:
            count[entry] += 1
            if entry not in cache and len(cache) == slots:
                del cache[min(cache, key=cache.__getitem__)]
            cache[entry] = worth(entry, count[entry], time)
            time += 1
    return hits / entries.size


def lru(entry, count, time):
    return time


def lfu(entry, count, time):
    return count, time


def belady(entries):
    following, last = [], {}
    for time, entry in reversed(list(enumerate(entries.ravel().tolist()))):
        following.append(last.get(entry, entries.size + entry))
        last[entry] = time
    following.reverse()
    return lambda entry, count, time: -following[time]


@pytest.mark.parametrize("seed", range(3))
def test_against_caches_that_take_one_entry_at_a_time(seed):
    rng = np.random.default_rng(seed)
    layers, n_experts, top_k = 16, 8, 2
    liked = rng.random((layers, n_experts)) ** 3
    ids = np.array([[[rng.choice(n_experts, top_k, False, liked[layer] / liked[layer].sum())
                      for layer in range(layers)] for _ in range(50)]])
    found = segment_hit_rates(ids, n_experts=n_experts)
    entries = (ids[0] + np.arange(layers)[:, None] * n_experts).reshape(50, -1)
    for i, ratio in enumerate((1, 2, 3)):
        slots = ratio * layers * top_k
        assert found["LRU"][i] == one_by_one(entries, slots, lru)
        # The order within a token counts for a slot or two, of few in so small a model.
        assert found["LFU"][i] == pytest.approx(one_by_one(entries, slots, lfu), abs=0.01)
        assert found["Belady"][i] == pytest.approx(one_by_one(entries, slots, belady(entries)),
                                                   abs=0.02)
        assert found["Belady"][i] >= max(found["LRU"][i], found["LFU"][i])


def test_lru_of_one_tokens_size_is_reuse():
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(8), (3, 40, 5, 1)), axis=3)[..., :2]
    found = segment_hit_rates(ids, n_experts=8, ratios=(1,), policies=("LRU",))
    again = (ids[:, 1:, :, :, None] == ids[:, :-1, :, None, :]).any(-1).sum()
    assert found["LRU"][0] == pytest.approx((again + ids[:, 0].size) / ids.size)


def test_a_cache_for_all_hits_always():
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(4), (2, 9, 3, 1)), axis=3)[..., :2]
    assert [rates.tolist() for rates in segment_hit_rates(
        ids, n_experts=4, ratios=(2, 9)).values()] == [[1, 1]] * 3


def test_what_is_no_segment_is_named():
    with pytest.raises(InvalidTrace, match="must be"):
        segment_hit_rates(np.zeros((3, 2, 1), int), n_experts=2)
    with pytest.raises(InvalidTrace, match="ids of segments must be 0 to 1, not -1 to -1"):
        segment_hit_rates(np.full((1, 3, 2, 1), -1), n_experts=2)
