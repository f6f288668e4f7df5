"""Frequency that forgets."""

from __future__ import annotations

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.residency.base import Residency

__all__ = ["DecayedLFU"]


class DecayedLFU(Residency):
    """Keep what was used most of late: ``score = decay * score + tokens of the step``.

    With decay 0 this is LRU of depth one, with decay 1 it is :class:`LFU`. The best of the causal
    policies on traces of DeepSeek-V2-Lite, with the default.

    Parameters
    ----------
    n_layers, n_experts, slots : :class:`int`
        See :class:`Residency`.
    decay : :class:`float`
        What a step leaves of the score, in [0, 1].
    """

    def __init__(self, *, n_layers: int, n_experts: int, slots: int, decay: float = 0.95) -> None:
        if not 0 <= decay <= 1:
            raise InvalidOption(f"decay must be 0 to 1, not {decay!r}")
        super().__init__(n_layers=n_layers, n_experts=n_experts, slots=slots)
        self.decay = decay

    def _use(self, layers: slice, uses: np.ndarray) -> None:
        self.score[layers] *= self.decay
        self.score[layers] += uses
