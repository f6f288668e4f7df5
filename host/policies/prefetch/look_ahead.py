"""All routes of a pass before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moeaccel.host.policies.prefetch.base import Ahead, Guess, Prefetch, blurred

__all__ = ["LookAhead"]


class LookAhead(Prefetch):
    """A predictor says all experts of all layers from the tokens, before the pass begins, so that
    moves run many layers ahead; the routers then say what is computed (ExpertFlow, arXiv
    2410.17954, whose predictor has 0.90 to 0.95 of a batch's experts). In a replay each expert is
    right with the chance `accuracy`, and a random one in its place otherwise.

    Parameters
    ----------
    accuracy : :class:`float`
    depth : :class:`int`
        Layers ahead that are moved for.
    **options
        See :class:`Prefetch`.
    """

    name = "look-ahead"

    def __init__(self, *, accuracy: float = 0.92, depth: int = 4, **options: Any) -> None:
        super().__init__(**options)
        self.accuracy, self.depth = accuracy, depth
        self._plan: dict[int, np.ndarray] = {}

    def begin_pass(self, *, new_request: bool) -> None:
        """Forget the plan of the pass before."""
        self._plan.clear()

    def guess(self, layer: int, uses: np.ndarray, ahead: Ahead) -> Iterator[Guess]:
        """Yield the plan of the next layers; see :meth:`Prefetch.guess`."""
        if ahead.uses is None:
            return
        for later in range(layer + 1, min(layer + 1 + self.depth, self.n_layers)):
            if later not in self._plan:  # one that is planned is on its way already
                self._plan[later] = blurred(
                    ahead.busiest(later), self.n_experts, self.accuracy, self.random)
                yield Guess(later, self._plan[later])
