"""What all importers of token-level ids do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeaccel.host.traces.errors import ForeignTrace, InvalidTrace
from moeaccel.host.traces.trace import RoutingTrace

__all__ = ["trace_of"]


def trace_of(requests: Sequence[np.ndarray], prompts: Sequence[int], *, n_experts: int,
             model: str, source: str) -> RoutingTrace:
    """Return a trace without the layers and tokens that an engine filled in.

    Engines keep a row for each layer of the model, and leave -1 or 0 in all slots of those that
    have no experts; they pad requests to one length with tokens that are -1 throughout.

    Parameters
    ----------
    requests : sequence of integer (tokens, layers, top_k)
        Layers counted from 0.
    prompts : sequence of :class:`int`
        Prompt tokens of each.
    n_experts, model, source
        See :class:`RoutingTrace`.

    Raises
    ------
    ForeignTrace
        If nothing is left, or what is left is no trace of a model with as many experts.
    """
    kept, first = [], []
    for ids, prompt in zip(requests, prompts, strict=True):
        there = np.count_nonzero(ids >= 0, axis=(1, 2)) > 0
        if there.any():
            kept.append(ids[there])
            first.append(int(there[:prompt].sum()))
    if not kept:
        raise ForeignTrace(f"{source} must have a token with routed experts, but has none")
    try:
        layers = np.flatnonzero(np.sum([_routed(ids) for ids in kept], axis=0))
        return RoutingTrace.of_requests(
            [(ids[:, layers], None) for ids in kept], prompts=first, n_experts=n_experts,
            layers=layers.tolist(), model=model, source=source)
    except (InvalidTrace, ValueError) as error:
        raise ForeignTrace(f"{source} must hold the routes of a model with {n_experts} experts, "
                           f"but: {error}") from error


def _routed(ids: np.ndarray) -> np.ndarray:
    """Return how many tokens of each layer have slots that differ, or an only one in use."""
    seen = ids >= 0 if ids.shape[2] == 1 else ids != ids[:, :, :1]
    return np.count_nonzero(seen, axis=(0, 2))
