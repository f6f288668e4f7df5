"""Light experts are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.routing.base import Call, Routed, Routing

__all__ = ["RelativeThreshold"]


class RelativeThreshold(Routing):
    """Skip slot j iff ``w_j < beta[l] w_1``; the others share its weight (NAEE, arXiv 2402.14800,
    with the median of w_2 / w_1 on some text as beta, so that half of Mixtral's tokens use one
    expert; MC-MoE's ODP, 2410.06270).

    Parameters
    ----------
    beta : :class:`float`, or one for each layer
    **options
        See :class:`Routing`.
    """

    name = "relative-threshold"

    def __init__(self, *, beta: float | Sequence[float] = 0.4, **options: Any) -> None:
        super().__init__(**options)
        values = [beta] if isinstance(beta, int | float) else list(beta)
        if not values or not all(0 <= b <= 1 for b in values):
            raise InvalidOption(f"beta must be 0 to 1, not {beta!r}")
        self._beta = values

    def route(self, call: Call) -> Routed:
        """Return the route without the light slots."""
        beta = self._beta[min(call.layer, len(self._beta) - 1)]
        light = call.weights < beta * call.weights[:, :1]
        ids = np.where(light, -1, call.ids)
        return Routed(ids, call.weights, before=call.weights)
