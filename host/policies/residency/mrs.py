"""Minus recent score."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.residency.base import Residency

__all__ = ["MRS"]


class MRS(Residency):
    """Keep what the router has liked of late: ``S <- a TopP(s) + (1 - a) S``, where s are the
    router's weights of the step and TopP leaves those of the p best, 0 for the others (HybriMoE,
    arXiv 2504.05897, with a = 0.5 and p = 2 top_k). A trace holds the weights of the top_k only.

    Parameters
    ----------
    rate : :class:`float`
        a, in (0, 1].
    **options
        See :class:`Residency`.
    """

    name = "mrs"
    wants_mass = True

    def __init__(self, *, rate: float = 0.5, **options: Any) -> None:
        if not 0 < rate <= 1:
            raise InvalidOption(f"rate must be above 0 and at most 1, not {rate!r}")
        super().__init__(**options)
        self.rate = rate

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        score = self.score[layer]
        score *= 1 - self.rate
        score += (uses if mass is None else mass) * self.rate
