"""What prefetch policies have in common."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

__all__ = ["Ahead", "Guess", "Prefetch", "best", "blurred", "busiest"]


_NOTHING = np.zeros(0, np.int64)


class Ahead(NamedTuple):
    """What may be known before the router of a layer has run.

    Parameters
    ----------
    uses : callable, optional
        In a replay: how many tokens each expert of a layer will have, integer (n_experts,). What
        stands in for a predictor of published accuracy, and what an oracle knows.
    experts : callable, optional
        In a replay: what :func:`busiest` returns of these, quicker.
    hidden : :class:`numpy.ndarray`, optional
        In a model: the states that the layer at hand gets, (tokens, d_model).
    """

    uses: Callable[[int], np.ndarray] | None = None
    hidden: np.ndarray | None = None
    experts: Callable[[int], np.ndarray] | None = None

    def busiest(self, layer: int) -> np.ndarray:
        """Return the experts of a layer's route, busiest first; of a replay."""
        if self.experts is not None:
            return self.experts(layer)
        assert self.uses is not None
        return busiest(self.uses(layer))


class Guess(NamedTuple):
    """Experts of a layer, the likeliest first."""

    layer: int
    experts: np.ndarray


class Prefetch(ABC):
    """What to move early.

    Parameters
    ----------
    n_layers, n_experts, top_k : :class:`int`
    seed : :class:`int`
        Of stand-ins for predictors.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    """Whether routes stay what they are; a predictor that takes the router's place changes them."""

    def __init__(self, *, n_layers: int, n_experts: int, top_k: int, seed: int = 0) -> None:
        self.n_layers, self.n_experts, self.top_k = n_layers, n_experts, top_k
        self.random = np.random.default_rng(seed)

    def begin_pass(self, *, new_request: bool) -> None:
        """Hear that a forward pass begins, and whether a request begins with it."""
        return

    @abstractmethod
    def guess(self, layer: int, uses: np.ndarray, ahead: Ahead) -> Iterable[Guess]:
        """Return what to move while a layer is computed, the most urgent layer first; those behind
        it may be left unasked for.

        Parameters
        ----------
        layer : :class:`int`
            The layer whose route has just become known.
        uses : integer, (n_experts,)
            Its tokens for each expert.
        ahead : :class:`Ahead`
        """


def best(score: np.ndarray, count: int | None = None) -> np.ndarray:
    """Return the experts with the highest scores, highest first: so many, or all that are not 0."""
    count = min(int(np.count_nonzero(score)) if count is None else count, len(score))
    if not count:
        return _NOTHING
    places = score.argpartition(len(score) - count)[len(score) - count :]
    return places[(-score[places]).argsort(kind="stable")]


def busiest(uses: np.ndarray) -> np.ndarray:
    """Return the experts that are used, those with the most tokens first."""
    experts = uses.nonzero()[0]
    return experts[(-uses[experts]).argsort(kind="stable")]


def blurred(routes: Sequence[np.ndarray], n_experts: int, accuracy: float,
            random: np.random.Generator) -> list[np.ndarray]:
    """Return what a predictor of some accuracy would say of layers: the experts of their routes,
    each replaced by any other with the chance that the accuracy leaves."""
    flat = np.concatenate(routes)
    wrong = random.random(len(flat)) >= accuracy
    found = np.where(wrong, random.integers(0, n_experts, len(flat)), flat)
    ends = itertools.accumulate((len(route) for route in routes), initial=0)
    return [found[begin:end] for begin, end in itertools.pairwise(ends)]  # np.split is slow
