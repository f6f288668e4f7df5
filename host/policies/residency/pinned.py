"""A fixed set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["Pinned"]


class Pinned(Residency):
    """Keep the most popular of a profile, for ever: what a static placement reaches.

    Parameters
    ----------
    popularity : (n_layers, n_experts)
        The highest of each layer are resident from the start.
    slots : :class:`int`, or one for each layer
        See :class:`Residency`.
    """

    name = "pinned"

    def __init__(self, *, popularity: np.ndarray, slots: int | Sequence[int]) -> None:
        super().__init__(n_layers=popularity.shape[0], n_experts=popularity.shape[1], slots=slots)
        self.score[:] = popularity
        order = np.argsort(-self.score, axis=1, kind="stable")
        for row, best, count in zip(self.resident, order, self.slots, strict=True):
            row[best[:count]] = True

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        pass

    def use(self, layer: int, uses: np.ndarray, *, mass: np.ndarray | None = None,
            arrived: np.ndarray | None = None, room: int | None = None) -> np.ndarray:
        """Let nothing in; see :meth:`Residency.use`."""
        return np.zeros(0, np.int64)
