"""Our own: the scan, on costs that it measures itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeaccel.host.policies.costs import LayerCosts, Rates
from moeaccel.host.policies.placement.base import ALL, NONE, Chains, Plan, Sums, Work, chains
from moeaccel.host.policies.placement.scan import Extra, Scan, best_split

__all__ = ["MeasuredScan"]

_MEMORY = 0.98  # of what was measured, at each measurement
_EXTRA_MEMORY = 0.9
_CHANGE = 0.02  # relative change of a rate, or of a call's extra time, that counts
_ASK = 32  # decisions from one look at what more residents would bring to the next
_GAIN = 0.02  # of a call's time, which they must bring
_LOOK_FIRST = 16  # decisions without any measurement of one side, after which it is tried
_LOOK_AGAIN = 512  # decisions without a measurement of one side, after which it is tried


_QUICKER_TORCH, _QUICKER_DEVICE = Rates(torch=2), Rates(device=2)


class _Ratio:
    """Believed over found seconds, the old ones fading."""

    def __init__(self) -> None:
        self._believed = self._found = 0.0
        self.age = 0  # decisions since the last measurement
        self.measured = False
        self._patient = False  # it does not look as if the first measurement would help

    def add(self, believed: float, found: float) -> None:
        if believed <= 0 or found <= 0:
            return
        self._believed = _MEMORY * self._believed + believed
        self._found = _MEMORY * self._found + found
        self.age = 0
        self.measured = True

    @property
    def due(self) -> bool:
        return self.age > (_LOOK_AGAIN if self.measured or self._patient else _LOOK_FIRST)

    def tried(self, helps: Callable[[], bool]) -> bool:
        """Return whether a measurement that is due is made: the first only if it may help soon."""
        first = not self.measured and not self._patient
        self._patient = first and not helps()
        if not self._patient:
            self.age = 0
        return not self._patient

    @property
    def value(self) -> float:
        return self._believed / self._found if self._found else 1.0


class MeasuredScan(Scan):
    """:class:`Scan` with costs that are corrected by what calls took.

    What a side took beside its calls and rows, over what was believed, corrects the rate of the
    device, of the torch device (without its waiting) and of the link (a move, also one in the
    background); a rate counts as changed from 2 % on. What a plan took longer than its
    chains is kept for each kind of plan (one side alone, both, with moves) and added to the plans
    of that kind, so that the policy falls back to one side when working on both loses; it fades, so
    that both are tried again. A side that no plan has used for 512 decisions gets one expert; one
    that was never measured after 16, if plans would use it were it twice as quick as believed.
    Every 32nd decision looks whether residents in the place of half of the others would save 2 %:
    where they would not, nothing is promoted.
    """

    name = "measured-scan"

    def __init__(self, costs: LayerCosts) -> None:
        super().__init__(costs)
        self._believed = costs
        self.rates = Rates()
        self._link, self._device, self._torch = _Ratio(), _Ratio(), _Ratio()
        self._extra = [0.0, 0.0, 0.0, 0.0]
        self._decisions = 0

    @property
    def wants_move(self) -> bool:
        """Whether the link's rate is not known, so that a move in the background would help."""
        return not self._link.measured or self._link.due

    def place(self, work: Work) -> Plan:
        """Return the best split, or one that measures a side that was not seen for long."""
        self._link.age += 1
        self._device.age += 1
        self._torch.age += 1
        inside, outside = len(work.resident_tokens), len(work.other_tokens)
        if self._torch.due and inside:
            if self._torch.tried(lambda: best_split(self.costs.at(_QUICKER_TORCH), work)[0] > 0):
                return Plan(slice(1), NONE)
        if self._device.due and inside + outside > 1:
            if self._device.tried(lambda: sum(best_split(
                    self.costs.at(_QUICKER_DEVICE), work)) < inside + outside):
                return Plan(ALL, slice(outside - 1)) if outside else Plan(slice(inside - 1), NONE)
        self._decisions += 1
        if self._decisions % _ASK == 1:
            self.useful = self._gains(work)
        return super().place(work)

    def _gains(self, work: Work) -> bool:
        half = (len(work.other_experts) + 1) // 2
        tokens = np.concatenate((work.resident_tokens, work.other_tokens[:half]))
        order = (-tokens).argsort(kind="stable")
        experts = np.concatenate((work.resident_experts, work.other_experts[:half]))
        more = Work(experts[order], tokens[order], work.other_experts[half:],
                    work.other_tokens[half:], work.tokens)
        place = super().place
        now, then = (chains(self.costs, w, place(w)).total for w in (work, more))
        return then < now * (1 - _GAIN)

    def measured(self, work: Work, plan: Plan, found: Chains) -> None:
        """Correct the costs."""
        costs = self._believed
        sums = Sums.of(costs, work, plan)
        if sums.left:
            calls = costs.device_call + costs.row * sums.rows
            self._device.add(sums.device + costs.contend * sums.moved, found.device - calls)
        if sums.moved:
            self._link.add(costs.move * sums.moved, found.moves)
        if sums.kept or sums.moved:
            shared = costs.shared(work.tokens)
            calls = costs.torch_call * ((shared > 0) + (sums.kept > 0) + (sums.moved > 0))
            believed = sums.torch_kept + sums.torch_moved + costs.decode * sums.moved
            if shared:
                believed += shared - costs.torch_call
            self._torch.add(believed, found.computing - calls)
        kind = 3 if sums.moved and sums.left else 2 if sums.left and sums.kept else (
            0 if sums.left else 1)
        merge = costs.merge if sums.left and found.torch else 0.0
        over = found.total - max(found.device, found.torch) - merge
        extra = self._extra
        extra[:] = [value * 0.999 for value in extra]
        extra[kind] = _EXTRA_MEMORY * extra[kind] + (1 - _EXTRA_MEMORY) * over
        if max(abs(a - b) for a, b in zip(extra, self.extra, strict=True)) > (
                _CHANGE * found.total):
            self.extra = Extra(*extra)
            self.forget()
        self._correct()

    def measured_move(self, images: float, seconds: float) -> None:
        """Correct the link's rate by a move in the background."""
        self._link.add(self._believed.move * images, seconds)
        self._correct()

    def _correct(self) -> None:
        found = Rates(link=self._link.value, device=self._device.value, torch=self._torch.value)
        now = self.rates
        if (abs(found.link / now.link - 1) > _CHANGE or abs(found.device / now.device - 1) > _CHANGE
                or abs(found.torch / now.torch - 1) > _CHANGE):
            self.rates, self.costs = found, self._believed.at(found)
            self.forget()
