"""Least recently used."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["LRU"]


class LRU(Residency):
    """Keep what was used last: ``score = step of the last use``.

    Among experts of one step it does not matter which goes. The cache of mixtral-offloading
    (arXiv 2312.17238), one for each layer.
    """

    name = "lru"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._steps = [0] * len(self.score)

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        self._steps[layer] += 1
        self.score[layer, used] = self._steps[layer]
