"""Hit rates: of caches for each layer, of one for the model, of sets chosen beforehand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moeaccel.host.policies.residency import Pinned
from moeaccel.host.traces.segments import POLICIES as POLICIES_OF_SEGMENTS, segment_hit_rates
from moeaccel.host.traces.statistics.prediction import Tables
from moeaccel.host.traces.statistics.sample import Sample
from moeaccel.host.traces.statistics.side_by_side import POLICIES, best_hits, hits, residents

__all__ = ["layer_caches", "measure"]

SEGMENT = 512
_STREAM, _STREAM_LAYERS = 8192, 9
_GLOBAL_TOKENS = 2048
_GLOBAL_SHARES = (0.05, 0.094, 0.10, 0.15, 0.20, 0.25, 0.50)
_EVERY = 512  # tokens between two words of progress
_HALVES = 64  # tokens: a shorter prompt has no halves worth comparing


def measure(sample: Sample, *, slots: Iterable[int] = (),
            progress: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """Return hit rates.

    * ``segment/LRU@r`` ...: :func:`~moeaccel.host.traces.segments.segment_hit_rates`
    * ``cache/LRU, C slots`` ...: caches for each layer, one stream over all requests
    * ``one cache/x %``: one LRU cache over all (layer, expert), slots in percent of these
    * ``placement/..., C slots``: the C experts of each layer that are most popular in the whole
      trace, in the first half of a request, or in its second half, where the hits are counted
    * ``prefetch/..., C slots, m guesses``: a decayed-LFU cache and, from the layer before, the best
      guesses of :class:`Tables`, which are kept for the token only: share of the experts found, and
      experts moved for each one needed

    Parameters
    ----------
    sample : :class:`Sample`
    slots : iterable of :class:`int`
        Sizes of caches beside those that are always measured.
    progress : callable
        Gets a line a second or so.
    """
    found = {}
    pieces = [ids[start : start + SEGMENT] for ids in sample.requests
              for start in range(0, len(ids) - SEGMENT + 1, SEGMENT) if ids.min() >= 0]
    if pieces:
        for policy in POLICIES_OF_SEGMENTS:
            progress(f"{policy} on {len(pieces)} segments")
            rates = segment_hit_rates(np.stack(pieces), n_experts=sample.n_experts,
                                      policies=(policy,))[policy]
            found |= {f"segment/{policy}@{ratio}": float(rate)
                      for ratio, rate in enumerate(rates, 1)}
    k, experts = sample.top_k, sample.n_experts
    sizes = sorted({min(size, experts) for size in (
        k, 2 * k, experts // 4, experts * 3 // 8, experts // 2, experts * 3 // 4, *slots)})
    stream = sample.stream(_STREAM, layers=_STREAM_LAYERS)
    rates = layer_caches(stream, sizes, progress=lambda done: progress(
        f"token {done:,} of {len(stream):,} through caches of {len(sizes)} sizes"))
    for size, of_size in zip(sizes, rates, strict=True):
        found |= {f"cache/{name}, {size} slots": rate for name, rate in of_size.items()}
    for what, part in (("one cache for all layers", _one_cache), ("placements", _placement)):
        progress(what)
        found |= part(sample)
    return found | _prefetch(sample, progress)


def layer_caches(stream: np.ndarray, slots: Sequence[int], *,
                 progress: Callable[[int], None] = lambda _: None) -> list[dict[str, float]]:
    """Return the hit rate of each policy, caches per layer, on one stream of tokens.

    Parameters
    ----------
    stream : bool (tokens, layers, experts)
    slots : sequence of :class:`int`
        Of each layer: one result for each size.
    progress : callable
        Gets how many tokens are done, now and then.
    """
    def say(step: int) -> None:
        if step % _EVERY == 0:
            progress(step)

    uses = int(stream.sum())
    kept, best, popularity = hits(stream, slots, say), best_hits(stream, slots), stream.sum(0)
    static = [int((stream & Pinned(popularity=popularity, slots=size).resident).sum())
              for size in slots]
    names = (*POLICIES, "Belady", "static")
    return [{name: float(count / uses) if uses else 0.0
             for name, count in zip(names, counts, strict=True)}
            for counts in zip(*kept, best, static, strict=True)]


def _one_cache(sample: Sample) -> dict[str, float]:
    entries, room = [], _GLOBAL_TOKENS
    for ids in sample.requests:
        part = ids[: max(room, 0)]
        flat = part + np.arange(part.shape[1])[:, None] * sample.n_experts
        entries.append(flat[part >= 0])
        room -= len(part)
    sequence = np.concatenate(entries).tolist()
    size = sample.trace.n_layers * sample.n_experts
    return {f"one cache/{share * 100:g} %": _lru(sequence, round(share * size))
            for share in _GLOBAL_SHARES}


def _lru(sequence: list[int], slots: int) -> float:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for entry in sequence:
        if entry in cache:
            hits += 1
            cache.move_to_end(entry)
            continue
        cache[entry] = None
        if len(cache) > slots:
            cache.popitem(last=False)
    return hits / len(sequence)


def _placement(sample: Sample) -> dict[str, float]:
    found = {}
    requests = [mask for mask in sample.masks if len(mask) >= _HALVES]
    if not requests:
        return found
    everything = sample.trace.popularity().counts
    for size in sorted({sample.n_experts // 8, sample.n_experts // 4, sample.n_experts // 2}):
        rates: dict[str, list[float]] = {}
        for mask in requests:
            first, second = np.array_split(mask, 2)
            for name, counts in (("whole trace", everything), ("first half", first.sum(0)),
                                 ("second half", second.sum(0))):
                pinned = Pinned(popularity=counts, slots=size).resident
                rates.setdefault(name, []).append(float((second & pinned).sum() / second.sum()))
        found |= {f"placement/{name}, {size} slots": float(np.mean(values))
                  for name, values in rates.items()}
    return found


def _prefetch(sample: Sample, progress: Callable[[str], None]) -> dict[str, float]:
    """A table per layer pair, learned on the first four fifths, measured on the rest."""
    split = int(len(sample.masks) * 0.8)
    if split in (0, len(sample.masks)) or sample.trace.n_layers < 2:
        return {}
    learn, test = (np.concatenate(part) for part in (sample.masks[:split], sample.masks[split:]))
    k, experts = sample.top_k, sample.n_experts
    layers = [layer for layer in sample.layers(_STREAM_LAYERS) if layer]
    scores = np.stack([(table := Tables(learn[:, layer - 1], learn[:, layer])).prior
                       + table.evidence(test[:, layer - 1]) for layer in layers], axis=1)
    wanted = test[:, layers]
    found = {}
    sizes = [slots for slots in (2 * k, experts * 3 // 8) if slots <= experts]
    kept = np.empty((len(sizes), *wanted.shape), bool)
    for t, now in enumerate(residents(wanted, sizes, ["decayed LFU"])):
        if t % _EVERY == 0:
            progress(f"token {t:,} of {len(wanted):,} with prefetches")
        kept[:, t] = now[0]
    for slots, resident in zip(sizes, kept, strict=True):
        for guesses in (0, k, 2 * k):
            guessed = np.zeros_like(wanted)
            if guesses:
                best = np.argpartition(scores, experts - guesses, axis=2)[..., -guesses:]
                np.put_along_axis(guessed, best, True, 2)
            hit = (wanted & (resident | guessed)).sum() / wanted.sum()
            moved = ((wanted | guessed) & ~resident).sum() / wanted.sum()
            found |= {f"prefetch/found, {slots} slots, {guesses} guesses": float(hit),
                      f"prefetch/moved, {slots} slots, {guesses} guesses": float(moved)}
    return found
