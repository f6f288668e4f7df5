"""Hit rates of one cache for the whole model, reset at every segment.

The definition is that of "Not All Models Suit Expert Offloading" (arXiv 2505.16056; read in the
authors' ``50_chr_calc.py``): entries are (layer, expert); a cache of ``ratio * top_k * layers``
slots starts empty with every segment, and while it is not full an entry that was never used counts
as a hit; a token's hits are counted against the cache as it was before the token, then its entries
are inserted one by one, in the order of layers and slots. At ratio 1 the LRU column is the chance
that an expert of this token was an expert of the token before.

What remains after a token is the best ``slots`` of what was there and what came, by last use (LRU),
by count within the segment and then last use (LFU), or by next use (Belady, where what came last
stays even if it is the worst: there is no bypass). So whole segments are computed side by side, a
token at a time. For LRU this is exact; the others depend a little on the order within a token:
beside entries taken one at a time, in a cache of 64 slots LFU is 0.002 lower and Belady up to 0.005
higher, and nearer in larger ones.
"""

from __future__ import annotations

import numpy as np

from moeaccel.host.traces.errors import InvalidTrace

__all__ = ["POLICIES", "segment_hit_rates"]

POLICIES = ("LRU", "LFU", "Belady")


def segment_hit_rates(ids: np.ndarray, *, n_experts: int,
                      ratios: tuple[int, ...] = (1, 2, 3),
                      policies: tuple[str, ...] = POLICIES) -> dict[str, np.ndarray]:
    """Return the hit rate of each policy at each ratio of slots to one token's experts.

    Parameters
    ----------
    ids : integer, (segments, tokens, layers, top_k)
        All slots used: no id is negative, none comes twice in one layer of a token.
    n_experts : :class:`int`
    ratios : :class:`tuple` of :class:`int`
        Slots of the cache over ``layers * top_k``.
    policies : :class:`tuple` of :class:`str`
        Among :data:`POLICIES`.

    Returns
    -------
    :class:`dict` of float64 (len(ratios),), by policy.

    Raises
    ------
    InvalidTrace
        If ``ids`` is empty or holds ids out of range.
    """
    if ids.ndim != 4 or not ids.size:
        raise InvalidTrace(
            f"segments must be (segments, tokens, layers, top_k) with a token, not {ids.shape}")
    if ids.min() < 0 or ids.max() >= n_experts:
        raise InvalidTrace(
            f"ids of segments must be 0 to {n_experts - 1}, not {ids.min()} to {ids.max()}; "
            "leave out tokens with unused slots")
    segments, tokens, layers, top_k = ids.shape
    width = layers * n_experts
    entries = (ids + np.arange(layers)[:, None] * n_experts).reshape(segments, tokens, -1)
    slots = np.minimum(np.array(ratios) * layers * top_k, width)
    cold = _cold_hits(entries, width, slots)
    run = {"LRU": _recency, "LFU": _frequency, "Belady": _next_use}
    return {policy: (run[policy](entries, width, slots) + cold) / entries.size
            for policy in policies}


def _cold_hits(entries: np.ndarray, width: int, slots: np.ndarray) -> np.ndarray:
    """Return how many first uses find the cache not full, for each number of slots."""
    distinct = [np.unique(segment).size for segment in entries]
    return np.array([sum(min(n, int(count)) for n in distinct) for count in slots], float)


def _recency(entries: np.ndarray, width: int, slots: np.ndarray) -> np.ndarray:
    segments, tokens, each = entries.shape
    key = np.full((segments, width), -1, np.int32)
    hits = np.zeros(len(slots))
    for t in range(tokens):
        now = entries[:, t]
        hits += _hits(key, np.take_along_axis(key, now, 1), width - slots)
        np.put_along_axis(key, now, np.arange(t * each, (t + 1) * each, dtype=np.int32)[None], 1)
    return hits


def _frequency(entries: np.ndarray, width: int, slots: np.ndarray) -> np.ndarray:
    segments, tokens, each = entries.shape
    key = np.full((segments, width), -1, np.int64)
    once = np.int64(1) << int(tokens * each).bit_length()  # one use outweighs any last use
    hits = np.zeros(len(slots))
    for t in range(tokens):
        now = entries[:, t]
        old = np.take_along_axis(key, now, 1)
        hits += _hits(key, old, width - slots)
        count = np.maximum(old, 0) // once + 1
        np.put_along_axis(key, now, count * once + np.arange(t * each, (t + 1) * each), 1)
    return hits


def _hits(key: np.ndarray, wanted: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return how many wanted keys were ever set and are among the greatest of each row."""
    order = np.partition(key, np.minimum(places, key.shape[1] - 1), axis=1)
    seen = wanted >= 0
    return np.array([np.count_nonzero(seen & (wanted >= order[:, place, None]))
                     for place in places])


def _next_use(entries: np.ndarray, width: int, slots: np.ndarray) -> np.ndarray:
    segments, tokens, each = entries.shape
    end = tokens * each
    absent = end + width  # later than every next use, and than never
    later = np.empty((tokens, segments, each), np.int32)
    coming = np.broadcast_to(np.arange(end, absent, dtype=np.int32), (segments, width)).copy()
    for t in reversed(range(tokens)):
        now = entries[:, t]
        later[t] = np.take_along_axis(coming, now, 1)
        np.put_along_axis(coming, now, np.arange(t * each, (t + 1) * each, dtype=np.int32)[None], 1)
    hits = np.zeros(len(slots))
    for index, count in enumerate(slots):
        key = np.full((segments, width), absent, np.int32)
        for t in range(tokens):
            now = entries[:, t]
            hit = np.take_along_axis(key, now, 1) < absent
            hits[index] += np.count_nonzero(hit)
            # The entry that came in last, and what was used behind it, cannot have been replaced.
            safe = np.logical_and.accumulate(hit[:, :0:-1], axis=1)[:, ::-1]
            safe = np.concatenate([safe, np.ones((segments, 1), bool)], axis=1)
            np.put_along_axis(key, now, np.where(safe, -1, later[t]), 1)
            if count < width:
                last = np.partition(key, count - 1, axis=1)[:, count - 1, None]
                key[key > last] = absent
            np.put_along_axis(key, now, np.where(safe, later[t], np.take_along_axis(key, now, 1)),
                              1)
    return hits
