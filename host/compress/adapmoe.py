"""AdapMoE: skip the experts behind the first where ``H_l w**2 < T``.

Zhong et al., AdapMoE: Adaptive Sensitivity-based Expert Gating and Management for Efficient MoE
Inference, ICCAD 2024, arXiv 2408.10284: w is the weight of the expert, H_l how sensitive the model
is to the layer. Theirs is the sum of the diagonal of a Fisher matrix, which takes gradients; here
it is measured without: the mean over tokens of ``|| f_2(x) - f_1(x) ||**2``, what skipping the
second expert changes for a unit of its weight, over that of the layer's output. T is chosen such
that, over all layers, a share of the second experts is skipped: sensitive layers skip fewer. Of
two weights whose sum is 1, ``w < t`` is ``w < t / (1 - t)`` times the first: that is the device's
threshold, with ``t = sqrt(T / H_l)``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from moeaccel.host.compress.layer import MoELayer, Routing
from moeaccel.host.compress.method import Method, Tokens
from moeaccel.host.errors import InvalidOption

__all__ = ["METHODS", "sensitivity", "skip"]


def sensitivity(layer: MoELayer, x: Tokens, routing: Routing) -> float:
    """Return H_l."""
    outputs = layer.outputs(x)
    tokens = np.arange(len(x))
    difference = outputs[routing.ids[:, 1], tokens] - outputs[routing.ids[:, 0], tokens]
    difference[routing.ids[:, 1] < 0] = 0  # both rows lead to one expert: there is nothing to skip
    own = float(np.square(layer(x)).sum())
    return float(np.square(difference).sum()) / own if own else 0.0


def skip(layers: list[MoELayer], x: list[Tokens], *, skipped: float) -> list[MoELayer]:
    """Return the layers with thresholds that skip a share of the second experts.

    Raises
    ------
    InvalidOption
        If it is no share, or there is no second expert.
    """
    if not 0 <= skipped < 1:
        raise InvalidOption(f"skipped must be a share from 0 to below 1, not {skipped!r}")
    plain = [replace(layer, threshold=0.0) for layer in layers]
    routings = [layer.route(tokens) for layer, tokens in zip(plain, x, strict=True)]
    if any(layer.top_k != 2 or routing.weights.shape[1] != 2
           for layer, routing in zip(layers, routings, strict=True)):
        raise InvalidOption(f"top_k must be 2 for adapmoe, not {[layer.top_k for layer in layers]};"
                            " take naee-skip")
    sensitivities = [sensitivity(layer, tokens, routing)
                     for layer, tokens, routing in zip(plain, x, routings, strict=True)]
    shares = [routing.weights[:, 1] / routing.weights.sum(axis=1) for routing in routings]
    threshold = float(np.quantile(np.concatenate(
        [h * share**2 for h, share in zip(sensitivities, shares, strict=True)]), skipped))
    limits = [min(math.sqrt(threshold / h), 0.5) if h else 0.5 for h in sensitivities]
    return [replace(layer, threshold=limit / (1 - limit))
            for layer, limit in zip(layers, limits, strict=True)]


METHODS = (
    Method("adapmoe", "arXiv 2408.10284", "skip second experts where sensitivity times weight "
           "squared is small", skip, {"skipped": 0.25}),
)
