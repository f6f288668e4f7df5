"""A part of every expert on every device."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.sharding.base import Sharding

__all__ = ["RowSplit"]


class RowSplit(Sharding):
    """Deal the width of every expert to all devices, so that each reads 1 / D of it and their y are
    added: whatever the routes, all are equally busy (expert tensor parallelism in Duplex, arXiv
    2409.01141; over NDP-DIMMs in 2601.03992).
    """

    name = "row-split"

    def _share(self, ids: np.ndarray, n_experts: int) -> np.ndarray:
        return np.full((ids.shape[1], self.n_devices, n_experts), 1 / self.n_devices)
