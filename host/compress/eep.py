"""EEP: an evolutionary search, without gradients, for fewer experts and their router.

Liu et al., Efficient Expert Pruning for Sparse Mixture-of-Experts Language Models: Enhancing
Performance and Reducing Inference Costs, arXiv 2407.00945. With matrices ``W_E`` and ``W_R`` of r
by n, expert i becomes ``sum_j W_E[i, j] W_j`` and its row of the router ``sum_j W_R[i, j] R_j``
(section 3.2). First they choose: a row has one 1. Then they merge: rows are near the best choice,
and mutate and cross freely (section 3.3). Fitness is what a task scores there; here, where a pass
sees a layer and not the model, it is ``-|| F(x) - F'(x) ||_F``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.compress.layer import MoELayer
from moeaccel.host.compress.merging import weighted_mean
from moeaccel.host.compress.method import Method, Tokens, count_of
from moeaccel.host.compress.moe_i2 import prune as genetic_choice

__all__ = ["METHODS", "mapped", "search"]

_CHILDREN = 8
_TOKENS = 256  # that fitness is measured on


def mapped(layer: MoELayer, experts: NDArray[np.floating],
           router: NDArray[np.floating]) -> MoELayer:
    """Return the layer that two matrices, (r, n), make of one whose rows and experts are n."""
    parts = list(layer.experts)
    # A mean with weights that need not be positive, times their sum.
    made = []
    for row in experts:
        same = weighted_mean(parts, np.ones(len(parts)))  # checks that they are of one kind
        made.append(same.changed(*(
            np.tensordot(row, np.stack([getattr(p, name) for p in parts]).astype(np.float64),
                         1).astype(np.float32) for name in ("gate_up", "down"))))
    names = [layer.weight_formats[int(np.abs(row).argmax())] for row in experts]
    return MoELayer(tuple(made), (router @ layer.router.astype(np.float64)).astype(np.float32),
                    layer.top_k, layer.renormalise, tuple(names),
                    np.arange(len(made), dtype=np.int64), layer.threshold)


def search(layer: MoELayer, x: Tokens, experts: int, *, generations: int = 12,
           seed: int = 0) -> MoELayer:
    """Return the best layer of so many experts that the search finds.

    Parameters
    ----------
    layer : :class:`MoELayer`
        With a row of the router for each expert.
    x : float32 array, (T, H)
    experts, generations, seed : :class:`int`
    """
    rows, _ = layer.router_of_device()
    layer = replace(layer, router=rows, expert_of=np.arange(len(rows), dtype=np.int64))
    x = x[:: max(1, len(x) // _TOKENS)][:_TOKENS]
    exact = layer(x)
    chosen = genetic_choice(layer, x, experts, seed)
    first = np.zeros((experts, len(rows)))
    kept = np.flatnonzero(chosen.expert_of >= 0)
    first[np.arange(experts), kept] = 1

    def error(genome: tuple[NDArray[np.float64], NDArray[np.float64]]) -> float:
        return float(np.linalg.norm(mapped(layer, *genome)(x) - exact))

    rng = np.random.default_rng(seed)
    best = first, first.copy()
    least, step = error(best), 0.05
    second = best
    for _ in range(generations):
        found = False
        for _ in range(_CHILDREN):
            # Crossing: each row of either parent; mutation: some entries move a little.
            mother = rng.random((experts, 1)) < 0.5
            child = tuple(
                np.where(mother, a, b) + step * rng.standard_normal(a.shape)
                * (rng.random(a.shape) < 0.2) for a, b in zip(best, second, strict=True))
            now = error((child[0], child[1]))
            if now < least:
                second, best, least, found = best, (child[0], child[1]), now, True
        step *= 1.2 if found else 0.6
    return mapped(layer, *best)


METHODS = (
    Method("eep", "arXiv 2407.00945", "search for experts and router rows that are sums of others",
           lambda layers, x, share, generations, seed: [
               search(layer, tokens, count_of(share, layer), generations=generations, seed=seed)
               for layer, tokens in zip(layers, x, strict=True)],
           {"share": 0.75, "generations": 12, "seed": 0}),
)
