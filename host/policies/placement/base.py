"""What placements have in common: the work of a call, the plan for it, and what the plan takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moeaccel.host.policies.costs import LayerCosts

__all__ = ["ALL", "NONE", "Chains", "Placement", "Plan", "Work", "chains"]

ALL, NONE = slice(None), slice(0)


class Work:
    """The experts of one call, hottest first, parted by whether their weights are resident.

    Parameters
    ----------
    resident_experts, resident_tokens : integer, (R,)
        Experts that are in the torch device's memory, and how many tokens each has.
    other_experts, other_tokens : integer, (O,)
        Those that are not.
    tokens : :class:`int`
        Of the call.
    """

    __slots__ = ("other_experts", "other_tokens", "resident_experts", "resident_tokens", "tokens")

    def __init__(self, resident_experts: np.ndarray, resident_tokens: np.ndarray,
                 other_experts: np.ndarray, other_tokens: np.ndarray, tokens: int) -> None:
        self.resident_experts, self.resident_tokens = resident_experts, resident_tokens
        self.other_experts, self.other_tokens = other_experts, other_tokens
        self.tokens = tokens

    @classmethod
    def of(cls, uses: np.ndarray, resident: np.ndarray, tokens: int) -> Work:
        """Return the work of a call.

        Parameters
        ----------
        uses : integer, (n_experts,)
            Tokens of each expert.
        resident : bool, (n_experts,)
        tokens : :class:`int`
        """
        if tokens == 1:  # every expert once: nothing to sort
            both = uses.nonzero()[0]
            flags = resident[both]
            inside, outside = both[flags], both[~flags]
            return cls(inside, uses[inside], outside, uses[outside], 1)
        active = uses.nonzero()[0]
        active = active[(-uses[active]).argsort(kind="stable")]
        flags = resident[active]
        inside, outside = active[flags], active[~flags]
        return cls(inside, uses[inside], outside, uses[outside], tokens)

    def __len__(self) -> int:
        """Experts."""
        return len(self.resident_experts) + len(self.other_experts)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the torch device computes; the accelerator computes the rest.

    Parameters
    ----------
    resident, moved : :class:`slice`, or bool array
        Which of the work's resident experts, and which of its others, whose images are moved.
    """

    resident: slice | np.ndarray
    moved: slice | np.ndarray


@dataclass(frozen=True, slots=True)
class Chains:
    """Seconds of one call, as believed or as measured.

    Parameters
    ----------
    device, torch, total : :class:`float`
        The accelerator's call, 0 without one; the torch device's part, waiting for moves included;
        the layer.
    moves : :class:`float`
        The moved images on the link, without what a move costs beside its bytes.
    n_moved : :class:`int`
    """

    device: float
    torch: float
    total: float
    moves: float
    n_moved: int


def chains(costs: LayerCosts, work: Work, plan: Plan, *, weights: np.ndarray | None = None,
           contending: float = 0.0) -> Chains:
    """Return what a plan takes; the formulas are those of :mod:`~moeaccel.host.policies.costs`.

    Parameters
    ----------
    costs : :class:`LayerCosts`
    work : :class:`Work`
    plan : :class:`Plan`
    weights : float, (O,), optional
        What share of its image has to be moved for each of the others; 1 when left out.
    contending : :class:`float`
        Seconds for which other moves keep the cards' memory busy.
    """
    device_of, torch_of = costs.tables(work.tokens)
    inside, outside = work.resident_tokens, work.other_tokens
    kept, moved = inside[plan.resident], outside[plan.moved]
    device = float(device_of[inside].sum() - device_of[kept].sum()
                   + device_of[outside].sum() - device_of[moved].sum())
    left = len(work) - len(kept) - len(moved)
    rows = 0
    if left:
        rows = min(work.tokens, int(inside.sum() + outside.sum() - kept.sum() - moved.sum()))
        images = len(moved) if weights is None else float(weights[plan.moved].sum())
        device += (costs.device_call + costs.row * rows + costs.contend * images + contending)
    else:
        device = 0.0
    torch = costs.shared(work.tokens)
    if len(kept):
        torch += costs.torch_call + float(torch_of[kept].sum())
    moves = 0.0
    if len(moved):
        images = len(moved) if weights is None else float(weights[plan.moved].sum())
        moves = costs.move * images
        torch = (max(torch, costs.move_call + moves + costs.up * rows) + costs.torch_call
                 + costs.decode * images + float(torch_of[moved].sum()))
    both = costs.merge if left and torch else 0.0
    return Chains(device, torch, max(device, torch) + both, moves, len(moved))


class Placement(ABC):
    """Who computes the experts of a call.

    Parameters
    ----------
    costs : :class:`LayerCosts`
        As believed; a placement that measures corrects them.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True

    def __init__(self, costs: LayerCosts) -> None:
        self.costs = costs

    @abstractmethod
    def place(self, work: Work) -> Plan:
        """Return who computes what."""

    def measured(self, work: Work, plan: Plan, found: Chains) -> None:
        """Hear what a plan took."""
        del work, plan, found

    def measured_move(self, images: float, seconds: float) -> None:
        """Hear what moving images in the background took on the link."""
        del images, seconds
