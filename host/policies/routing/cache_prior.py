"""Residents are preferred."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.routing.base import Call, Routed, Routing

__all__ = ["CachePrior"]


class CachePrior(Routing):
    """Order by ``r + strength * D[l] * resident``, D the running mean of a token's ``max r - min
    r`` in the layer, always keep the router's first `keep`, and take the weights from r (Mixture of
    Cache-Conditional Experts, arXiv 2412.00099).

    Parameters
    ----------
    strength : :class:`float`
    keep : :class:`int`
        J, 1 or 2.
    **options
        See :class:`Routing`.
    """

    name = "cache-prior"
    wants_logits = True

    def __init__(self, *, strength: float = 0.3, keep: int = 1, **options: Any) -> None:
        super().__init__(**options)
        if strength < 0 or keep < 0:
            raise InvalidOption(f"strength and keep must be at least 0, not {strength!r} and "
                                f"{keep!r}")
        self.strength, self.keep = strength, keep
        self._spread: dict[int, tuple[float, int]] = {}

    def route(self, call: Call) -> Routed:
        """Return the route that residents pull towards them."""
        logits, (tokens, k) = call.logits, call.ids.shape
        assert logits is not None
        mean, count = self._spread.get(call.layer, (0.0, 0))
        found = float((logits.max(1) - logits.min(1)).sum())
        count += tokens
        mean += (found - mean * tokens) / count
        self._spread[call.layer] = mean, count
        pulled = logits + (self.strength * mean) * call.resident.astype(np.float32)
        first = call.ids[:, : self.keep]
        rows = np.arange(tokens)[:, None]
        pulled[rows, first] = np.inf
        ids = np.argpartition(pulled, -k, axis=1)[:, -k:]
        chosen = logits[rows, ids]
        order = (-chosen).argsort(axis=1, kind="stable")
        ids, chosen = ids[rows, order], chosen[rows, order]
        return Routed(ids, chosen, before=call.weights, logits=True)
