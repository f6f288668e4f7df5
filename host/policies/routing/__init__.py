"""Routing: changes of the routes for the sake of what is where. All of them are lossy, and off by
default.

One file a policy; every class of this folder that has a ``name`` is in the registry.
"""

from __future__ import annotations

from moeaccel.host.policies.registry import find, lookup
from moeaccel.host.policies.routing.base import Call, Routed, Routing

__all__ = ["ROUTINGS", "Call", "Routed", "Routing", "routing"]

ROUTINGS = find(__name__, __path__, Routing)
"""Every change of routes by name."""


def routing(name: str) -> type[Routing]:
    """Return the change of routes of that name.

    Raises
    ------
    UnknownPolicy
        If there is none.
    """
    return lookup("routing", ROUTINGS, name)
