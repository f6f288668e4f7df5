"""The next layer's gate, asked early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.prefetch.base import Ahead, Guess, Prefetch, best, blurred

__all__ = ["GateAhead"]


class GateAhead(Prefetch):
    """Apply the gates of the next layers to the states of the layer at hand: ``top_k of W[l+d]
    h[l]``, since what a layer adds is small beside what it passes on (mixtral-offloading, arXiv
    2312.17238; Fate, 2502.12224; AdapMoE, 2408.10284; HOBBIT, 2411.01433).

    A replay has no states. There each expert of the true route is guessed with the published chance
    (a mean of 0.866 for Mixtral's next layer, 0.79 for the top-k of finer models), and a random one
    in its place otherwise; `accuracy` to the power of d for d layers ahead.

    Parameters
    ----------
    gates : sequence of (n_experts, d_model), optional
        The gate of each layer.
    accuracy : :class:`float`
    depth : :class:`int`
        Layers ahead.
    most : :class:`int`, optional
        Guesses for a layer.
    **options
        See :class:`Prefetch`.
    """

    name = "gate-ahead"

    def __init__(self, *, gates: Sequence[np.ndarray] | None = None, accuracy: float = 0.85,
                 depth: int = 1, most: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= accuracy <= 1 or depth < 1:
            raise InvalidOption(f"accuracy must be 0 to 1 and depth at least 1, not {accuracy!r} "
                                f"and {depth!r}")
        self._gates, self.accuracy, self.depth, self.most = gates, accuracy, depth, most
        self._plans: list[list[np.ndarray]] = []  # of a pass, for each depth

    def begin_pass(self, *, new_request: bool) -> None:
        """Forget what stands for the gates' choice in the pass before."""
        self._plans = []

    def guess(self, layer: int, uses: np.ndarray, ahead: Ahead) -> Iterator[Guess]:
        """Yield the choice of the next gates; see :meth:`Prefetch.guess`."""
        for later in range(layer + 1, min(layer + 1 + self.depth, self.n_layers)):
            if self._gates is not None and ahead.hidden is not None:
                logits = np.atleast_2d(ahead.hidden) @ self._gates[later].T
                chosen = np.argpartition(logits, -self.top_k, axis=1)[:, -self.top_k :]
                counts = np.bincount(chosen.ravel(), minlength=self.n_experts)
                experts = best(counts)
            elif ahead.uses is not None:
                if not self._plans:
                    routes = [ahead.busiest(each) for each in range(self.n_layers)]
                    self._plans = [blurred(routes, self.n_experts, self.accuracy ** (1 + d),
                                           self.random) for d in range(self.depth)]
                experts = self._plans[later - layer - 1][later]
            else:
                break
            yield Guess(later, experts[: self.most])
