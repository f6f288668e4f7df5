"""In the order of their numbers."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.sharding.base import Sharding

__all__ = ["Contiguous"]


class Contiguous(Sharding):
    """The first E / D experts to the first device, and so on: what others are compared with."""

    name = "contiguous"

    def _share(self, ids: np.ndarray, n_experts: int) -> np.ndarray:
        device = np.arange(n_experts) * self.n_devices // n_experts
        share = (np.arange(self.n_devices)[:, None] == device).astype(float)
        return np.repeat(share[None], ids.shape[1], 0)
