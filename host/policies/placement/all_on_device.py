"""Everything on the accelerator."""

from __future__ import annotations

from moeaccel.host.policies.placement.base import NONE, Placement, Plan, Work

__all__ = ["AllOnDevice"]


class AllOnDevice(Placement):
    """The accelerator computes every expert where its image is: one call, and nothing moves."""

    name = "all-on-device"

    def _place(self, work: Work) -> Plan:
        return Plan(NONE, NONE)
