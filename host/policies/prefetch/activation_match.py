"""The most similar request of the past."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.policies.prefetch.base import Ahead, Guess, Prefetch, best

__all__ = ["ActivationMatch"]


class ActivationMatch(Prefetch):
    """Keep the activation matrices (layers, experts) of past requests; after a layer take the one,
    M, with the highest mean cosine of its rows to those of the request at hand, and move by
    ``P[l'] = (M[l'] + 1e-8) (1 - (l' - l) / (L + 1))``, l' > l (MoE-Infinity, arXiv 2401.14361,
    ``memory/expert_predictor.py``). When the collection is full the least matched goes.

    Parameters
    ----------
    size : :class:`int`
        Matrices that are kept.
    depth : :class:`int`
        Layers ahead.
    **options
        See :class:`Prefetch`.
    """

    name = "activation-match"

    def __init__(self, *, size: int = 32, depth: int = 2, **options: Any) -> None:
        super().__init__(**options)
        shape = self.n_layers, self.n_experts
        self.depth = depth
        self._kept = np.zeros((self.n_layers, size, self.n_experts), np.float32)  # unit rows
        self._count, self._matched = 0, np.zeros(size, np.int64)
        self._request = np.zeros(shape, np.float32)
        self._cosines = np.zeros(size, np.float32)

    def begin_pass(self, *, new_request: bool) -> None:
        """Keep the matrix of the request that has ended, and start the pass's similarities."""
        if new_request and self._request.any():
            place = self._count
            if place < len(self._matched):
                self._count += 1
            else:
                place = int(self._matched.argmin())
            lengths = np.linalg.norm(self._request, axis=1, keepdims=True)
            self._kept[:, place] = self._request / np.maximum(lengths, 1e-9)
            self._matched[place] = 0
            self._request[:] = 0
        self._cosines[:] = 0

    def guess(self, layer: int, uses: np.ndarray, ahead: Ahead) -> list[Guess]:
        """Return the next layers of the nearest matrix; see :meth:`Prefetch.guess`."""
        row = self._request[layer]
        row += uses
        if not self._count:
            return []
        square = row @ row
        if square:  # else the request has not used the layer yet
            self._cosines += self._kept[layer] @ (row / np.sqrt(square))
        nearest = int(self._cosines[: self._count].argmax())
        if layer + 1 < self.n_layers:
            self._matched[nearest] += 1
        count = int(np.count_nonzero(uses))
        return [Guess(later, best(self._kept[later, nearest], count))
                for later in range(layer + 1, min(layer + 1 + self.depth, self.n_layers))]
