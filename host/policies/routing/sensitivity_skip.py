"""Experts are skipped where a layer does not mind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.routing.base import Call, Routed, Routing

__all__ = ["SensitivitySkip"]


class SensitivitySkip(Routing):
    """Skip slot j > 1 iff ``H[l] (top_k w_j)^2 < threshold``, H the sensitivity of the layer
    (AdapMoE, arXiv 2408.10284). Without measured sensitivities H falls from 1 at the first layer to
    `last` at the last: early layers must not be touched, of late ones nearly all can be.

    Parameters
    ----------
    threshold : :class:`float`
    sensitivity : sequence of :class:`float`, optional
        Of each layer.
    last : :class:`float`
    **options
        See :class:`Routing`.
    """

    name = "sensitivity-skip"

    def __init__(self, *, threshold: float = 0.05, sensitivity: Sequence[float] | None = None,
                 last: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        if threshold < 0:
            raise InvalidOption(f"threshold must be at least 0, not {threshold!r}")
        self.threshold = threshold
        self.sensitivity = (list(sensitivity) if sensitivity is not None
                            else np.geomspace(1, last, self.n_layers).tolist())

    def route(self, call: Call) -> Routed:
        """Return the route without what the layer does not mind."""
        shares = call.share()
        light = self.sensitivity[call.layer] * (shares * shares.shape[1]) ** 2 < self.threshold
        light[:, 0] = False
        ids = np.where(light, -1, call.ids)
        return Routed(ids, call.weights, before=call.weights)
