"""A routing policy in a replay: what its routes do, and how much of the routers' weight is left.

What does not depend on residency is computed for many layers at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeaccel.host.policies.routing import Call, Routing
from moeaccel.host.policies.routing.base import before_of, shares_of, stand_in_logits
from moeaccel.host.traces import Step

__all__ = ["LOW_PRECISION", "Rerouted", "Rerouting"]

LOW_PRECISION = 0.5
"""Bytes of a low-precision copy over those of the image."""

_AT_ONCE = 1 << 20  # logits


class Rerouted(NamedTuple):
    """What a call of a layer becomes.

    Parameters
    ----------
    uses : integer, (n_experts,)
        Tokens of each expert now.
    later : integer, (n_experts,), optional
        Tokens of each expert whose result may come one layer later.
    share : float, (n_experts,), optional
        Bytes over those of the image, where some make do with less.
    """

    uses: np.ndarray
    later: np.ndarray | None = None
    share: np.ndarray | None = None


class Rerouting:
    """The routes of a trace, changed by a policy.

    Parameters
    ----------
    policy : :class:`Routing`
    n_experts : :class:`int`
    random : :class:`numpy.random.Generator`
        Of logits, which traces have not.

    Attributes
    ----------
    mass, kept : :class:`float`
        The routers' weight, and what of it was computed.
    """

    def __init__(self, policy: Routing, n_experts: int, random: np.random.Generator) -> None:
        self.policy = policy
        self._experts, self._random = n_experts, random
        self.mass = self.kept = 0.0

    def begin_pass(self, step: Step) -> None:
        """Look at all layers of a forward pass."""
        ids = np.ascontiguousarray(step.ids.swapaxes(0, 1))
        self._ids = ids
        self._weights = (np.full(ids.shape, 1 / ids.shape[2], np.float32) if step.weights is None
                         else np.ascontiguousarray(step.weights.swapaxes(0, 1), np.float32))
        self._shares = shares_of(self._weights)
        self._before = before_of(self._shares)
        self._found = np.full_like(ids, -1)
        self._first = 0
        self._nowhere = np.zeros(self._experts, bool)
        self._per_block = len(ids)
        self._logits: np.ndarray | None = None
        if self.policy.wants_logits:
            self._per_block = max(1, _AT_ONCE // (ids.shape[1] * self._experts))

    def route(self, layer: int, resident: np.ndarray | None, uses: np.ndarray) -> Rerouted:
        """Return what the policy makes of a layer's call; layers in their order.

        Parameters
        ----------
        layer : :class:`int`
        resident : bool, (n_experts,), optional
        uses : integer, (n_experts,)
            Tokens of each expert, as the route was.
        """
        if layer % self._per_block == 0:
            self._end_block(layer)
        ids = self._ids[layer]
        logits = None if self._logits is None else self._logits[layer - self._first]
        here = self._nowhere if resident is None else resident
        routed = self.policy.route(
            Call(layer, ids, self._weights[layer], here, logits, self._shares[layer],
                 self._before[layer]))
        found = self._found[layer] = routed.ids
        later = share = None
        if routed.later is not None and np.count_nonzero(routed.later):
            later = np.bincount(found[routed.later], minlength=self._experts)
            found = np.where(routed.later, -1, found)
        if found is not ids:
            uses = np.bincount(found[found >= 0], minlength=self._experts)
        if routed.low is not None and np.count_nonzero(routed.low):
            high = np.bincount(found[(found >= 0) & ~routed.low], minlength=self._experts)
            share = np.where(high > 0, 1.0, LOW_PRECISION)
        return Rerouted(uses, later, share)

    def end_pass(self) -> None:
        """Weigh what was computed."""
        self._end_block(len(self._ids))

    def _end_block(self, end: int) -> None:
        """Weigh the layers since the last block, and make the logits of the next."""
        part = slice(self._first, end)
        ids, weights, found = self._ids[part], self._weights[part], self._found[part]
        if ids.size:
            self.mass += float(weights[ids >= 0].sum())
            if self._logits is None:
                self.kept += float(weights[found >= 0].sum())
            else:
                chosen, before = (
                    np.where(some >= 0, np.exp(np.take_along_axis(self._logits, some, 2)), 0).sum(2)
                    for some in (found, ids))
                share = np.divide(chosen, before, out=np.zeros_like(chosen), where=before > 0)
                given = np.where(ids >= 0, weights, 0).sum(2)  # 0 without a route
                self.kept += float((given * np.minimum(1, share)).sum())
        self._first = end
        if self.policy.wants_logits and end < len(self._ids):
            ids = self._ids[end : end + self._per_block]
            k = ids.shape[2]
            self._logits = stand_in_logits(
                ids.reshape(-1, k), self._weights[end : end + self._per_block].reshape(-1, k),
                self._experts, self._random).reshape(*ids.shape[:2], self._experts)
