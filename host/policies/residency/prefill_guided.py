"""What the prompt used."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["PrefillGuided"]


class PrefillGuided(Residency):
    """Keep the experts that the prompt used most, exchanged once, behind the prompt: a hot one
    outside takes the place of a cold resident iff ``count_hot > margin * count_cold``; in decoding
    nothing moves.

    DAOP (arXiv 2501.10375) with margin 1.05; with margin 1 the top experts by count, which is the
    choice of "Context-Aware MoE Inference on CXL-Enabled GPU-NDP Systems" (arXiv 2512.04476) with
    all weight on frequency. A prompt is a call of at least `tokens` tokens.

    Parameters
    ----------
    tokens : :class:`int`
        A call of fewer is no prompt.
    margin : :class:`float`
    **options
        See :class:`Residency`.
    """

    name = "prefill-guided"
    bypass = True
    at_once = True

    def __init__(self, *, tokens: int = 16, margin: float = 1.05, **options: Any) -> None:
        super().__init__(margin=margin, **options)
        self._tokens = tokens

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        self.score[layer] = uses

    def use(self, layer: int, uses: np.ndarray, *, mass: np.ndarray | None = None,
            arrived: np.ndarray | None = None, room: int | None = None) -> np.ndarray:
        """Exchange behind a prompt; see :meth:`Residency.use`."""
        # An expert is in a call of so many tokens at most so many times.
        if uses.max() < 2 or np.count_nonzero(uses) == 0 or uses.sum() < self._tokens:
            return np.zeros(0, np.int64)
        return super().use(layer, uses, mass=mass, arrived=arrived, room=room)
