"""Least recently used."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["LRU"]


class LRU(Residency):
    """Keep what was used last: ``score = step of the last use``.

    Among experts of one step it does not matter which goes. The cache of mixtral-offloading
    (arXiv 2312.17238), one for each layer.
    """

    def __init__(self, *, n_layers: int, n_experts: int, slots: int) -> None:
        super().__init__(n_layers=n_layers, n_experts=n_experts, slots=slots)
        self._steps = np.zeros((n_layers, 1))

    def _use(self, layers: slice, uses: np.ndarray) -> None:
        self._steps[layers] += 1
        np.copyto(self.score[layers], self._steps[layers], where=uses > 0)
