"""Frequency that forgets."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.residency.base import Residency

__all__ = ["DECAY", "WORTH_MAX", "DecayedLFU"]

DECAY = 0.95
"""What a step leaves of a score, by default."""

WORTH_MAX = 2.0**20
"""Of a step's worth, from where on the scores of a layer are divided by it: they stay below what
sets the experts of a step above all others."""


class DecayedLFU(Residency):
    """Keep what was used most of late: ``score = decay * score + tokens of the step``.

    With decay 0 this is LRU of depth one, with decay 1 it is :class:`LFU`. The best of the causal
    policies on traces of DeepSeek-V2-Lite, with the default. Scores are kept relative to what a
    step is worth, which grows in the place of every score's getting less.

    Parameters
    ----------
    decay : :class:`float`
        What a step leaves of the score, in [0, 1].
    **options
        See :class:`Residency`.
    """

    name = "decayed-lfu"

    def __init__(self, *, decay: float = DECAY, **options: Any) -> None:
        if not 0 <= decay <= 1:
            raise InvalidOption(f"decay must be 0 to 1, not {decay!r}")
        super().__init__(**options)
        self.decay = decay
        self._worth = [1.0] * len(self.score)

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        score = self.score[layer]
        if not self.decay:
            score[:] = uses
            return
        worth = self._worth[layer] / self.decay
        if worth > WORTH_MAX:
            score /= worth
            worth = 1.0
        self._worth[layer] = worth
        score += uses * worth
