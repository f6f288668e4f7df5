"""A fixed set."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["Pinned"]


class Pinned(Residency):
    """Keep the most popular of a profile, for ever: what a static placement reaches.

    Parameters
    ----------
    popularity : (n_layers, n_experts)
        The highest of each layer are resident from the start.
    slots : :class:`int`
        See :class:`Residency`.
    """

    def __init__(self, *, popularity: np.ndarray, slots: int) -> None:
        super().__init__(n_layers=popularity.shape[0], n_experts=popularity.shape[1], slots=slots)
        self.score[:] = popularity
        best = np.argsort(-self.score, axis=1, kind="stable")[:, :slots]
        np.put_along_axis(self.resident, best, True, 1)

    def _use(self, layers: slice, uses: np.ndarray) -> None:
        pass

    def step(self, uses: np.ndarray, layers: slice = slice(None)) -> np.ndarray:
        """Count hits; see :meth:`Residency.step`."""
        return (uses > 0) & self.resident[layers]
