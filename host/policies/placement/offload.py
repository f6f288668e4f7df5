"""Everything on the torch device."""

from __future__ import annotations

from moeaccel.host.policies.placement.base import ALL, Placement, Plan, Work

__all__ = ["Offload"]


class Offload(Placement):
    """The torch device computes every expert, and what is not resident is moved first: plain
    offloading, as in mixtral-offloading (arXiv 2312.17238) and all that came from it. With all
    experts resident it is a torch device that needs no accelerator.
    """

    name = "offload"

    def _place(self, work: Work) -> Plan:
        return Plan(ALL, ALL)
