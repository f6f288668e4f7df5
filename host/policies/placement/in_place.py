"""Each expert where its weights are."""

from __future__ import annotations

from moeaccel.host.policies.placement.base import ALL, NONE, Placement, Plan, Work

__all__ = ["InPlace"]


class InPlace(Placement):
    """The torch device computes the residents, the accelerator everything else; nothing moves in a
    call. With pinned residents this is a static hot set; with those of the prompt it is DAOP (arXiv
    2501.10375) and "Context-Aware MoE Inference on CXL-Enabled GPU-NDP Systems" (arXiv 2512.04476).
    """

    name = "in-place"

    def _place(self, work: Work) -> Plan:
        return Plan(ALL, NONE)
