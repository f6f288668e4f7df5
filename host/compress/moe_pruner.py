"""N:M pruning: of each M weights in a row, the N of the highest scores stay.

``magnitude``
    ``S_ij = |W_ij|``.
``activation``
    ``S_ij = |W_ij| * || x_j g ||_2`` over the tokens that went to the expert, g the weight with
    which each was routed there (Xie et al., MoE-Pruner: Pruning Mixture-of-Experts Large Language
    Model using the Hints from Its Router, arXiv 2410.12013, equation 5).

Rows that share a multiplier share a pattern: ``rows`` of them are scored together, by the root of
the sum of their squares.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import hidden
from moeaccel.formats import ALL_FORMATS, WeightFormat, weight_format
from moeaccel.host.compress.layer import FloatExpert, MoELayer
from moeaccel.host.compress.method import Method, Tokens
from moeaccel.host.errors import InvalidOption
from moeaccel.image import interleave_gate_up

__all__ = ["CRITERIA", "METHODS", "input_norms", "kept", "prune", "pruned"]

CRITERIA = ("magnitude", "activation")
"""Pruning criteria."""


def kept(weights: NDArray[np.floating], pattern: tuple[int, int], *,
         norms: NDArray[np.floating] | None = None, rows: int = 1) -> NDArray[np.bool_]:
    """Return which weights stay.

    Parameters
    ----------
    weights : float array, (n, K)
        The last M of a row may be fewer.
    pattern : pair of :class:`int`
        N and M.
    norms : float array, (K,), optional
        Norms of the inputs; by magnitude alone when left out.
    rows : :class:`int`
        Neighbours that share a pattern.

    Returns
    -------
    bool array, (n, K)

    Raises
    ------
    InvalidOption
        If it is no pattern.
    """
    n, m = pattern
    if not 1 <= n < m:
        raise InvalidOption(f"pattern must be N:M with 1 <= N < M, not {n}:{m}")
    scores = np.abs(weights.astype(np.float64))
    if norms is not None:
        scores *= norms
    count, k = scores.shape
    scores = np.pad(scores, ((0, -count % rows), (0, -k % m)), constant_values=-1)
    shared = scores.reshape(-1, rows, scores.shape[1] // m, m)
    shared = np.sqrt((np.maximum(shared, 0) ** 2).sum(axis=1)) if rows > 1 else shared[:, 0]
    order = np.argsort(-shared, axis=2, kind="stable")
    stays = np.zeros(shared.shape, bool)
    np.put_along_axis(stays, order[:, :, :n], True, axis=2)
    return np.repeat(stays.reshape(len(stays), -1), rows, axis=0)[:count, :k]


def input_norms(x: NDArray[np.floating], ids: NDArray[np.integer], weights: NDArray[np.floating],
                expert: int, gate_up: NDArray[np.floating], d_expert: int, activation: str,
                limit: float | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ``|| x_j g ||_2`` of the inputs of an expert's two matrices.

    Parameters
    ----------
    x : float array, (T, H)
    ids, weights : arrays, (T, K)
        How the tokens were routed.
    expert : :class:`int`
        All tokens count alike for one that none was routed to.
    gate_up : float array, (2 I, H) or (I, H)
    d_expert, activation, limit
        I, and how rows become h (:func:`moeaccel.activations.hidden`).

    Returns
    -------
    pair of float64 arrays, (H,) and (I,)
    """
    weight = (weights * (ids == expert)).sum(axis=1, dtype=np.float64)
    if not weight.any():
        weight[:] = 1
    used = weight != 0
    tokens = x[used].astype(np.float64)
    with np.errstate(over="ignore"):
        h = hidden(tokens @ gate_up.T.astype(np.float64), d_expert, activation, limit)
    weight = weight[used, None]
    return np.linalg.norm(tokens * weight, axis=0), np.linalg.norm(h * weight, axis=0)


def pruned(expert: FloatExpert, fmt: WeightFormat, pattern: tuple[int, int],
           norms: tuple[Any, Any] = (None, None), channels: int = 1) -> FloatExpert:
    """Return an expert with zeros where a pattern has no weights.

    Rows that share a multiplier share a pattern: a gate row and its up row, and otherwise rows r
    and r + channels, as they are dealt (:mod:`moeaccel.formats.patterns`).
    """
    rows = 2 if fmt.packed else 1
    gate_up, down = expert.gate_up, expert.down
    if rows == 2 and expert.gated:
        pairs = kept(interleave_gate_up(gate_up), pattern, norms=norms[0], rows=rows)
        stays = np.concatenate([pairs[0::2], pairs[1::2]])
    else:
        stays = _dealt(gate_up, pattern, norms[0], rows, channels)
    return expert.changed(
        gate_up * stays, down * _dealt(down, pattern, norms[1], rows, channels))


def _dealt(weights: NDArray[np.float32], pattern: tuple[int, int], norms: Any, rows: int,
           channels: int) -> NDArray[np.bool_]:
    """Return which weights stay of rows that are dealt to channels one by one."""
    row = np.arange(len(weights))
    order = np.lexsort((row // channels % rows, row % channels, row // (rows * channels)))
    stays = np.empty(weights.shape, bool)
    stays[order] = kept(weights[order], pattern, norms=norms, rows=rows)
    return stays


def prune(layer: MoELayer, x: Tokens, pattern: str, criterion: str) -> MoELayer:
    """Return the layer with N of M weights, for a device of one channel.

    Where there is a format with the pattern, weights are stored in it.

    Raises
    ------
    InvalidOption
        If there is no such pattern or criterion.
    """
    found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", pattern)
    if found is None:
        raise InvalidOption(f"pattern must be N:M, as 2:4, not {pattern!r}")
    if criterion not in CRITERIA:
        raise InvalidOption(f"criterion must be one of {', '.join(CRITERIA)}, not {criterion!r}")
    routing = layer.route(x)
    experts = []
    for e, (expert, name) in enumerate(zip(layer.experts, layer.weight_formats, strict=True)):
        norms = (None, None) if criterion == CRITERIA[0] else input_norms(
            x, routing.ids, routing.weights, e, expert.gate_up, expert.down.shape[1],
            expert.activation, expert.limit)
        experts.append(pruned(expert, weight_format(name), (int(found[1]), int(found[2])), norms))
    return replace(layer, experts=tuple(experts), weight_formats=tuple(
        thin if (thin := f"{name}+{pattern}") in ALL_FORMATS else name
        for name in layer.weight_formats))


METHODS = tuple(
    Method(name, source, text,
           lambda layers, x, pattern, criterion=criterion: [
               prune(layer, tokens, pattern, criterion)
               for layer, tokens in zip(layers, x, strict=True)],
           {"pattern": "2:4"})
    for name, source, text, criterion in (
        ("magnitude", "", "keep the largest N of M weights", CRITERIA[0]),
        ("moe-pruner", "arXiv 2410.12013", "keep N of M weights by |W| times the norm of x g",
         CRITERIA[1])))
