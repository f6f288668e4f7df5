"""The best of all splits: how many residents, and how many moved."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeaccel.host.policies.costs import LayerCosts
from moeaccel.host.policies.placement.base import Placement, Plan, Work

__all__ = ["Extra", "Scan", "best_split"]

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
    n, others = len(inside), len(outside)
    # Of the r hottest residents: seconds of the device that are saved, and of the torch device.
    saved, on_torch, taken = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1, np.int64)
    device_of[inside].cumsum(out=saved[1:])
    torch_of[inside].cumsum(out=on_torch[1:])
    inside.cumsum(out=taken[1:])
    shared = costs.shared(tokens)
    on_torch += shared
    on_torch[1:] += costs.torch_call
    assigned = int(taken[-1] + outside.sum())
    everything = costs.device_call + saved[-1] + float(device_of[outside].sum())
    few = assigned - int(taken[-1]) < tokens  # of the others: not every token has one
    rows = np.minimum(tokens, assigned - taken) if few else tokens
    device = everything + costs.row * rows - saved
    if not others:
        device[-1] = 0.0
    total = np.maximum(device, on_torch)
    total += costs.merge + extra.both
    total[0] += extra.device - extra.both - (0.0 if shared else costs.merge)
    if not others:
        total[-1] = on_torch[-1] + extra.torch
    best = int(total.argmin())
    limit = min(others, int(
        (total[best] - costs.move_call - costs.torch_call) / (costs.move + costs.decode)))
    if limit < 1:
        return best, 0
    hottest = outside[:limit]
    k = np.arange(1, limit + 1)
    moved = hottest.cumsum()
    less = costs.contend * k - device_of[hottest].cumsum()
    if assigned - int(taken[-1] + moved[-1]) < tokens:
        rows = np.minimum(tokens, assigned - taken[:, None] - moved)
        device = (everything - saved)[:, None] + costs.row * rows + less
    else:
        device = device[:, None] + less
    arrived = costs.move_call + costs.move * k + costs.up * rows
    moving = np.maximum(on_torch[:, None], arrived)
    moving += costs.torch_call + costs.decode * k + torch_of[hottest].cumsum()
    alone = moving[-1, -1]
    np.maximum(moving, device, out=moving)
    moving += costs.merge + extra.moving
    if limit == others:
        moving[-1, -1] = alone + extra.torch
    place = int(moving.argmin())
    if moving.flat[place] < total[best]:
        return place // limit, place % limit + 1
    return best, 0


class Scan(Placement):
    """Compute the r hottest residents on the torch device, move the k hottest others, and take the
    r and k of the least time by the whole cost formula, calls and copies included.

    Where the torch device's time does not depend on the tokens of an expert (on a GPU below some
    hundred) no other choice of experts is better: the accelerator's does, so that the hottest are
    those that it gains most without.
    """

    name = "scan"

    extra = _NO_EXTRA

    def _place(self, work: Work) -> Plan:
        r, k = best_split(self.costs, work, self.extra)
        return Plan(slice(r), slice(k))

    def forget(self) -> None:
        """Decide again what was decided once."""
        self._single.clear()
