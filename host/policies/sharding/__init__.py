"""Sharding: which of several devices has which experts.

One file a policy; every class of this folder that has a ``name`` is in the registry.
"""

from __future__ import annotations

from moeaccel.host.policies.registry import find, lookup
from moeaccel.host.policies.sharding.base import Sharding, Shards

__all__ = ["SHARDINGS", "Sharding", "Shards", "sharding"]

SHARDINGS = find(__name__, __path__, Sharding)
"""Every sharding by name."""


def sharding(name: str) -> type[Sharding]:
    """Return the sharding of that name.

    Raises
    ------
    UnknownPolicy
        If there is none.
    """
    return lookup("sharding", SHARDINGS, name)
