"""Residency: which experts of each layer stay in the memory of the torch device.

Every policy here is a score for each expert of each layer, and one rule: after a call the experts
of a layer with the highest score stay. One file a policy; every class of this folder that has a
``name`` is in the registry.
"""

from __future__ import annotations

from moeaccel.host.policies.registry import find, lookup
from moeaccel.host.policies.residency.activation_aware import ActivationAware
from moeaccel.host.policies.residency.base import Replay, Residency, SecondMiss, replay
from moeaccel.host.policies.residency.belady import Belady
from moeaccel.host.policies.residency.decayed_lfu import DecayedLFU
from moeaccel.host.policies.residency.least_stale import LeastStale
from moeaccel.host.policies.residency.lfu import LFU
from moeaccel.host.policies.residency.lru import LRU
from moeaccel.host.policies.residency.mrs import MRS
from moeaccel.host.policies.residency.pinned import Pinned
from moeaccel.host.policies.residency.prefill_guided import PrefillGuided
from moeaccel.host.policies.residency.promoted import Promoted

__all__ = ["LFU", "LRU", "MRS", "RESIDENCIES", "ActivationAware", "Belady", "DecayedLFU",
           "LeastStale", "Pinned", "PrefillGuided", "Promoted", "Replay", "Residency",
           "SecondMiss", "replay", "residency"]

RESIDENCIES = find(__name__, __path__, Residency)
"""Every residency policy by name."""


def residency(name: str) -> type[Residency]:
    """Return the residency policy of that name.

    Raises
    ------
    UnknownPolicy
        If there is none.
    """
    return lookup("residency", RESIDENCIES, name)
