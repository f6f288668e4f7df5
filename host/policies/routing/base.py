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
    """

    layer: int
    ids: np.ndarray
    weights: np.ndarray
    resident: np.ndarray
    logits: np.ndarray | None = None


class Routed(NamedTuple):
    """What is done in its place.

    Parameters
    ----------
    ids, weights
        As in :class:`Call`.
    low : bool, (tokens, top_k), optional
        Slots that make do with the low-precision copy of an expert.
    later : bool, (tokens, top_k), optional
        Slots whose result may come one layer later.
    """

    ids: np.ndarray
    weights: np.ndarray
    low: np.ndarray | None = None
    later: np.ndarray | None = None


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
