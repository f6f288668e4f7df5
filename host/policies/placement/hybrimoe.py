"""Two sides that take experts from the two ends of a queue."""

from __future__ import annotations

from moeaccel.host.policies.placement.base import Placement, Plan, Work

__all__ = ["HybriMoE"]


class HybriMoE(Placement):
    """Line the experts up, residents first and hottest first among each; the torch device takes
    from the head, the accelerator from the tail, and next takes who would have finished its next
    expert earlier; the torch device's time has the moves in it (HybriMoE, arXiv 2504.05897, its
    ``HSS``). It minimises the later end, ``min max(T_torch, T_device)``, where Fiddler's code adds
    both.
    """

    name = "hybrimoe"

    def _place(self, work: Work) -> Plan:
        costs, inside = self.costs, len(work.resident_tokens)
        device_of, torch_of = costs.tables(work.tokens)
        torch = torch_of[work.resident_tokens].tolist()
        torch += (torch_of[work.other_tokens] + costs.move + costs.decode).tolist()
        device = device_of[work.resident_tokens].tolist() + device_of[work.other_tokens].tolist()
        head, tail, one, other = 0, len(torch) - 1, 0.0, 0.0
        while head <= tail:
            if one + torch[head] <= other + device[tail]:
                one += torch[head]
                head += 1
            else:
                other += device[tail]
                tail -= 1
        return Plan(slice(min(head, inside)), slice(max(0, head - inside)))
