"""The best of all splits: how many residents, and how many moved."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeaccel.host.policies.costs import LayerCosts
from moeaccel.host.policies.placement.base import Placement, Plan, Work

__all__ = ["Extra", "Scan", "best_split"]

_ZERO = np.zeros(1)


class Extra(NamedTuple):
    """Seconds that plans take beside their costs: on the device alone, on the torch device alone,
    on both, and on both with moves."""

    device: float = 0.0
    torch: float = 0.0
    both: float = 0.0
    moving: float = 0.0


_NO_EXTRA = Extra()


def best_split(costs: LayerCosts, work: Work, extra: Extra = _NO_EXTRA) -> tuple[int, int]:
    """Return r and k of the least time when the r hottest residents are computed on the torch
    device and the k hottest others are moved to it.

    All r are tried, with all k whose moves alone do not take longer than the best without moves.
    """
    inside, outside, tokens = work.resident_tokens, work.other_tokens, work.tokens
    device_of, torch_of = costs.tables(tokens)
    n, sums = len(inside), inside.cumsum()
    count, device_in = n + len(outside), device_of[inside]
    r = np.arange(n + 1)
    on_torch = costs.shared(tokens) + costs.torch_call + _before(torch_of[inside])
    on_torch[0] -= costs.torch_call
    given = _before(device_in)
    all_device = given[-1] + float(device_of[outside].sum())
    assigned = int(outside.sum()) + (int(sums[-1]) if n else 0)
    rest = assigned - _before(sums, added=True)
    fixed = costs.merge + extra.both
    device = costs.device_call + costs.row * np.minimum(tokens, rest) + all_device - given
    if len(outside) == 0:
        device[-1] = 0.0
    total = np.maximum(device, on_torch) + fixed
    if on_torch[0] == 0:
        total[0] -= costs.merge
    total[0] += extra.device - extra.both
    if len(outside) == 0:
        total[-1] = on_torch[-1] + extra.torch
    best = int(total.argmin())
    limit = min(len(outside), int(
        (total[best] - costs.move_call - costs.torch_call) / (costs.move + costs.decode)))
    if limit < 1:
        return best, 0
    hottest = outside[:limit]
    k = np.arange(1, limit + 1)
    rest = rest[:, None] - hottest.cumsum()
    rows = np.minimum(tokens, rest)
    device = (costs.device_call + costs.row * rows + (all_device - given)[:, None]
              - device_of[hottest].cumsum() + costs.contend * k)
    device[count - r[:, None] - k == 0] = 0.0
    torch = np.maximum(on_torch[:, None], costs.move_call + costs.move * k + costs.up * rows)
    torch += costs.torch_call + costs.decode * k + torch_of[hottest].cumsum()
    moving = np.maximum(device, torch) + (costs.merge + extra.moving)
    if limit == len(outside):
        moving[-1, -1] = torch[-1, -1] + extra.torch
    place = int(moving.argmin())
    if moving.flat[place] < total[best]:
        return place // limit, place % limit + 1
    return best, 0


def _before(values: np.ndarray, *, added: bool = False) -> np.ndarray:
    """Return 0 and the running sums; ``added``: of what is summed already."""
    return np.concatenate((_ZERO, values if added else values.cumsum()))


class Scan(Placement):
    """Compute the r hottest residents on the torch device, move the k hottest others, and take the
    r and k of the least time by the whole cost formula, calls and copies included.

    Where the torch device's time does not depend on the tokens of an expert (on a GPU below some
    hundred) no other choice of experts is better: the accelerator's does, so that the hottest are
    those that it gains most without.
    """

    name = "scan"

    def __init__(self, costs: LayerCosts) -> None:
        super().__init__(costs)
        self._single: dict[tuple[int, int], tuple[int, int]] = {}

    def place(self, work: Work) -> Plan:
        """Return the best split."""
        return self.split(work, _NO_EXTRA)

    def split(self, work: Work, extra: Extra) -> Plan:
        """Return the best split when plans take something beside their costs."""
        if work.tokens == 1:  # all experts alike: few cases, decided once
            key = len(work.resident_tokens), len(work.other_tokens)
            found = self._single.get(key)
            if found is None:
                found = self._single[key] = best_split(self.costs, work, extra)
        else:
            found = best_split(self.costs, work, extra)
        return Plan(slice(found[0]), slice(found[1]))

    def forget(self) -> None:
        """Decide again what was decided once."""
        self._single.clear()
