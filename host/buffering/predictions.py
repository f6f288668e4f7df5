"""Which experts the next layer will use, told when the route of this one is known.

Layers form a ring: behind the last one comes the first one of the next pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from moeaccel.host.policies.prefetch.base import Ahead, best
from moeaccel.host.policies.prefetch.transition_table import TransitionTable
from moeaccel.host.policies.registry import lookup

__all__ = ["PREDICTIONS", "Circular", "Oracle", "Popularity", "PreviousToken", "Prediction",
           "Transitions", "prediction"]

_NOTHING = np.zeros(0, np.int64)


def _likeliest(score: np.ndarray, most: int) -> np.ndarray:
    """Return the experts with the highest scores above 0, highest first, at most so many."""
    count = min(most, int(np.count_nonzero(score)))
    return best(score, count) if count else _NOTHING


class Prediction(ABC):
    """A way to predict.

    Parameters
    ----------
    n_layers, n_experts, top_k : :class:`int`
    """

    name: ClassVar[str]

    def __init__(self, *, n_layers: int, n_experts: int, top_k: int) -> None:
        self.n_layers, self.n_experts, self.top_k = n_layers, n_experts, top_k

    def begin_pass(self, *, new_request: bool) -> None:
        """Hear that a forward pass begins, and whether a request begins with it."""
        return

    @abstractmethod
    def following(self, layer: int, uses: np.ndarray, truth: Callable[[], np.ndarray] | None
                  ) -> np.ndarray:
        """Return experts of the layer behind ``layer`` in the ring, the likeliest first.

        Parameters
        ----------
        layer : :class:`int`
            Its route has just become known.
        uses : integer, (n_experts,)
            Its tokens for each expert.
        truth : callable, optional
            What the next layer will have, for an oracle; None at the end of the trace.
        """


class Circular(Prediction):
    """Count along the paths which experts follow which, around the ring of layers: ``score_j = sum
    over i in the route of P(j | i)``.

    After FLAME's circular expert prediction (DAC 2024), of which is published that it predicts from
    the path of activated experts, not only from one layer to the next, and loads into two caches on
    the chip. How is not published: that the ring closes from the last layer to the next token's
    first is our reading.
    """

    name = "circular"

    def __init__(self, *, n_layers: int, n_experts: int, top_k: int) -> None:
        super().__init__(n_layers=n_layers, n_experts=n_experts, top_k=top_k)
        self._follows = np.zeros((n_layers, n_experts, n_experts), np.float32)
        self._came = np.zeros((n_layers, n_experts), np.float32)
        self._before: tuple[int, np.ndarray] | None = None

    def begin_pass(self, *, new_request: bool) -> None:
        """Forget the path where a request begins."""
        if new_request:
            self._before = None

    def following(self, layer: int, uses: np.ndarray, truth: Callable[[], np.ndarray] | None
                  ) -> np.ndarray:
        """Return those that followed most often; see :meth:`Prediction.following`."""
        experts = uses.nonzero()[0]
        if self._before is not None:
            at, route = self._before
            self._follows[at][route[:, None], experts] += 1
            self._came[at, route] += 1
        self._before = layer, experts
        share = self._follows[layer, experts] / np.maximum(self._came[layer, experts], 1)[:, None]
        return _likeliest(share.sum(0), len(experts))


class Transitions(Prediction):
    """:class:`~moeaccel.host.policies.prefetch.transition_table.TransitionTable`, as hosts prefetch
    with it: log-likelihoods, and nothing behind the last layer."""

    name = "transition-table"

    def __init__(self, *, n_layers: int, n_experts: int, top_k: int) -> None:
        super().__init__(n_layers=n_layers, n_experts=n_experts, top_k=top_k)
        self._table = TransitionTable(n_layers=n_layers, n_experts=n_experts, top_k=top_k)

    def begin_pass(self, *, new_request: bool) -> None:
        """See :meth:`Prediction.begin_pass`."""
        self._table.begin_pass(new_request=new_request)

    def following(self, layer: int, uses: np.ndarray, truth: Callable[[], np.ndarray] | None
                  ) -> np.ndarray:
        """Return the table's guess; see :meth:`Prediction.following`."""
        guesses = self._table.guess(layer, uses, Ahead())
        return guesses[0].experts if guesses else _NOTHING


class PreviousToken(Prediction):
    """Every layer uses what it used in the pass before."""

    name = "previous-token"

    def __init__(self, *, n_layers: int, n_experts: int, top_k: int) -> None:
        super().__init__(n_layers=n_layers, n_experts=n_experts, top_k=top_k)
        self._last = np.zeros((n_layers, n_experts), np.int64)

    def following(self, layer: int, uses: np.ndarray, truth: Callable[[], np.ndarray] | None
                  ) -> np.ndarray:
        """Return the last route; see :meth:`Prediction.following`."""
        self._last[layer] = uses
        return _likeliest(self._last[(layer + 1) % self.n_layers], self.n_experts)


class Popularity(Prediction):
    """Every layer uses what it has used most often so far."""

    name = "popularity"

    def __init__(self, *, n_layers: int, n_experts: int, top_k: int) -> None:
        super().__init__(n_layers=n_layers, n_experts=n_experts, top_k=top_k)
        self._counts = np.zeros((n_layers, n_experts), np.int64)

    def following(self, layer: int, uses: np.ndarray, truth: Callable[[], np.ndarray] | None
                  ) -> np.ndarray:
        """Return the most popular; see :meth:`Prediction.following`."""
        self._counts[layer] += uses
        return _likeliest(self._counts[(layer + 1) % self.n_layers], int(np.count_nonzero(uses)))


class Oracle(Prediction):
    """Know the next route: the bound."""

    name = "oracle"

    def following(self, layer: int, uses: np.ndarray, truth: Callable[[], np.ndarray] | None
                  ) -> np.ndarray:
        """Return what will be; see :meth:`Prediction.following`."""
        return _NOTHING if truth is None else _likeliest(truth(), self.n_experts)


PREDICTIONS: dict[str, type[Prediction]] = {
    each.name: each for each in (Circular, Transitions, PreviousToken, Popularity, Oracle)}
"""All by name."""


def prediction(name: str) -> type[Prediction]:
    """Return the prediction of that name.

    Raises
    ------
    UnknownPolicy
        If there is none.
    """
    return lookup("prediction", PREDICTIONS, name)
