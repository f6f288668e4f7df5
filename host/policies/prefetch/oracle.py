"""The bound: routes as they will be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moeaccel.host.policies.prefetch.base import Ahead, Guess, Prefetch

__all__ = ["Oracle"]


class Oracle(Prefetch):
    """Know the routes of the next layers. Not a policy but what a perfect one would reach: no
    schedule moves bytes faster than the link.

    Parameters
    ----------
    depth : :class:`int`
        Layers ahead.
    **options
        See :class:`Prefetch`.
    """

    name = "oracle"

    def __init__(self, *, depth: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.depth = depth

    def guess(self, layer: int, uses: np.ndarray, ahead: Ahead) -> Iterator[Guess]:
        """Yield the true routes; see :meth:`Prefetch.guess`."""
        if ahead.uses is None:
            return
        for later in range(layer + 1, min(layer + 1 + self.depth, self.n_layers)):
            yield Guess(later, ahead.busiest(later))
