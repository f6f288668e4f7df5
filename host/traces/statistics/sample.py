"""What the statistics of a trace are computed from."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from moeaccel.host.traces.trace import RoutingTrace

__all__ = ["Sample"]

_ENTRIES = 64 << 20  # of the masks of all tokens, layers and experts; a byte each


class Sample:
    """A trace by requests, and as masks; of long traces the first requests.

    Parameters
    ----------
    trace : :class:`RoutingTrace`
    seed : :class:`int`
        Of what is drawn at random, such as the members of a batch.
    """

    def __init__(self, trace: RoutingTrace, *, seed: int = 0) -> None:
        self.trace = trace
        self.n_experts, self.top_k = trace.n_experts, trace.top_k
        self.random = np.random.default_rng(seed)
        room = max(1, _ENTRIES // (trace.n_layers * trace.n_experts))
        self.requests: list[np.ndarray] = []
        for _, ids in trace.sequences():
            if room <= 0:
                break
            self.requests.append(ids[:room])
            room -= len(ids)

    @cached_property
    def masks(self) -> list[np.ndarray]:
        """For each request bool (tokens, layers, experts): who has the token."""
        return [self._mask(ids) for ids in self.requests]

    def _mask(self, ids: np.ndarray) -> np.ndarray:
        mask = np.zeros((*ids.shape[:2], self.n_experts + 1), bool)
        np.put_along_axis(mask, np.where(ids < 0, self.n_experts, ids).astype(np.int64), True, 2)
        return mask[..., :-1]

    def stream(self, tokens: int, *, layers: int | None = None) -> np.ndarray:
        """Return the masks of the first tokens, request after request, of some layers only.

        Returns
        -------
        :class:`numpy.ndarray` of bool, (tokens, layers, experts)
        """
        chosen = self.layers(layers or self.trace.n_layers)
        found, room = [], tokens
        for mask in self.masks:
            found.append(mask[:room, chosen])
            room -= len(mask)
            if room <= 0:
                break
        return np.concatenate(found)

    def layers(self, count: int) -> list[int]:
        """Return up to `count` layers, from the first to the last, evenly spread."""
        places = np.linspace(0, self.trace.n_layers - 1, min(count, self.trace.n_layers))
        return sorted({round(place) for place in places.tolist()})
