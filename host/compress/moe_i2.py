"""MoE-I2: prune unimportant layers' experts more, then give what is left a low rank.

Yang et al., MoE-I2: Compressing Mixture of Experts Models through Inter-Expert Pruning and
Intra-Expert Low-Rank Decomposition, EMNLP Findings 2024, arXiv 2411.01016.

*Inter-expert*: the importance of an expert is what the layer's output loses without it, that of a
layer the sum of its experts'; layers drop experts in inverse proportion (equations 1 and 2). Which
ones, a genetic search says whose fitness is ``|| F(x) - F'(x) ||_F`` (section 3.1.2).

*Intra-expert*: ``W ~ U_r S_r V_r``, the rank of each expert in proportion to its importance to the
power of ``smoothing`` (equations 5 to 7); their fine-tuning is left out. Here gate and up
have one right factor, and ranks are multiples of 32: the device runs the factors as three commands
(:mod:`moeaccel.host.compress.low_rank`). An expert stays whole where factors would be as large.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.compress.layer import MoELayer, combine
from moeaccel.host.compress.low_rank import factored
from moeaccel.host.compress.method import Method, Tokens, count_of

__all__ = ["METHODS", "counts", "importances", "prune", "ranks"]

_POPULATION, _GENERATIONS = 24, 20


def importances(layer: MoELayer, x: Tokens) -> NDArray[np.float64]:
    """Return what the output loses without each expert, (E,), relative to itself."""
    exact, outputs = layer(x), layer.outputs(x)
    found = np.ones(len(layer.experts))
    for e in range(len(found)):
        others = [i for i in range(len(found)) if i != e]
        if others:
            found[e] = np.linalg.norm(
                combine(layer.kept(others).route(x), outputs[others]) - exact)
    return found / max(float(np.linalg.norm(exact)), 1e-30)


def counts(layers: list[MoELayer], x: list[Tokens], share: float) -> list[int]:
    """Return how many experts stay of each layer: on average a share, fewer of those that matter
    less."""
    dropped = sum(len(layer.experts) - count_of(share, layer) for layer in layers)
    inverse = np.array([1 / max(float(importances(layer, tokens).sum()), 1e-30)
                        for layer, tokens in zip(layers, x, strict=True)])
    wanted = dropped * inverse / inverse.sum()
    room = np.array([len(layer.experts) - 1 for layer in layers])
    found = np.minimum(np.floor(wanted), room).astype(int)
    while found.sum() < dropped:  # the largest remainders that there is room for
        found[int(np.where(found < room, wanted - found, -np.inf).argmax())] += 1
    return [len(layer.experts) - int(n) for layer, n in zip(layers, found, strict=True)]


def prune(layer: MoELayer, x: Tokens, experts: int, seed: int = 0) -> MoELayer:
    """Return the layer with so many experts, found by a genetic search."""
    total = len(layer.experts)
    if experts == total:
        return layer
    rng = np.random.default_rng(seed)
    exact, outputs = layer(x), layer.outputs(x)
    logits = x.astype(np.float64) @ layer.router.T.astype(np.float64)
    known: dict[tuple[int, ...], float] = {}

    def error(subset: tuple[int, ...]) -> float:
        if subset not in known:
            routing = layer.kept(subset).route_logits(logits)
            known[subset] = float(np.linalg.norm(combine(routing, outputs[list(subset)]) - exact))
        return known[subset]

    best = np.sort(np.argsort(-importances(layer, x), kind="stable")[:experts])
    people = [tuple(best.tolist())] + [
        tuple(sorted(rng.choice(total, experts, replace=False).tolist()))
        for _ in range(_POPULATION - 1)]
    for _ in range(_GENERATIONS):
        people = sorted(set(people), key=lambda subset: (error(subset), subset))
        parents = people[: max(2, _POPULATION // 3)]
        people = parents[:]
        while len(people) < _POPULATION:
            a, b = (parents[int(i)] for i in rng.integers(0, len(parents), 2))
            child = set(rng.permutation(sorted({*a, *b}))[:experts].tolist())
            if rng.random() < 0.5:  # mutation: one expert for another
                child.discard(int(rng.choice(sorted(child))))
                outside = sorted(set(range(total)) - child)
                child.add(int(rng.choice(outside)))
            people.append(tuple(sorted(child)))
    return layer.kept(min(people, key=lambda subset: (error(subset), subset)))


def ranks(layer: MoELayer, x: Tokens, share: float, smoothing: float = 0.5) -> list[int]:
    """Return the rank of each expert's matrices, on average a share of the full one."""
    weight = np.maximum(importances(layer, x), 1e-6) ** smoothing
    full = min(layer.experts[0].gate_up.shape[1], layer.experts[0].down.shape[1])
    wanted = share * full * len(weight) * weight / weight.sum()
    return np.clip(np.rint(wanted), 1, full).astype(int).tolist()


def _apply(layers: list[MoELayer], x: list[Tokens], *, share: float, rank: float,
           seed: int) -> list[MoELayer]:
    found = []
    for layer, tokens, experts in zip(layers, x, counts(layers, x, share), strict=True):
        smaller = prune(layer, tokens, experts, seed)
        found.append(replace(smaller, experts=tuple(
            factored(expert, r) for expert, r in zip(
                smaller.experts, ranks(smaller, tokens, rank), strict=True))))
    return found


METHODS = (
    Method("moe-i2", "arXiv 2411.01016", "drop experts of layers that matter less, then low rank",
           _apply, {"share": 0.75, "rank": 0.75, "seed": 0}),
)
