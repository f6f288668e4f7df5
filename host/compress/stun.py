"""STUN: drop experts that are like others, then prune what is left without structure.

Lee et al., STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning, ACL 2025,
arXiv 2409.06211. Experts i and j are alike as far as their rows of the router are close and they
are chosen together: ``b_ij = -lambda_1 || W_i - W_j ||_F + lambda_2 a_ij``, a_ij the share of
tokens for which both are chosen. Clusters are merged greedily, the two whose least alike members
are most alike first; of each the member closest to the mean of its experts' weights stays.
The unstructured part is N:M here, by magnitude times activations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.compress.clusters import clusters
from moeaccel.host.compress.layer import MoELayer
from moeaccel.host.compress.method import Method, Tokens, count_of
from moeaccel.host.compress.moe_pruner import CRITERIA, prune as prune_weights

__all__ = ["METHODS", "prune"]


def prune(layer: MoELayer, x: Tokens, experts: int, pattern: str | None, *, distance: float = 1.0,
          together: float = 1.0) -> MoELayer:
    """Return the layer with one expert of each of so many clusters.

    Parameters
    ----------
    layer : :class:`MoELayer`
    x : float32 array, (T, H)
    experts : :class:`int`
    pattern : :class:`str`, optional
        ``2:4``, say, for what is left.
    distance, together : :class:`float`
        lambda_1, of rows of the router in units of their mean distance, and lambda_2.
    """
    routing = layer.route(x)
    rows = np.stack([layer.router[layer.expert_of == e].mean(axis=0)
                     for e in range(len(layer.experts))]).astype(np.float64)
    apart = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    chosen = np.stack([(routing.ids == e).any(axis=1) for e in range(len(rows))]).astype(np.float64)
    unlike = distance * apart / max(float(apart.mean()), 1e-30) - together * (
        chosen @ chosen.T) / len(x)
    groups = clusters(unlike, experts, linkage=np.max)
    smaller = layer.kept(sorted(_closest(layer, group) for group in groups))
    return smaller if pattern is None else prune_weights(smaller, x, pattern, CRITERIA[1])


def _closest(layer: MoELayer, group: list[int]) -> int:
    """Return the member of a cluster closest to the mean of its weights."""
    flat: list[NDArray[np.float32]] = [
        np.concatenate([layer.experts[e].gate_up.reshape(-1), layer.experts[e].down.reshape(-1)])
        for e in group]
    mean = np.mean(flat, axis=0)
    return group[int(np.argmin([np.linalg.norm(weights - mean) for weights in flat]))]


METHODS = (
    Method("stun", "arXiv 2409.06211", "keep one of each cluster of like experts, then N:M",
           lambda layers, x, share, pattern: [
               prune(layer, tokens, count_of(share, layer), pattern)
               for layer, tokens in zip(layers, x, strict=True)],
           {"share": 0.75, "pattern": "2:4"}),
)
