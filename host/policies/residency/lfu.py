"""Least frequently used."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["LFU"]


class LFU(Residency):
    """Keep what was used most: ``score = tokens so far``, also while an expert was not resident.

    What a step used stays until the next one, so that of `slots` only those that a step does not
    need follow the count. On a long stream this is static popularity with a little recency.
    """

    name = "lfu"

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        self.score[layer] += uses
