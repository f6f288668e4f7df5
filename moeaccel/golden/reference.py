"""Float references: what exact arithmetic gives, and what a float model with the same quantisers
gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import hidden as hidden_of
from moeaccel.arithmetic import quantise_elements, quantise_float32, split_float32
from moeaccel.image import Expert

Floats = NDArray[np.float64]


def experts_float64(
    x: NDArray[np.floating],
    ids: NDArray[np.integer],
    weights: NDArray[np.floating],
    gate_up: Sequence[NDArray[np.floating]],
    down: Sequence[NDArray[np.floating]],
    activation: str | Sequence[str] = "silu",
    limit: float | None = None,
    gate_limit: float | None = None,
    gate_up_bias: Sequence[NDArray[np.floating]] | None = None,
    down_bias: Sequence[NDArray[np.floating]] | None = None,
) -> Floats:
    """Return the MoE layer in float64.

    Parameters
    ----------
    x : float array, (T, H)
    ids : integer array, (T, K)
        Negative or ``>= len(down)``: skipped.
    weights : float array, (T, K)
    gate_up, down : sequence of float array
        (2 I, H) as ``[gate; up]``, (I, H), not gated, or (3 I, H) with second up rows; and (H, I).
        I may differ.
    activation : :class:`str` or sequence of str
        Of all, or of each.
    limit, gate_limit : :class:`float`, optional
        As in :class:`moeaccel.image.ExpertShape`.
    gate_up_bias, down_bias : sequence of float array, optional
        (2 I,) or (I,), and (H,).
    """
    x = np.asarray(x, np.float64)
    y = np.zeros((x.shape[0], down[0].shape[0]))
    names: Sequence[str] = (
        [activation] * len(down) if isinstance(activation, str) else activation)
    for e in np.unique(ids[(ids >= 0) & (ids < len(down))]):
        tokens, slots = np.nonzero(ids == e)
        projected = x[tokens] @ np.asarray(gate_up[e], np.float64).T
        if gate_up_bias is not None:
            projected = projected + gate_up_bias[e]
        hidden = hidden_of(projected, down[e].shape[1], names[int(e)], limit, gate_limit)
        out = hidden @ np.asarray(down[e], np.float64).T
        if down_bias is not None:
            out = out + down_bias[e]
        np.add.at(y, tokens, out * np.asarray(weights, np.float64)[tokens, slots][:, None])
    return y


def quantised_float_experts(
    x: NDArray[np.float32],
    ids: NDArray[np.integer],
    weights: NDArray[np.float32],
    layer: Sequence[Expert],
    *,
    planes: int,
) -> Floats:
    """Return the layer in float64 with the device's operand quantisers and nothing else of its
    arithmetic."""
    x_hat = quantise_float32(x, planes)[0].to_float64()
    y = np.zeros((x.shape[0], layer[0].down.integers.shape[0]))
    for e in np.unique(ids[(ids >= 0) & (ids < len(layer))]):
        tokens, slots = np.nonzero(ids == e)
        projected = x_hat[tokens] @ layer[e].gate_up.dequantise().T + layer[e].gate_up.bias_values
        d_expert = layer[e].down.integers.shape[1]
        hidden = hidden_of(layer[e].parts(projected), d_expert, layer[e].activation, layer[e].limit,
                           layer[e].gate_limit)
        significand, exponent, _ = split_float32(hidden.astype(np.float32))
        h_hat = quantise_elements(significand, exponent, planes).to_float64()
        out = h_hat @ layer[e].down.dequantise().T + layer[e].down.bias_values
        np.add.at(y, tokens, out * weights[tokens, slots].astype(np.float64)[:, None])
    return y
