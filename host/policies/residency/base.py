"""What residency policies have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moeaccel.host.errors import InvalidOption

__all__ = ["Replay", "Residency", "replay"]

_ABOVE_ALL = 2.0**40  # above every score, and far enough below 2^53 to leave their order


class Residency(ABC):
    """A cache of experts for each layer.

    Caches are per layer: one cache for all layers, used in the order of layers, holds nothing that
    comes soon unless it holds a whole token's experts.

    Parameters
    ----------
    n_layers, n_experts : :class:`int`
    slots : :class:`int`
        Experts of each layer that can be resident; at most ``n_experts``.

    Attributes
    ----------
    resident : :class:`numpy.ndarray` of bool, (n_layers, n_experts)
    score : :class:`numpy.ndarray` of float64, (n_layers, n_experts)
        The experts with the highest stay.

    Raises
    ------
    InvalidOption
        If a size is out of range.
    """

    bypass: bool = False
    """Whether an expert may be used without becoming resident; else what a step used stays."""

    def __init__(self, *, n_layers: int, n_experts: int, slots: int) -> None:
        if n_layers < 1 or n_experts < 1:
            raise InvalidOption("a residency policy must have layers and experts, not "
                                f"{n_layers} and {n_experts}")
        if not 0 <= slots <= n_experts:
            raise InvalidOption(f"slots must be 0 to the {n_experts} experts of a layer, "
                                f"not {slots}")
        self.slots = slots
        self.resident = np.zeros((n_layers, n_experts), bool)
        self.score = np.zeros((n_layers, n_experts))

    @abstractmethod
    def _use(self, layers: slice, uses: np.ndarray) -> None:
        """Bring the scores of some layers up to date; ``uses`` as in :meth:`step`."""

    def step(self, uses: np.ndarray, layers: slice = slice(None)) -> np.ndarray:
        """Use experts, and let them in.

        Parameters
        ----------
        uses : integer, (layers, n_experts)
            Tokens of the step that each expert has.
        layers : :class:`slice`
            The layers that ``uses`` is about; all when left out.

        Returns
        -------
        :class:`numpy.ndarray` of bool, like ``uses``
            Experts that were used and were resident before.
        """
        used = uses > 0
        before = self.resident[layers]
        hit = used & before
        self._use(layers, uses)
        score = self.score[layers]
        if not self.bypass:
            score = np.where(used, score + _ABOVE_ALL, score)
        score = np.where(used | before, score, -np.inf)
        resident = used | before
        if leave := score.shape[1] - self.slots:
            worst = np.argpartition(score, leave - 1, axis=1)[:, :leave]
            np.put_along_axis(resident, worst, False, 1)
        self.resident[layers] = resident
        return hit


@dataclass(frozen=True)
class Replay:
    """What a sequence of steps found.

    Parameters
    ----------
    hits, uses, admissions : :class:`numpy.ndarray` of int64, (n_layers,)
        Experts that were used and resident; that were used; that became resident. An expert counts
        once a step, however many tokens it has.
    """

    hits: np.ndarray
    uses: np.ndarray
    admissions: np.ndarray

    @property
    def hit_rate(self) -> float:
        """Hits over uses, over all layers; 0 without uses."""
        uses = int(self.uses.sum())
        return float(self.hits.sum() / uses) if uses else 0.0


def replay(policy: Residency, steps: Iterable[np.ndarray]) -> Replay:
    """Send steps through a policy.

    Parameters
    ----------
    policy : :class:`Residency`
    steps : iterable of integer (n_layers, n_experts)
        Tokens that each expert has; see :meth:`RoutingTrace.uses`.
    """
    hits, used, admissions = (np.zeros(len(policy.resident), np.int64) for _ in range(3))
    for uses in steps:
        before = policy.resident.copy()
        hits += policy.step(uses).sum(1)
        used += (uses > 0).sum(1)
        admissions += (policy.resident & ~before).sum(1)
    return Replay(hits, used, admissions)
