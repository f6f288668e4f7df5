"""Caches of experts for each layer, many of them on one stream, a step at a time.

What :func:`~moeaccel.host.policies.residency.replay` does for one cache after the other is done
here for all sizes, policies and layers at once, with the same outcome to the last hit: caches that
have equally many experts to choose from, and to lose, lose them in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moeaccel.host.policies.residency.base import ABOVE_ALL
from moeaccel.host.policies.residency.decayed_lfu import DECAY, WORTH_MAX

__all__ = ["POLICIES", "best_hits", "hits", "residents"]

POLICIES = ("LRU", "LFU", "decayed LFU")
"""What :func:`residents` keeps caches by; the last is :class:`DecayedLFU` as it is by default."""


def residents(stream: np.ndarray, slots: Sequence[int], policies: Sequence[str] = POLICIES
              ) -> Iterator[np.ndarray]:
    """Yield, for each step, who is resident before it.

    Parameters
    ----------
    stream : bool (steps, layers, experts)
        Who is used.
    slots : sequence of :class:`int`
        Of each layer: one cache for each size.
    policies : sequence of :class:`str`
        Among :data:`POLICIES`.

    Yields
    ------
    :class:`numpy.ndarray` of bool, (policies, slots, layers, experts)
        Changed in place by the next step.
    """
    _, layers, experts = stream.shape
    resident = np.zeros((len(policies), len(slots), layers, experts), bool)
    score = np.zeros((len(policies), layers, experts))
    rows = resident.reshape(-1, experts)  # a view, as all caches are next to each other
    room = np.broadcast_to(np.array(slots)[:, None], resident.shape[:3]).ravel()
    of = np.broadcast_to(np.arange(len(policies) * layers).reshape(-1, 1, layers),
                         resident.shape[:3]).ravel()  # row of the scores of each cache
    worth = 1.0
    for step, used in enumerate(stream, 1):
        yield resident
        worth /= DECAY
        divisor, worth = (worth, 1.0) if worth > WORTH_MAX else (1.0, worth)
        for row, policy in zip(score, policies, strict=True):
            if policy == "LRU":
                row[used] = step
            elif policy == "LFU":
                row += used
            else:
                if divisor != 1:
                    row /= divisor
                row += used * worth
        _replace(rows, (used & ~resident).reshape(rows.shape), of, room,
                 (score + used * ABOVE_ALL).reshape(-1, experts))


def _replace(rows: np.ndarray, new: np.ndarray, of: np.ndarray, room: np.ndarray,
             value: np.ndarray) -> None:
    """Let the new experts of each cache in, and those of the lowest value go."""
    experts = rows.shape[1]
    new &= (room > 0)[:, None]
    before, more = rows.sum(1), new.sum(1)
    leave = before + more - room
    full = ((leave > 0) & (more > 0)).nonzero()[0]
    here, come = rows.nonzero()[1], new.nonzero()[1]
    rows |= new
    if not len(full):
        return
    first, second = (np.cumsum(count)[full] - count[full] for count in (before, more))
    kind = (before[full] * (experts + 1) + more[full]) * (2 * experts + 1) + leave[full]
    order = kind.argsort(kind="stable")
    count, places = np.arange(experts), rows.ravel()  # a view
    for group in np.split(order, np.flatnonzero(np.diff(kind[order])) + 1):
        caches = full[group]
        residents_, newcomers, lost = (int(each[caches[0]]) for each in (before, more, leave))
        # Residents in their order, then newcomers in theirs: which of equals goes depends on it.
        who = np.concatenate((here[first[group, None] + count[:residents_]],
                              come[second[group, None] + count[:newcomers]]), axis=1)
        lowest = value[of[caches, None], who].argpartition(lost - 1, axis=1)[:, :lost]
        goes = who[np.arange(len(group))[:, None], lowest]
        places[caches[:, None] * experts + goes] = False


def hits(stream: np.ndarray, slots: Sequence[int],
         progress: Callable[[int], None] = lambda _: None) -> np.ndarray:
    """Return how many of the used experts are resident, int64 (policies, slots).

    Parameters
    ----------
    stream, slots
        See :func:`residents`.
    progress : callable
        Gets the number of each step.
    """
    found = np.zeros((len(POLICIES), len(slots)), np.int64)
    for step, (used, resident) in enumerate(zip(stream, residents(stream, slots), strict=True)):
        progress(step)
        found += (resident & used).sum((2, 3))
    return found


def best_hits(stream: np.ndarray, slots: Sequence[int],
              progress: Callable[[int], None] = lambda _: None) -> np.ndarray:
    """Return the same for :class:`~moeaccel.host.policies.residency.Belady`, int64 (slots,).

    Of equals that are resident the last stays, of equals that are not the first comes in.
    """
    steps, layers, experts = stream.shape
    later = np.empty(stream.shape, np.int32)  # the step of the next use
    coming = np.full((layers, experts), steps, np.int32)
    for step in reversed(range(steps)):
        later[step] = coming
        coming[stream[step]] = step
    resident = np.zeros((len(slots), layers, experts), bool)
    last = np.broadcast_to((experts - np.minimum(slots, experts))[:, None, None],
                           (len(slots), layers, 1))
    stays, comes = 2 * experts + np.arange(experts), experts - 1 - np.arange(experts)
    found = np.zeros(len(slots), np.int64)
    some = np.array(slots)[:, None, None] > 0
    for step, used in enumerate(stream):
        progress(step)
        found += (resident & used).sum((1, 2))
        key = (np.int64(steps) - later[step]) * (4 * experts) + np.where(resident, stays, comes)
        key = np.where(resident | used, key, -1)
        least = np.take_along_axis(np.sort(key, axis=2), np.minimum(last, experts - 1), 2)
        resident = (key >= least) & (key >= 0) & some
    return found
