"""The call of a layer: on the device, or on both sides where a policy was set, by its router's or
by other routes."""

from __future__ import annotations

import torch

from moeaccel.host.cluster import ClusterExperts, ClusterMoe
from moeaccel.host.hybrid.places import bring_home
from moeaccel.host.moe import Moe
from moeaccel.host.plugins.transformers.modules import Weights
from moeaccel.host.plugins.transformers.session import open_session
from moeaccel.host.plugins.transformers.uploads import experts_of

__all__ = ["run", "run_block"]


def run(weights: Weights, x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor
        ) -> torch.Tensor:
    """Return y of a layer, (T, H), like x; see :func:`experts_forward` for the arguments."""
    experts = experts_of(weights)
    session = open_session()
    if session is not None and session.routes is not None:
        ids, routing = session.routes.take(weights, ids, routing)
    if isinstance(experts, ClusterExperts):
        return experts(x, ids, routing)
    if session is None or session.hybrid is None:
        bring_home(experts)  # what a policy had away from the device before
        return experts(x, ids, routing)
    return session.hybrid(experts, x, ids, routing, layers=weights.layers,
                          shared=weights.shared)


def run_block(moe: Moe | ClusterMoe, weights: Weights, x: torch.Tensor, *, beside: bool = False
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y of a block that the device routes, (T, H), and the ids and weights that it chose:
    in one command, or where a policy or the devices of a cluster are to see the routes first, in
    two.

    Parameters
    ----------
    beside : :class:`bool`
        Whether the torch device computes shared experts, which are not in y.
    """
    if isinstance(moe, ClusterMoe):
        return moe.compute(x)
    session = open_session()
    if session is None or session.hybrid is None:
        bring_home(moe.experts)
        return moe.compute(x)
    ids, routing = moe.route(x)
    y = session.hybrid(moe.experts, x, ids, routing, layers=weights.layers,
                       shared=weights.shared if beside else 0)
    return y, ids, routing
