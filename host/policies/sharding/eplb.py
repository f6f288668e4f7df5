"""Replicas of the busiest experts, then even packs."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.sharding.base import Sharding, packed

__all__ = ["EPLB"]


class EPLB(Sharding):
    """Give each spare slot to the expert with the most tokens a replica, ``argmax tokens /
    replicas``; then pack the replicas, heaviest first, each into the device with the least load
    that has room (deepseek-ai/EPLB, its policy for one node).

    Parameters
    ----------
    spare : :class:`int`
        Slots over the number of experts, in a layer; together a multiple of the devices.
    **options
        See :class:`Sharding`.
    """

    name = "eplb"

    def __init__(self, *, spare: int = 0, **options: Any) -> None:
        super().__init__(**options)
        if spare < 0:
            raise InvalidOption(f"spare must be at least 0, not {spare}")
        self.spare = spare

    def _share(self, ids: np.ndarray, n_experts: int) -> np.ndarray:
        slots = n_experts + self.spare
        room = -(-slots // self.n_devices)
        share = np.zeros((ids.shape[1], self.n_devices, n_experts))
        for layer, tokens in enumerate(self.counts(ids, n_experts)):
            replicas = np.ones(n_experts, np.int64)
            for _ in range(self.spare):
                replicas[(tokens / replicas).argmax()] += 1
            expert = np.repeat(np.arange(n_experts), replicas)
            device = packed(tokens[expert] / replicas[expert], self.n_devices, room)
            np.add.at(share[layer], (device, expert), 1 / replicas[expert])
        return share
