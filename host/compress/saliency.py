"""One-shot expert pruning by a score for each expert; the lowest are dropped.

``seer``
    Heavy hitters: the sum of the gate's probabilities of an expert over the tokens that it was
    chosen for (Muzio et al., SEER-MoE: Sparse Expert Efficiency through Regularization for
    Mixture-of-Experts, arXiv 2404.05089, section 3.1).
``reap``
    ``S_e = mean of g_e(x) || f_e(x) ||_2`` over the tokens routed to e, g the weights with which
    they are (Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression,
    arXiv 2510.13999, equation 9).

The expert with the largest single output is never dropped: a few such experts hold a model
together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.compress.layer import MoELayer
from moeaccel.host.compress.method import Method, Tokens, count_of

__all__ = ["METHODS", "drop_lowest", "reap_scores", "seer_scores"]

Scores = NDArray[np.float64]


def seer_scores(layer: MoELayer, x: Tokens) -> Scores:
    """Return the score of each expert, (E,)."""
    routing = layer.route(x)
    chosen = routing.ids >= 0
    probabilities = np.take_along_axis(routing.probabilities, np.maximum(routing.rows, 0), axis=1)
    return np.bincount(routing.ids[chosen], probabilities[chosen],
                       minlength=len(layer.experts)).astype(np.float64)


def reap_scores(layer: MoELayer, x: Tokens) -> Scores:
    """Return the score of each expert, (E,)."""
    routing = layer.route(x)
    norms = np.linalg.norm(layer.outputs(x), axis=2)
    found = np.zeros(len(layer.experts))
    for e in range(len(found)):
        weight = (routing.weights * (routing.ids == e)).sum(axis=1)
        if (used := weight > 0).any():
            found[e] = (weight * norms[e])[used].mean()
    return found


def drop_lowest(layer: MoELayer, x: Tokens, scores: Scores, experts: int) -> MoELayer:
    """Return the layer with so many experts of the highest scores."""
    routing = layer.route(x)
    norms = np.linalg.norm(layer.outputs(x), axis=2)
    for e in range(len(scores)):
        norms[e] *= (routing.ids == e).any(axis=1)
    scores = scores.copy()
    scores[int(norms.max(axis=1).argmax())] = np.inf
    return layer.kept(np.sort(np.argsort(-scores, kind="stable")[:experts]))


def _method(name: str, source: str, text: str,
            score: Callable[[MoELayer, Tokens], Scores]) -> Method:
    return Method(name, source, text, lambda layers, x, share: [
        drop_lowest(layer, tokens, score(layer, tokens), count_of(share, layer))
        for layer, tokens in zip(layers, x, strict=True)], {"share": 0.75})


METHODS = (
    _method("seer", "arXiv 2404.05089", "drop the experts that the router likes least",
            seer_scores),
    _method("reap", "arXiv 2510.13999", "drop the experts that add least to outputs", reap_scores),
)
