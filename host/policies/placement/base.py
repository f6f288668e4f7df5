"""What placements have in common: the work of a call, the plan for it, and what the plan takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from moeaccel.host.policies.costs import LayerCosts

__all__ = ["ALL", "NONE", "Chains", "Placement", "Plan", "Sums", "Work", "chains"]

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
    computing : :class:`float`
        The torch device's grouped calls, without waiting.
    moves : :class:`float`
        The moved images on the link, without what a move costs beside its bytes.
    n_moved : :class:`int`
    """

    device: float
    torch: float
    total: float
    computing: float
    moves: float
    n_moved: int


class Sums(NamedTuple):
    """What a plan gives to each side.

    Parameters
    ----------
    left, kept, moved : :class:`int`
        Experts of the device; residents and moved experts of the torch device.
    rows : :class:`int`
        Sent to the device: those of its assignments, as far as a call has so many tokens.
    device, torch_kept, torch_moved : :class:`float`
        Seconds of these experts.
    """

    left: int
    kept: int
    moved: int
    rows: int
    device: float
    torch_kept: float
    torch_moved: float

    @classmethod
    def of(cls, costs: LayerCosts, work: Work, plan: Plan) -> Sums:
        """Return the sums of a plan."""
        inside, outside, tokens = work.resident_tokens, work.other_tokens, work.tokens
        if tokens == 1:  # all experts alike
            kept, moved = _count(plan.resident, len(inside)), _count(plan.moved, len(outside))
            left = len(inside) + len(outside) - kept - moved
            device, torch = costs.single
            return cls(left, kept, moved, min(1, left), left * device, kept * torch, moved * torch)
        device_of, torch_of = costs.tables(tokens)
        kept, moved = inside[plan.resident], outside[plan.moved]
        left = len(inside) + len(outside) - len(kept) - len(moved)
        rows = int(inside.sum() + outside.sum() - kept.sum() - moved.sum())
        device = (device_of[inside].sum() + device_of[outside].sum() - device_of[kept].sum()
                  - device_of[moved].sum())
        return cls(left, len(kept), len(moved), min(tokens, rows), float(device) if left else 0.0,
                   float(torch_of[kept].sum()), float(torch_of[moved].sum()))


def _count(chosen: slice | np.ndarray, size: int) -> int:
    if isinstance(chosen, slice):
        return size if chosen.stop is None else min(size, chosen.stop)
    return int(np.count_nonzero(chosen))


def chains(costs: LayerCosts, work: Work, plan: Plan, *, weights: np.ndarray | None = None,
           contending: float = 0.0, behind: float = 0.0) -> Chains:
    """Return what a plan takes; the formulas are those of :mod:`~moeaccel.host.policies.costs`.

    Parameters
    ----------
    costs : :class:`LayerCosts`
    work : :class:`Work`
    plan : :class:`Plan`
    weights : float, (O,), optional
        What share of its image has to be moved for each of the others; 1 when left out.
    contending : :class:`float`
        Seconds for which the cards' memory is busy with something else.
    behind : :class:`float`
        Seconds that the link is busy with something else before the first move.
    """
    sums = Sums.of(costs, work, plan)
    images = sums.moved if weights is None else float(weights[plan.moved].sum())
    device = 0.0
    if sums.left:
        device = (costs.device_call + costs.row * sums.rows + sums.device + costs.contend * images
                  + contending)
    torch = costs.shared(work.tokens)
    if sums.kept:
        torch += costs.torch_call + sums.torch_kept
    moves, computing = 0.0, torch
    if sums.moved:
        moves = costs.move * images
        link = costs.move_call + behind + moves + costs.up * sums.rows
        behind_it = costs.torch_call + costs.decode * images + sums.torch_moved
        torch, computing = max(torch, link) + behind_it, torch + behind_it
    both = costs.merge if sums.left and torch else 0.0
    return Chains(device, torch, max(device, torch) + both, computing, moves, sums.moved)


class Placement(ABC):
    """Who computes the experts of a call.

    Parameters
    ----------
    costs : :class:`LayerCosts`
        As believed; a placement that measures corrects them.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    useful: bool = True
    """Whether more residents would help; else promotions can wait."""

    def __init__(self, costs: LayerCosts) -> None:
        self.costs = costs
        self._single: dict[tuple[int, int], Plan] = {}

    def place(self, work: Work) -> Plan:
        """Return who computes what."""
        if work.tokens != 1:
            return self._place(work)
        # One token: all experts alike, few cases, each decided once.
        key = len(work.resident_tokens), len(work.other_tokens)
        plan = self._single.get(key)
        if plan is None:
            plan = self._single[key] = self._place(work)
        return plan

    @abstractmethod
    def _place(self, work: Work) -> Plan:
        """Return who computes what; by the tokens of the experts, and not by which they are."""

    def measured(self, work: Work, plan: Plan, found: Chains) -> None:
        """Hear what a plan took."""
        return

    def measured_move(self, images: float, seconds: float) -> None:
        """Hear what moving images in the background took on the link."""
        return
