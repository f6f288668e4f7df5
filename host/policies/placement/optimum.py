"""The optimum, as a bound for the others."""

from __future__ import annotations

import itertools
import math

import numpy as np

from moeaccel.host.policies.costs import LayerCosts
from moeaccel.host.policies.placement.base import NONE, Placement, Plan, Work, chains
from moeaccel.host.policies.placement.scan import best_split

__all__ = ["Optimum", "lower_bound"]

_BINS = 3000
_FEW = 10  # experts: all sets are tried
_ENOUGH = 1e-3


def lower_bound(costs: LayerCosts, work: Work, at_most: float, bins: int = _BINS) -> float:
    """Return a time that no plan goes below, and `at_most` where none is shorter.

    The torch device's seconds are rounded down to whole bins, of which the time to read an expert
    has a whole number, and the table
    ``least device seconds for so many torch seconds and so many moves`` is computed expert by
    expert, so that every set is in it. What hides in it is taken at its shortest: k moves have the
    k shortest computations behind them. ``row min(T, sum n)`` is the smaller of two sums, each of
    which a table of its own has exactly.

    Parameters
    ----------
    costs : :class:`LayerCosts`
    work : :class:`Work`
    at_most : :class:`float`
        Time of a plan.
    bins : :class:`int`
        At least as many; the more, the closer.
    """
    return min(at_most, _bound(costs, work, at_most, bins, all_rows=False),
               _bound(costs, work, at_most, bins, all_rows=True))


def _bound(costs: LayerCosts, work: Work, at_most: float, bins: int, *,
           all_rows: bool) -> float:
    """Every row is sent, or one for each assignment to the device."""
    device_of, torch_of = costs.tables(work.tokens)
    width = costs.torch_read / math.ceil(costs.torch_read * bins / at_most)
    bins = int(at_most / width)
    fit = (at_most - costs.move_call - costs.torch_call) / (costs.move + costs.decode)
    moves = min(len(work.other_tokens), max(0, int(fit)))
    table = np.full((moves + 1, bins + 1), np.inf)
    table[0, 0] = 0.0
    for tokens, step in ((work.resident_tokens, 0), (work.other_tokens, 1)):
        for n in tokens.tolist():
            taken = int((torch_of[n] + step * costs.decode) / width)
            new = table + (device_of[n] + (0.0 if all_rows else costs.row * n))
            if taken <= bins and moves >= step:
                np.minimum(new[step:, taken:], table[: moves + 1 - step, : bins + 1 - taken],
                           out=new[step:, taken:])
            table = new
    k = np.arange(moves + 1)[:, None]
    taken = np.arange(bins + 1)
    shortest = np.sort(torch_of[work.other_tokens] + costs.decode)[:moves]
    hottest = np.concatenate(([0], work.other_tokens[:moves].cumsum()))[:, None]
    rows = work.tokens if all_rows else np.minimum(
        work.tokens, int(work.other_tokens.sum()) - hottest)
    waiting = (costs.move_call + costs.move * k + costs.up * rows + costs.torch_call
               + np.concatenate(([0.0], shortest.cumsum()))[:, None])
    # One grouped call for the residents and one for what was moved; the smaller where both may be.
    torch = costs.shared(work.tokens) + width * taken + costs.torch_call * ((taken > 0) | (k > 0))
    torch = np.where(k > 0, np.maximum(torch, waiting), torch)
    device = table + (costs.device_call + costs.contend * k
                      + (costs.row * work.tokens if all_rows else 0.0))
    device[table == 0] = 0.0
    both = costs.merge * ((table > 0) & (torch > 0))
    return float((np.maximum(device, torch) + both).min())


class Optimum(Placement):
    """The best set of experts for the torch device, among all.

    Of one token it is :class:`Scan`'s, which is then exact; of up to 10 experts all sets are tried;
    else Scan's plan is improved by exchanging one expert at a time until nothing gets better, and
    :attr:`bound` says how much further any other could be: see :func:`lower_bound`.

    Attributes
    ----------
    bound : :class:`float`
        Of the last call: no plan takes less.
    """

    name = "optimum"

    def __init__(self, costs: LayerCosts, *, bins: int = _BINS) -> None:
        super().__init__(costs)
        self.bins = bins
        self.bound = 0.0

    def place(self, work: Work) -> Plan:
        """Return the best plan that was found."""
        plan = super().place(work)
        if work.tokens == 1:
            self.bound = chains(self.costs, work, plan).total
        return plan

    def _place(self, work: Work) -> Plan:
        if not len(work):
            self.bound = 0.0
            return Plan(NONE, NONE)
        if 1 < work.tokens and len(work) <= _FEW:
            return self._try_all(work)
        r, k = best_split(self.costs, work)
        plan = Plan(slice(r), slice(k))
        self.bound = chains(self.costs, work, plan).total
        if work.tokens == 1:
            return plan
        plan, time = self._exchange(work, r, k, self.bound)
        self.bound = lower_bound(self.costs, work, time, self.bins)
        return plan

    def _try_all(self, work: Work) -> Plan:
        inside, outside = len(work.resident_tokens), len(work.other_tokens)
        self.bound, best = math.inf, Plan(NONE, NONE)
        for kept in itertools.product((False, True), repeat=inside):
            for moved in itertools.product((False, True), repeat=outside):
                plan = Plan(np.array(kept, bool), np.array(moved, bool))
                time = chains(self.costs, work, plan).total
                if time < self.bound:
                    self.bound, best = time, plan
        return best

    def _exchange(self, work: Work, r: int, k: int, time: float) -> tuple[Plan, float]:
        kept = np.arange(len(work.resident_tokens)) < r
        moved = np.arange(len(work.other_tokens)) < k
        better = True
        while better:
            better = False
            for mask, tokens in ((kept, work.resident_tokens), (moved, work.other_tokens)):
                # Experts with the same tokens are alike: one of each count and side is enough.
                for out in [None, *_ones(mask, tokens)]:
                    for into in [None, *_ones(~mask, tokens)]:
                        if out is into is None:
                            continue
                        trial = mask.copy()
                        if out is not None:
                            trial[out] = False
                        if into is not None:
                            trial[into] = True
                        plan = (Plan(trial, moved) if mask is kept else Plan(kept, trial))
                        found = chains(self.costs, work, plan).total
                        if found < time * (1 - _ENOUGH):
                            mask[:] = trial
                            time, better = found, True
                            break
                    if better:
                        break
                if better:
                    break
        return Plan(kept, moved), time


def _ones(mask: np.ndarray, tokens: np.ndarray) -> list[int]:
    places = mask.nonzero()[0]
    return places[np.unique(tokens[places], return_index=True)[1]].tolist()
