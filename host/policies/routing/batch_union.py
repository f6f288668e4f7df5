"""A batch makes do with fewer experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.routing.base import Call, Routed, Routing

__all__ = ["BatchUnion"]


class BatchUnion(Routing):
    """Shrink the union of the experts of a decode batch: ``bin = clamp(floor(alpha (logit_e -
    logit_1)), -beta, 0)``, score of an expert ``sum over tokens of tokens^bin``; the `keep` share
    of the union with the highest scores stays, and every token's first; a token's slots outside go
    to its best experts inside (Lynx, arXiv 2411.08982). A call of fewer than two tokens, and a
    prompt, stay as they are.

    Parameters
    ----------
    alpha, beta : :class:`float`
    keep : :class:`float`
        In (0, 1].
    most : :class:`int`
        A call of more tokens is a prompt.
    **options
        See :class:`Routing`.
    """

    name = "batch-union"
    wants_logits = True

    def __init__(self, *, alpha: float = 2.0, beta: float = 4.0, keep: float = 0.7,
                 most: int = 256, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < keep <= 1:
            raise InvalidOption(f"keep must be above 0 and at most 1, not {keep!r}")
        self.alpha, self.beta, self.keep, self.most = alpha, beta, keep, most

    def route(self, call: Call) -> Routed:
        """Return the route inside the smaller union."""
        (tokens, k), logits = call.ids.shape, call.logits
        assert logits is not None
        if not 2 <= tokens <= self.most:
            return Routed(call.ids, call.weights)
        bins = np.clip(np.floor(self.alpha * (logits - logits.max(1, keepdims=True))),
                       -self.beta, 0)
        score = (float(tokens) ** bins).sum(0)
        union = np.unique(call.ids[call.ids >= 0])
        count = max(k, round(len(union) * self.keep))
        inside = np.zeros(logits.shape[1], bool)
        inside[union[(-score[union]).argsort(kind="stable")[:count]]] = True
        inside[call.ids[:, 0]] = True
        rows = np.arange(tokens)[:, None]
        masked = np.where(inside, logits, -np.inf)
        ids = (-masked).argsort(axis=1, kind="stable")[:, :k]
        chosen = masked[rows, ids]
        return Routed(np.where(np.isfinite(chosen), ids, -1), chosen, before=call.weights,
                      logits=True)
