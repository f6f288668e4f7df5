"""NAEE: the experts without which a layer's output changes least; and skipping by a ratio.

Lu et al., Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts
Large Language Models, ACL 2024, arXiv 2402.14800.

*Pruning*, section 3.2: of all subsets of r experts, the one with the least ``|| F(x) - F'(x) ||_F``
over calibration tokens, F' with the logits of the others at minus infinity. All are tried.

*Skipping*, section 3.3: the expert of rank j is skipped where ``w_j < beta w_1``, beta the median
of ``w_2 / w_1`` over calibration tokens, of each layer its own.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np

from moeaccel.host.compress.layer import MoELayer, combine
from moeaccel.host.compress.method import Method, Tokens, count_of
from moeaccel.host.errors import InvalidOption

__all__ = ["METHODS", "prune", "skip"]

MOST_SUBSETS = 20_000


def prune(layer: MoELayer, x: Tokens, experts: int) -> MoELayer:
    """Return the layer with the best subset of so many experts.

    Raises
    ------
    InvalidOption
        If there are too many subsets to try.
    """
    count = len(layer.experts)
    subsets = math.comb(count, experts)
    if subsets > MOST_SUBSETS:
        raise InvalidOption(f"subsets to try must be at most {MOST_SUBSETS}, not the {subsets:,} "
                            f"of {experts} of {count} experts; take reap, seer or stun")
    exact, outputs = layer(x), layer.outputs(x)
    logits = x.astype(np.float64) @ layer.router.T.astype(np.float64)
    best, least = (), math.inf
    for subset in itertools.combinations(range(count), experts):
        smaller = layer.kept(subset)
        error = float(np.square(
            combine(smaller.route_logits(logits), outputs[list(subset)]) - exact).sum())
        if error < least:
            best, least = subset, error
    return layer.kept(best)


def skip(layer: MoELayer, x: Tokens) -> MoELayer:
    """Return the layer with its beta."""
    weights = replace(layer, threshold=0.0).route(x).weights
    if weights.shape[1] < 2:
        return layer
    return replace(layer, threshold=float(np.median(weights[:, 1] / weights[:, 0])))


METHODS = (
    Method("naee", "arXiv 2402.14800", "drop the experts without which outputs change least",
           lambda layers, x, share: [prune(layer, tokens, count_of(share, layer))
                                     for layer, tokens in zip(layers, x, strict=True)],
           {"share": 0.75}),
    Method("naee-skip", "arXiv 2402.14800", "skip experts of a small weight beside the first's",
           lambda layers, x: [skip(layer, tokens)
                              for layer, tokens in zip(layers, x, strict=True)]),
)
