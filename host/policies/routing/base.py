"""What changes of routes have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

__all__ = ["Call", "Routed", "Routing", "stand_in_logits"]


class Call(NamedTuple):
    """What the router said.

    Parameters
    ----------
    layer : :class:`int`
    ids : integer, (tokens, top_k)
        Best first; -1: slot not used.
    weights : float32, (tokens, top_k)
    resident : bool, (n_experts,)
    logits : float32, (tokens, n_experts), optional
        Where the policy wants them, see :attr:`Routing.wants_logits`.
    shares, before : float32, (tokens, top_k), optional
        :func:`shares_of` the weights, and of the slots before each, where they are known.
    """

    layer: int
    ids: np.ndarray
    weights: np.ndarray
    resident: np.ndarray
    logits: np.ndarray | None = None
    shares: np.ndarray | None = None
    before: np.ndarray | None = None

    def share_before(self) -> np.ndarray:
        """Return the share of a token's weight that the slots before each have."""
        return before_of(self.share()) if self.before is None else self.before

    def share(self) -> np.ndarray:
        """Return the shares of a token's weight."""
        return shares_of(self.weights) if self.shares is None else self.shares


class Routed:
    """What is done in its place.

    Parameters
    ----------
    ids : integer, (tokens, top_k)
        As in :class:`Call`.
    given : float, (tokens, top_k)
        Weights, or with ``logits`` what they are the exponentials of.
    before : float, (tokens, top_k), optional
        Weights whose sum is a token's sum still; as given when left out.
    logits : :class:`bool`
    low : bool, (tokens, top_k), optional
        Slots that make do with the low-precision copy of an expert.
    later : bool, (tokens, top_k), optional
        Slots whose result may come one layer later.
    """

    __slots__ = ("_before", "_given", "_logits", "ids", "later", "low")

    def __init__(self, ids: np.ndarray, given: np.ndarray, *, before: np.ndarray | None = None,
                 logits: bool = False, low: np.ndarray | None = None,
                 later: np.ndarray | None = None) -> None:
        self.ids, self.low, self.later = ids, low, later
        self._given, self._before, self._logits = given, before, logits

    @property
    def weights(self) -> np.ndarray:
        """Of each slot, float (tokens, top_k): computed when they are asked for, which a replay
        does not."""
        given = self._given
        if self._logits:
            given = np.exp(np.where(self.ids >= 0, given - given[:, :1], -np.inf))
        return given if self._before is None else renormalised(self.ids, given, self._before)


class Routing(ABC):
    """A change of routes.

    Parameters
    ----------
    n_layers : :class:`int`

    Attributes
    ----------
    wants_logits : :class:`bool`
        Whether it needs the logits of all experts.
    within_residents : :class:`bool`
        Whether it routes among residents only, so that residency has to see the routes before.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    wants_logits: ClassVar[bool] = False
    within_residents: ClassVar[bool] = False

    def __init__(self, *, n_layers: int = 1) -> None:
        self.n_layers = n_layers

    @abstractmethod
    def route(self, call: Call) -> Routed:
        """Return the route to take."""


def shares_of(weights: np.ndarray) -> np.ndarray:
    """Return each slot's share of the weights of its token, along the last axis."""
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9)


def before_of(shares: np.ndarray) -> np.ndarray:
    """Return the sums of the shares of the slots before each, along the last axis."""
    return shares.cumsum(-1) - shares


def renormalised(ids: np.ndarray, weights: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the weights of the slots that are left, a token's sum as it was before."""
    weights = np.where(ids >= 0, weights, 0)
    sums = weights.sum(1, keepdims=True)
    return weights * (before.sum(1, keepdims=True) / np.where(sums > 0, sums, 1))


def stand_in_logits(ids: np.ndarray, weights: np.ndarray, n_experts: int,
                    random: np.random.Generator) -> np.ndarray:
    """Return logits that give a route, for traces, which hold no others: those of the route are the
    logarithms of its weights; the others lie below the last of them, one after the other as far
    apart as the route's own are in the mean, in random order.

    Returns
    -------
    :class:`numpy.ndarray` of float32, (tokens, n_experts)
    """
    tokens, k = ids.shape
    top = np.log(np.maximum(weights, 1e-9))
    last = top.min(1, keepdims=True)
    gap = (top.max(1, keepdims=True) - last) / max(1, k - 1)
    logits = random.random((tokens, n_experts), np.float32)
    logits *= gap * (-n_experts / 4)
    logits += last - 1e-3
    rows = np.arange(tokens)[:, None]
    if ids.min() < 0:  # an unused slot says what the first does, and is written before it
        ids, top = np.where(ids < 0, ids[:, :1], ids)[:, ::-1], np.where(
            ids < 0, top[:, :1], top)[:, ::-1]
    logits[rows, ids] = top
    return logits
