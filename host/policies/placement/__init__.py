"""Placement: which of a call's experts the torch device computes, and which the accelerator.

One file a policy; every class of this folder that has a ``name`` is in the registry.
"""

from __future__ import annotations

from moeaccel.host.policies.placement.base import Chains, Placement, Plan, Work, chains
from moeaccel.host.policies.registry import find, lookup

__all__ = ["PLACEMENTS", "Chains", "Placement", "Plan", "Work", "chains", "placement"]

PLACEMENTS = find(__name__, __path__, Placement)
"""Every placement by name."""


def placement(name: str) -> type[Placement]:
    """Return the placement of that name.

    Raises
    ------
    UnknownPolicy
        If there is none.
    """
    return lookup("placement", PLACEMENTS, name)
