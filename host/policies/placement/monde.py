"""A fixed share of the experts moves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.costs import LayerCosts
from moeaccel.host.policies.placement.base import ALL, Placement, Plan, Work, chains

__all__ = ["ALPHAS", "MoNDE"]

ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""What `best` tries."""


class MoNDE(Placement):
    """Move the H hottest experts that are not resident, with ``H = alpha BW_link / (BW_memory +
    BW_link) * active``, and compute the others near memory (MoNDE, arXiv 2405.18832; with 32 and
    512 GB/s 5.88 % of the active experts). Residents, which MoNDE has none of, are computed where
    they are.

    Parameters
    ----------
    costs : :class:`LayerCosts`
    alpha : :class:`float`
        At least 0; MoNDE tunes it, see :meth:`best`.
    ceil : :class:`bool`
        Whether H is rounded up, so that one expert moves in every call, or to the nearest.
    """

    name = "monde"

    def __init__(self, costs: LayerCosts, *, alpha: float = 1.0, ceil: bool = False) -> None:
        if not 0 <= alpha < math.inf:
            raise InvalidOption(f"alpha must be at least 0, not {alpha!r}")
        super().__init__(costs)
        self.alpha, self.ceil = alpha, ceil
        link, memory = 1 / costs.move, 1 / costs.device_read
        self.share = alpha * link / (memory + link)

    def _place(self, work: Work) -> Plan:
        wanted = self.share * len(work)
        return Plan(ALL, slice(math.ceil(wanted - 1e-9) if self.ceil else round(wanted)))

    @classmethod
    def best(cls, costs: LayerCosts, works: Sequence[Work], *,
             alphas: Iterable[float] = ALPHAS) -> MoNDE:
        """Return the split whose alpha takes least for some calls."""
        return min((cls(costs, alpha=alpha) for alpha in alphas), key=lambda split: np.mean(
            [chains(costs, work, split.place(work)).total for work in works]))
