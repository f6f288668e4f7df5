"""Prefetch: what is moved to the torch device before its route is known.

One file a policy; every class of this folder that has a ``name`` is in the registry. A guess is
moved in chunks, behind everything that is waited for, and what has not arrived when the route of
its layer is known and does not hold it is cancelled.
"""

from __future__ import annotations

from moeaccel.host.policies.prefetch.base import Ahead, Guess, Prefetch
from moeaccel.host.policies.registry import find, lookup

__all__ = ["PREFETCHES", "Ahead", "Guess", "Prefetch", "prefetch"]

PREFETCHES = find(__name__, __path__, Prefetch)
"""Every prefetch policy by name."""


def prefetch(name: str) -> type[Prefetch]:
    """Return the prefetch policy of that name.

    Raises
    ------
    UnknownPolicy
        If there is none.
    """
    return lookup("prefetch", PREFETCHES, name)
