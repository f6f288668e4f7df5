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
        self._plan: list[np.ndarray] | None = None
        self._planned = 0  # layers that were moved for

    def begin_pass(self, *, new_request: bool) -> None:
        """Forget the plan of the pass before."""
        self._plan, self._planned = None, 0

    def guess(self, layer: int, uses: np.ndarray, ahead: Ahead) -> Iterator[Guess]:
        """Yield the plan of the next layers; see :meth:`Prefetch.guess`."""
        if ahead.uses is None:
            return
        if self._plan is None:
            self._plan = blurred([ahead.busiest(each) for each in range(self.n_layers)],
                                 self.n_experts, self.accuracy, self.random)
        end = min(layer + 1 + self.depth, self.n_layers)
        for later in range(max(layer + 1, self._planned), end):  # others are on their way already
            self._planned = later + 1
            yield Guess(later, self._plan[later])
