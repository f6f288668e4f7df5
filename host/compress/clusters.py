"""Clusters, and assignments: what several passes need of combinatorics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["assignment", "clusters"]


def clusters(distances: NDArray[np.floating], count: int,
             linkage: Callable[[Any], Any]) -> list[list[int]]:
    """Return so many clusters, found by merging the two closest again and again.

    Parameters
    ----------
    distances : float array, (n, n)
    count : :class:`int`
        1 to n.
    linkage : callable
        Distance of two clusters from those of their members: ``np.max``, ``np.mean``.
    """
    found = [[i] for i in range(len(distances))]
    while len(found) > max(1, count):
        pairs = [(float(linkage(distances[np.ix_(a, b)])), i, j)
                 for i, a in enumerate(found) for j, b in enumerate(found[:i])]
        _, i, j = min(pairs)
        found[j] = sorted(found[j] + found[i])
        del found[i]
    return found


def assignment(costs: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return the column for each row of a square matrix such that their sum is least.

    The Hungarian method with potentials (Kuhn, 1955; Jonker and Volgenant, 1987), O(n^3).
    """
    n = len(costs)
    row_of = np.full(n + 1, -1)  # of each column, the last one a place to begin
    u, v = np.zeros(n), np.zeros(n + 1)
    for row in range(n):
        row_of[n] = row
        column = n
        least = np.full(n, np.inf)
        before = np.full(n, n)
        used = np.zeros(n + 1, bool)
        while row_of[column] >= 0:
            used[column] = True
            now = row_of[column]
            reduced = costs[now] - u[now] - v[:n]
            better = ~used[:n] & (reduced < least)
            least[better], before[better] = reduced[better], column
            following = int(np.where(used[:n], np.inf, least).argmin())
            step = least[following]
            u[row_of[used]] += step
            v[used] -= step
            least[~used[:n]] -= step
            column = following
        while column != n:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    found = np.empty(n, np.int64)
    found[row_of[:n]] = np.arange(n)
    return found
