"""From the experts of one layer to those of the next, by counting."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.policies.prefetch.base import Ahead, Guess, Prefetch, best

__all__ = ["TransitionTable"]

_PRIOR = 5.0
_LEARN = 16  # passes from one table to the next, times 1.5 each


class TransitionTable(Prefetch):
    """Score the experts of the next layer by ``log p_j + sum over i in the route of log(P(j | i) /
    p_j)``, P counted while running and pulled towards p where counts are few. On DeepSeek-V2-Lite
    the best top_k hold half of the true ones; EdgeMoE (arXiv 2308.14352), whose models have one
    expert a token, has a table of the two layers before.

    Parameters
    ----------
    widen : :class:`float`
        Guesses over the experts of the route at hand.
    **options
        See :class:`Prefetch`.
    """

    name = "transition-table"

    def __init__(self, *, widen: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        shape = self.n_layers, self.n_experts, self.n_experts
        self._widen = widen
        self._together = np.zeros(shape, np.float32)
        self._counts = np.zeros(shape[:2], np.float32)
        self._table: np.ndarray | None = None
        self._prior = np.zeros(shape[:2], np.float32)
        self._before: np.ndarray | None = None
        self._passes, self._next = 0, _LEARN

    def begin_pass(self, *, new_request: bool) -> None:
        """Make the table anew from time to time."""
        self._before = None
        self._passes += 1
        if self._passes >= self._next:
            self._next = int(self._next * 1.5)
            share = self._counts / np.maximum(self._counts.sum(1, keepdims=True), 1) + 1e-9
            # How often i came at all divides all P(j | i) alike, and changes no order.
            table = self._together + _PRIOR * share[:, None]
            np.log(table, out=table)
            self._prior = np.log(share)
            self._table = table - self._prior[:, None]

    def guess(self, layer: int, uses: np.ndarray, ahead: Ahead) -> list[Guess]:
        """Return the best of the next layer; see :meth:`Prefetch.guess`."""
        experts = uses.nonzero()[0]
        if self._before is not None:
            self._together[layer][self._before[:, None], experts] += 1
        self._counts[layer, experts] += 1
        self._before = experts
        later = layer + 1
        if self._table is None or later >= self.n_layers:
            return []
        score = self._table[later][experts].sum(0) + self._prior[later]
        return [Guess(later, best(score, round(len(experts) * self._widen)))]
