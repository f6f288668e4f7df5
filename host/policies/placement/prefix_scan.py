"""The best prefix of the experts that gain most."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.placement.base import Placement, Plan, Work

__all__ = ["PrefixScan"]


class PrefixScan(Placement):
    """Sort the experts by ``t_device(n) - t_torch(n)``, moves included for those that are not
    resident, and let the torch device compute the prefix with the smallest ``max(sum t_torch, sum
    t_device of the others)`` (DynaNDE, arXiv 2609.00407).
    """

    name = "prefix-scan"

    def _place(self, work: Work) -> Plan:
        costs, inside = self.costs, len(work.resident_tokens)
        device_of, torch_of = costs.tables(work.tokens)
        tokens = np.concatenate((work.resident_tokens, work.other_tokens))
        device, torch = device_of[tokens], torch_of[tokens]
        torch[inside:] += costs.move + costs.decode
        order = (torch - device).argsort(kind="stable")
        taken = np.concatenate(([0.0], torch[order].cumsum()))
        left = device.sum() - np.concatenate(([0.0], device[order].cumsum()))
        kept = np.zeros(len(tokens), bool)
        kept[order[: int(np.maximum(taken, left).argmin())]] = True
        return Plan(kept[:inside], kept[inside:])
