"""What the request at hand has used."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["ActivationAware"]


class ActivationAware(Residency):
    """Keep ``freq(l, e) / sum * (1 - l / L) * A(l, e) / sum``: use over all requests times use in
    the request at hand, its activation matrix A, shallow layers first (MoE-Infinity, arXiv
    2401.14361, ``memory/expert_priority_score.py``). Sums are over the layer's experts; with a
    cache for each layer the factor of the layer changes nothing.
    """

    name = "activation-aware"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._ever, self._request = np.zeros_like(self.score), np.zeros_like(self.score)

    def begin_request(self) -> None:
        """Begin a new activation matrix."""
        self._request[:] = 0

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        ever, request = self._ever[layer], self._request[layer]
        ever += uses
        request += uses
        # Divided by sums that are the same for a whole layer: the order is that of the products.
        np.multiply(ever, request, out=self.score[layer])
