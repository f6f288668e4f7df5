"""Only residents."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.routing.base import Call, Routed, Routing

__all__ = ["ResidentOnly"]


class ResidentOnly(Routing):
    """Route among the residents, and let residency refresh the set slowly by the experts'
    importance (SwapMoE, arXiv 2308.15030: virtual experts; memory becomes a knob). Nothing is
    missed, by construction; what is lost is the weight of what the router would have chosen.
    Without a resident the route stays.
    """

    name = "resident-only"
    wants_logits = True
    within_residents = True

    def route(self, call: Call) -> Routed:
        """Return the best route among the residents."""
        logits, (tokens, k) = call.logits, call.ids.shape
        assert logits is not None
        if not call.resident.any():
            return Routed(call.ids, call.weights)
        masked = np.where(call.resident, logits, -np.inf)
        ids = np.argpartition(-masked, k - 1, axis=1)[:, :k] if k < masked.shape[1] else (
            np.broadcast_to(np.arange(k), (tokens, k)))
        rows = np.arange(tokens)[:, None]
        order = (-masked[rows, ids]).argsort(axis=1, kind="stable")
        ids = ids[rows, order]
        chosen = masked[rows, ids]
        ids = np.where(np.isfinite(chosen), ids, -1)
        return Routed(ids, chosen, before=call.weights, logits=True)
