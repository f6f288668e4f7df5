"""As many experts as make up most of the weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.routing.base import Call, Routed, Routing

__all__ = ["TopP"]


class TopP(Routing):
    """Keep the smallest n with ``w_1 + ... + w_n >= p`` of a token's weights (XMoE, arXiv
    2403.18926, which trains with it; without training it costs quality for nothing in some models).

    Parameters
    ----------
    p : :class:`float`
        In (0, 1].
    **options
        See :class:`Routing`.
    """

    name = "top-p"

    def __init__(self, *, p: float = 0.8, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < p <= 1:
            raise InvalidOption(f"p must be above 0 and at most 1, not {p!r}")
        self.p = p

    def route(self, call: Call) -> Routed:
        """Return the route up to p."""
        ids = np.where(call.share_before() < self.p - 1e-6, call.ids, -1)
        return Routed(ids, call.weights, before=call.weights)
