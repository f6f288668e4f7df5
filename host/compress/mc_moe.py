"""Bits for each expert under a budget of bytes: the integer programme of MC-MoE.

Each expert gets one of some formats, such that the sum of ``f_e**a * w_e**b * error_e(format)`` is
least while the bytes stay within the budget (Huang et al., Mixture Compressor for
Mixture-of-Experts LLMs Gains More, arXiv 2410.06270, equation 6): f is how often an expert is
routed to, w the mean weight with which, error the Frobenius norm of what quantising changes. Their
code has a = 1 and b = 1.5.

Experts are few and budgets are coarse, so it is solved exactly, by dynamic programming over
(expert, bytes in units of the greatest common divisor of all sizes), or, where that has more than
``STATES`` states, with sizes rounded up to a unit that has not: within the budget always, and
optimal to one unit for each expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.compress.layer import MoELayer
from moeaccel.host.compress.method import Method, Tokens
from moeaccel.host.errors import InvalidOption
from moeaccel.image import Expert

__all__ = ["FORMATS", "FREQUENCY_POWER", "METHODS", "WEIGHT_POWER", "allocate", "importance",
           "mix"]

FORMATS = ("int4_g128", "int4_g32", "mxint8")
"""Formats to choose from when none are named."""

FREQUENCY_POWER, WEIGHT_POWER = 1.0, 1.5

STATES = 1 << 14
"""Budgets that are told apart at most."""


def importance(ids: NDArray[np.integer], weights: NDArray[np.floating],
               experts: int) -> NDArray[np.float64]:
    """Return ``f_e**a * w_e**b`` of each expert, from how tokens, (T, K), were routed."""
    chosen = (ids >= 0) & (ids < experts)
    counts = np.bincount(ids[chosen], minlength=experts).astype(np.float64)
    sums = np.bincount(ids[chosen], weights[chosen].astype(np.float64), minlength=experts)
    mean = np.divide(sums, counts, out=np.zeros(experts), where=counts > 0)
    return (counts / max(1, len(ids))) ** FREQUENCY_POWER * mean**WEIGHT_POWER


def allocate(costs: NDArray[np.floating], sizes: NDArray[np.integer],
             budget: int) -> NDArray[np.int64]:
    """Return the choice for each expert of the least total cost within a budget.

    Parameters
    ----------
    costs : float array, (E, F)
        Of each choice.
    sizes : integer array, (E, F)
        Bytes of each choice, positive.
    budget : :class:`int`
        Bytes of all.

    Returns
    -------
    int64 array, (E,): indices of the choices.

    Raises
    ------
    InvalidOption
        If not even the smallest choices fit.
    """
    sizes = np.asarray(sizes, np.int64)
    least = int(sizes.min(axis=1).sum())
    if budget < least:
        raise InvalidOption(f"budget must be at least the {least:,} bytes of the smallest choices, "
                            f"not {budget:,}")
    budget = min(budget, int(sizes.max(axis=1).sum()))
    # What every expert costs at least is no choice.
    extra = sizes - sizes.min(axis=1, keepdims=True)
    room = budget - least
    unit = max(math.gcd(*extra.reshape(-1).tolist()) or 1, -(-room // STATES))
    steps = -(-extra // unit)
    states = room // unit + 1
    best = np.zeros(states)
    chosen = np.zeros((len(costs), states), np.int64)
    for e, (cost, step) in enumerate(zip(costs, steps, strict=True)):
        options = np.full((len(cost), states), np.inf)
        for choice, (value, away) in enumerate(zip(cost.tolist(), step.tolist(), strict=True)):
            if away < states:
                options[choice, away:] = best[: states - away] + value
        chosen[e] = options.argmin(axis=0)
        best = options.min(axis=0)
    state = int(best.argmin())
    found = np.zeros(len(costs), np.int64)
    for e in reversed(range(len(costs))):
        found[e] = chosen[e, state]
        state -= int(steps[e, found[e]])
    return found


def mix(layer: MoELayer, x: Tokens, bits: float, formats: Sequence[str] = FORMATS) -> MoELayer:
    """Return the layer with a format for each expert, of so many stored bits a weight on average.

    Raises
    ------
    InvalidOption
        If the smallest formats are larger than that.
    """
    routing = layer.route(x)
    errors = np.zeros((len(layer.experts), len(formats)))
    sizes = np.zeros(errors.shape, np.int64)
    for e, expert in enumerate(layer.experts):
        for f, name in enumerate(formats):
            stored = Expert.quantise(expert.gate_up, expert.down, name,
                                     activation=expert.activation, limit=expert.limit)
            errors[e, f] = math.hypot(*(np.linalg.norm(found - exact) for found, exact in zip(
                stored.floats(), (expert.gate_up, expert.down), strict=True)))
            sizes[e, f] = stored.shape(1).stored_bytes
    costs = importance(routing.ids, routing.weights, len(layer.experts))[:, None] * errors
    budget = int(bits / 8 * sum(expert.size for expert in layer.experts))
    return replace(layer, weight_formats=tuple(
        formats[choice] for choice in allocate(costs, sizes, budget)))


METHODS = (
    Method("mc-moe", "arXiv 2410.06270", "choose a format for each expert under a budget of bytes",
           lambda layers, x, bits: [mix(layer, tokens, bits)
                                    for layer, tokens in zip(layers, x, strict=True)],
           {"bits": 5.5}),
)
