"""Each expert for itself where it takes less."""

from __future__ import annotations

from moeaccel.host.policies.placement.base import ALL, Placement, Plan, Work

__all__ = ["Fiddler"]


class Fiddler(Placement):
    """Compute residents on the torch device, and any other expert near memory iff ``t_device(n) <=
    t_move + t_torch(n)`` (Fiddler, arXiv 2402.07033, with the accelerator for its CPU). What the
    others do at the same time is not looked at.
    """

    name = "fiddler"

    def _place(self, work: Work) -> Plan:
        device_of, torch_of = self.costs.tables(work.tokens)
        n = work.other_tokens
        moving = self.costs.move + self.costs.decode
        return Plan(ALL, device_of[n] > moving + torch_of[n])
