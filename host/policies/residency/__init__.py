"""Residency: which experts of each layer stay in the memory of the torch device.

Every policy here is a score for each expert of each layer, and one rule: after a step the
`slots` experts of a layer with the highest score stay. One file a policy.
"""

from moeaccel.host.policies.residency.base import Replay, Residency, replay
from moeaccel.host.policies.residency.belady import Belady
from moeaccel.host.policies.residency.decayed_lfu import DecayedLFU
from moeaccel.host.policies.residency.lfu import LFU
from moeaccel.host.policies.residency.lru import LRU
from moeaccel.host.policies.residency.pinned import Pinned

__all__ = ["LFU", "LRU", "Belady", "DecayedLFU", "Pinned", "Replay", "Residency", "replay"]
