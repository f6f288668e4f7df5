"""Merging: fewer experts, each a mean of several, and a router that is as it was.

``mc-smoe``
    The most frequent experts are dominant; every other joins the one whose router logits are most
    like its own (cosine over calibration tokens); hidden units are permuted to fit the dominant
    expert's, by an assignment of least distance; then ``W = sum f_i W_i / sum f_i``, f how often
    each is chosen (Li et al., Merge, Then Compress: Demystify Efficient SMoE with Hints from Its
    Routing Policy, ICLR 2024, arXiv 2310.01334, sections 3.1 and 3.2). Their low-rank part is in
    :mod:`moeaccel.host.compress.moe_i2`.
``hc-smoe``
    Clusters of experts whose mean outputs over calibration tokens are close, by average linkage;
    the same weighted mean, without a permutation (Chen et al., Retraining-Free Merging of Sparse
    MoE via Hierarchical Clustering, ICML 2025, arXiv 2410.08589, section 3.2).

Rows of the router that lead to one expert add up their weights; a token that has two of them uses
one expert less.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.compress.clusters import assignment, clusters
from moeaccel.host.compress.layer import FloatExpert, MoELayer
from moeaccel.host.compress.method import Method, Tokens, count_of
from moeaccel.host.errors import InvalidOption

__all__ = ["METHODS", "aligned", "hc_smoe", "mc_smoe", "weighted_mean"]


def _frequencies(layer: MoELayer, x: Tokens) -> NDArray[np.float64]:
    ids = layer.route(x).ids
    return np.bincount(ids[ids >= 0], minlength=len(layer.experts)).astype(np.float64)


def weighted_mean(experts: list[FloatExpert], frequencies: NDArray[np.floating]) -> FloatExpert:
    """Return the frequency-weighted mean of experts' weights; of none that is used the plain one.

    Raises
    ------
    InvalidOption
        If they differ in width or activation.
    """
    kinds = {(e.gate_up.shape, e.down.shape, e.activation, e.limit) for e in experts}
    if len(kinds) > 1:
        raise InvalidOption(f"experts to merge must be of one kind, not {sorted(map(str, kinds))}")
    weights = frequencies if frequencies.any() else np.ones(len(experts))
    weights = weights / weights.sum()

    def mean(name: str) -> NDArray[np.float32]:
        stack = np.stack([getattr(e, name) for e in experts]).astype(np.float64)
        return np.tensordot(weights, stack, 1).astype(np.float32)

    return experts[0].changed(mean("gate_up"), mean("down"))


def _units(expert: FloatExpert) -> NDArray[np.float64]:
    """Return what belongs to each hidden unit, (I, ...)."""
    d_expert = expert.down.shape[1]
    parts = [expert.gate_up[:d_expert], expert.gate_up[d_expert:], expert.down.T]
    return np.concatenate([part for part in parts if len(part)], axis=1).astype(np.float64)


def aligned(expert: FloatExpert, other: FloatExpert) -> FloatExpert:
    """Return an expert with its hidden units in the order that fits another's best; its outputs
    are the same."""
    # The least distance is the largest sum of products.
    order = assignment(-(_units(other) @ _units(expert).T))
    d_expert = expert.down.shape[1]
    rows = np.concatenate([part[order] for part in (
        expert.gate_up[:d_expert], expert.gate_up[d_expert:]) if len(part)])
    return expert.changed(rows, np.ascontiguousarray(expert.down[:, order]))


def mc_smoe(layer: MoELayer, x: Tokens, experts: int) -> MoELayer:
    """Return the layer with so many experts, merged into the dominant ones."""
    frequencies = _frequencies(layer, x)
    dominant = np.sort(np.argsort(-frequencies, kind="stable")[:experts]).tolist()
    logits = x.astype(np.float64) @ layer.router.T.astype(np.float64)
    of = np.stack([logits[:, layer.expert_of == e].mean(axis=1)
                   for e in range(len(layer.experts))])
    of /= np.maximum(np.linalg.norm(of, axis=1, keepdims=True), 1e-30)
    groups = {e: [e] for e in dominant}
    for e in range(len(layer.experts)):
        if e not in groups:
            groups[dominant[int((of[dominant] @ of[e]).argmax())]].append(e)
    merged = []
    for e, group in groups.items():
        fitted = [layer.experts[i] if i == e else aligned(layer.experts[i], layer.experts[e])
                  for i in group]
        merged.append(weighted_mean(fitted, frequencies[group]))
    return layer.merged(list(groups.values()), merged)


def hc_smoe(layer: MoELayer, x: Tokens, experts: int) -> MoELayer:
    """Return the layer with so many experts, merged within clusters of like outputs."""
    frequencies = _frequencies(layer, x)
    means = layer.outputs(x).mean(axis=1)
    distances = np.linalg.norm(means[:, None] - means[None], axis=2)
    groups = clusters(distances, experts, linkage=np.mean)
    return layer.merged(groups, [
        weighted_mean([layer.experts[e] for e in group], frequencies[group]) for group in groups])


def _method(name: str, source: str, text: str,
            merge: Callable[[MoELayer, Tokens, int], MoELayer]) -> Method:
    return Method(name, source, text, lambda layers, x, share: [
        merge(layer, tokens, count_of(share, layer))
        for layer, tokens in zip(layers, x, strict=True)], {"share": 0.75})


METHODS = (
    _method("mc-smoe", "arXiv 2310.01334", "merge experts into frequent ones of like routes",
            mc_smoe),
    _method("hc-smoe", "arXiv 2410.08589", "merge experts of like outputs", hc_smoe),
)
