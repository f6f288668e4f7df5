"""Our own: guided by the prompt, then promoted one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.policies.costs import LayerCosts
from moeaccel.host.policies.residency.decayed_lfu import DecayedLFU
from moeaccel.host.policies.residency.pinned import Pinned

__all__ = ["Promoted"]

_KNOWN = 8.0  # tokens that the most popular expert of a profile counts for


class Promoted(DecayedLFU):
    """Decayed LFU that lets an expert in only where it pays: the newcomer's score must be `margin`
    times that of the resident whose place it takes, best newcomers first, as many as there is room
    for on the link. A prompt is one call with many tokens, so that what it used most comes in
    behind it and fades as the answer goes on. Where images come from the cards, a move keeps their
    memory as busy as one use of the expert does, so that a newcomer that is a little better does
    not pay: there the margin is 2, and the score forgets more slowly.

    It may begin with the most popular of a profile, as a static set does, and goes on from there.

    A prompt of T tokens counts as ``prompt`` tokens at most: else long ones would never fade.

    Parameters
    ----------
    decay, margin : :class:`float`
    prompt : :class:`float`
        Most tokens that a call counts for.
    popularity : (n_layers, n_experts), optional
        The highest of each layer are resident from the start.
    **options
        See :class:`DecayedLFU`.
    """

    name = "promoted"
    bypass = True

    def __init__(self, *, decay: float = 0.97, margin: float = 1.2, prompt: float = 64.0,
                 popularity: np.ndarray | None = None, **options: Any) -> None:
        super().__init__(decay=decay, margin=margin, **options)
        self._prompt = prompt
        if popularity is not None:
            self.score[:] = popularity * (_KNOWN / max(1, popularity.max()))
            self.resident |= Pinned(popularity=popularity, slots=self.slots).resident

    @classmethod
    def fitting(cls, costs: LayerCosts) -> dict[str, Any]:
        """Return decay and margin; see :class:`Promoted`."""
        return {"margin": 2.0, "decay": 0.99} if costs.contend else {}

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        top = uses[uses.argmax()]  # quicker than max() for so few
        super()._use(layer, uses * (self._prompt / top) if top > self._prompt else uses, used, mass)
