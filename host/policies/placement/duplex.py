"""From the torch device to the accelerator, coldest first, while it helps."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.placement.base import Placement, Plan, Work

__all__ = ["Duplex"]


class Duplex(Placement):
    """Begin with all experts on the torch device, and give them to the accelerator in the order of
    fewest tokens until ``max(sum t_torch(n), sum t_device(n))`` stops getting smaller; both t are
    looked up in tables (Duplex, arXiv 2409.01141). There memory is shared; here an expert that is
    not resident has the time of its move in its t_torch.
    """

    name = "duplex"

    def _place(self, work: Work) -> Plan:
        costs, inside = self.costs, len(work.resident_tokens)
        device_of, torch_of = costs.tables(work.tokens)
        tokens = np.concatenate((work.resident_tokens, work.other_tokens))
        torch = torch_of[tokens]
        torch[inside:] += costs.move + costs.decode
        order = (tokens * 2 + (np.arange(len(tokens)) < inside)).argsort(kind="stable")
        left = torch.sum() - np.concatenate(([0.0], torch[order].cumsum()))
        given = np.concatenate(([0.0], device_of[tokens][order].cumsum()))
        times = np.maximum(left, given)
        worse = (times[1:] >= times[:-1]).nonzero()[0]
        kept = np.ones(len(tokens), bool)
        kept[order[: worse[0] if len(worse) else len(tokens)]] = False
        return Plan(kept[:inside], kept[inside:])
