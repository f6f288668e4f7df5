"""What residency policies have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.costs import LayerCosts

__all__ = ["ABOVE_ALL", "Replay", "Residency", "SecondMiss", "replay"]

ABOVE_ALL = 2.0**40
"""Above every score, and far enough below 2^53 to leave their order."""
_NOTHING = np.zeros(0, np.int64)


class Residency(ABC):
    """A cache of experts for each layer.

    A policy is a score for each expert of each layer, and one rule: after a call the experts with
    the highest score stay. Caches are per layer: one cache for all layers, used in the order of
    layers, holds nothing that comes soon unless it holds a whole token's experts.

    Parameters
    ----------
    n_layers, n_experts : :class:`int`
    slots : :class:`int`, or one for each layer
        Experts of each layer that can be resident; at most ``n_experts``.
    margin : :class:`float`
        A newcomer takes the place of a resident only if its score is more than so many times the
        resident's; for policies that may refuse newcomers.
    admission : :class:`SecondMiss`, optional
        Who may come in at all.

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

    name: ClassVar[str]
    bypass: ClassVar[bool] = False
    """Whether an expert may be used without becoming resident; else what a call used stays."""
    at_once: ClassVar[bool] = False
    """Whether its newcomers come all together, however many, and not as the link has time."""
    wants_mass: ClassVar[bool] = False
    """Whether scores are of routing weights, and not of counts."""

    def __init__(self, *, n_layers: int, n_experts: int, slots: int | Sequence[int],
                 margin: float = 1.0, admission: SecondMiss | None = None) -> None:
        if n_layers < 1 or n_experts < 1:
            raise InvalidOption("a residency policy must have layers and experts, not "
                                f"{n_layers} and {n_experts}")
        of_layers = [slots] * n_layers if isinstance(slots, int) else list(slots)
        if len(of_layers) != n_layers:
            raise InvalidOption(f"slots must be one number, or one for each of {n_layers} layers, "
                                f"not {len(of_layers)}")
        for count in of_layers:
            if not 0 <= count <= n_experts:
                raise InvalidOption(f"slots must be 0 to the {n_experts} experts of a layer, "
                                    f"not {count}")
        if margin < 1:
            raise InvalidOption(f"margin must be at least 1, not {margin!r}")
        self.slots, self.margin, self.admission = of_layers, margin, admission
        self.resident = np.zeros((n_layers, n_experts), bool)
        self.score = np.zeros((n_layers, n_experts))

    @classmethod
    def fitting(cls, costs: LayerCosts) -> dict[str, Any]:
        """Return options that fit what moves cost."""
        del costs
        return {}

    @abstractmethod
    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        """Bring the scores of a layer up to date; see :meth:`use`, ``used = uses > 0``."""

    def begin_request(self) -> None:
        """Hear that a request begins, which most policies do not mind."""
        return

    def use(self, layer: int, uses: np.ndarray, *, mass: np.ndarray | None = None,
            arrived: np.ndarray | None = None, room: int | None = None) -> np.ndarray:
        """Use experts of a layer, and let them in.

        Parameters
        ----------
        layer : :class:`int`
        uses : integer, (n_experts,)
            Tokens of the call that each expert has.
        mass : float, (n_experts,), optional
            Sum of the routing weights of each expert; where it is not known, `uses` stands for it.
        arrived : integer, (n,), optional
            Experts that this call brought to the torch device anyway; all that it used when left
            out.
        room : :class:`int`, optional
            How many others may be moved in now; any number when left out.

        Returns
        -------
        :class:`numpy.ndarray` of integer
            Experts that came in and were not among `arrived`: they have to be moved.
        """
        resident = self.resident[layer]
        used = uses > 0
        self._use(layer, uses, used, mass)
        new = (used > resident).nonzero()[0]
        if self.admission is not None:
            new = self.admission.admitted(layer, new)
        slots = self.slots[layer]
        if not len(new) or not slots:
            return _NOTHING
        score, before = self.score[layer], resident.nonzero()[0]
        if self.bypass and len(before) >= slots:  # only who beats the worst: mostly no one
            values = score[before]
            new = new[score[new] > values[values.argmin()] * self.margin]
        moving = _NOTHING
        if arrived is not None and len(new):
            new, moving = self._within(new, score, arrived, room)
        if not len(new):
            return _NOTHING
        leave = len(before) + len(new) - slots
        if leave <= 0:
            resident[new] = True
        elif self.bypass:
            self._exchange(resident, score, before, new, slots - len(before))
        else:
            places = np.concatenate((before, new))
            values = score[places]
            values[used[places]] += ABOVE_ALL
            resident[new] = True
            resident[places[values.argpartition(leave - 1)[:leave]]] = False
        return moving[resident[moving]] if len(moving) else moving

    @staticmethod
    def _within(new: np.ndarray, score: np.ndarray, arrived: np.ndarray,
                room: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the newcomers that there is room for, and those of them that have to be moved."""
        came, moving = _NOTHING, new
        if len(arrived):
            here = np.zeros(len(score), bool)
            here[arrived] = True
            flags = here[new]
            came, moving = new[flags], new[~flags]
        if room is not None and len(moving) > room:
            values = score[moving]
            moving = (_NOTHING if not room else moving[values.argmax()][None] if room == 1
                      else moving[(-values).argsort(kind="stable")[:room]])
        return (np.concatenate((came, moving)) if len(came) else moving), moving

    def _exchange(self, resident: np.ndarray, score: np.ndarray, before: np.ndarray,
                  new: np.ndarray, free: int) -> None:
        """Fill free slots, then let the best newcomers take the places of the worst residents."""
        values = score[before]
        if len(new) == 1 and not free:  # one for one, as mostly in a decode step
            worst = values.argmin()
            if score[new[0]] > values[worst] * self.margin:
                resident[before[worst]] = False
                resident[new] = True
            return
        gain = score[new]
        order = (-gain).argsort(kind="stable")
        new, gain = new[order], gain[order]
        count = min(len(new) - free, len(before))
        worst = values.argsort(kind="stable")[:count]
        better = count
        if count:
            gains = gain[free : free + count] > values[worst] * self.margin
            better = count if gains.all() else int(gains.argmin())
        resident[before[worst[:better]]] = False
        resident[new[: free + better]] = True

    def step(self, uses: np.ndarray) -> np.ndarray:
        """Use experts of all layers, one after the other, and let them in.

        Parameters
        ----------
        uses : integer, (n_layers, n_experts)
            Tokens of the step that each expert has.

        Returns
        -------
        :class:`numpy.ndarray` of bool, like ``uses``
            Experts that were used and were resident before.
        """
        hit = (uses > 0) & self.resident
        for layer, of_layer in enumerate(uses):
            self.use(layer, of_layer)
        return hit


class SecondMiss:
    """Admit an expert at its second miss within some calls, and not more than a few at a time.

    What hybrid caches of llama.cpp do (pull requests 24524 and 27861): an expert that was asked for
    once is seldom asked for soon.

    Parameters
    ----------
    n_layers, n_experts : :class:`int`
    within : :class:`int`
        Calls of a layer; 0: the first miss is enough.
    at_most : :class:`int`
        Newcomers of a call.
    """

    def __init__(self, *, n_layers: int, n_experts: int, within: int = 64,
                 at_most: int = 2) -> None:
        if within < 0 or at_most < 1:
            raise InvalidOption(f"within must be at least 0 and at_most at least 1, not {within} "
                                f"and {at_most}")
        self._within, self._at_most = within, at_most
        self._last = np.full((n_layers, n_experts), -(within + 1))
        self._now = [0] * n_layers

    def admitted(self, layer: int, missed: np.ndarray) -> np.ndarray:
        """Return those of a call's missed experts that may come in."""
        now = self._now[layer] = self._now[layer] + 1
        last = self._last[layer]
        again = missed if not self._within else missed[now - last[missed] <= self._within]
        last[missed] = now
        return again[: self._at_most]


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
