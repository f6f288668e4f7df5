"""One pool for all layers, and what the pass has left behind goes first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["LeastStale"]


class LeastStale(Residency):
    """Evict what is stale: experts that the current forward pass has left behind without using
    them, those of the oldest pass first and of the layer just computed first, since the pass comes
    to it again last; then the least recently used of the layers that are still to come, from the
    end (SpecMD, arXiv 2602.03921). One pool of ``slots * n_layers`` experts: where LRU thrashes in
    a sweep over the layers, this does not.
    """

    name = "least-stale"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.room = sum(self.slots)
        self._held: list[OrderedDict[int, int]] = [OrderedDict() for _ in self.slots]
        self._oldest = np.full(len(self.slots), np.iinfo(np.int64).max)
        self._pass, self._last, self._count = 0, len(self.slots), 0

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        pass

    def use(self, layer: int, uses: np.ndarray, *, mass: np.ndarray | None = None,
            arrived: np.ndarray | None = None, room: int | None = None) -> np.ndarray:
        """Use experts, and let them in; see :meth:`Residency.use`."""
        self._pass += layer <= self._last
        self._last = layer
        held, resident = self._held[layer], self.resident[layer]
        promoted = []
        for expert in uses.nonzero()[0].tolist():
            if expert in held:
                held.move_to_end(expert)
            elif self.room:
                free = arrived is None or bool(arrived[expert])
                if not free and room is not None and len(promoted) >= room:
                    continue
                self._count += 1
                resident[expert] = True
                if not free:
                    promoted.append(expert)
            else:
                continue
            held[expert] = self._pass
        self._first(layer)
        while self._count > self.room:
            self._evict(layer, self._count - self.room)
        return np.array([e for e in promoted if resident[e]], np.int64)

    def _first(self, layer: int) -> None:
        held = self._held[layer]
        self._oldest[layer] = (held[next(iter(held))] if held else np.iinfo(np.int64).max)

    def _evict(self, layer: int, most: int) -> None:
        # Layers behind the pass, least recent use first, the layer just computed first; where the
        # pass has used all that they hold, the end of what is to come.
        behind = self._oldest[: layer + 1]
        place = layer - int(behind[::-1].argmin())
        if behind[place] >= self._pass:
            ahead = (self._oldest[layer + 1 :] < np.iinfo(np.int64).max).nonzero()[0]
            place = layer + 1 + int(ahead[-1]) if len(ahead) else place
        held, stale = self._held[place], self._oldest[place]
        gone = []
        while held and len(gone) < most and held[next(iter(held))] == stale:
            gone.append(held.popitem(last=False)[0])
        self.resident[place, gone] = False
        self._count -= len(gone)
        self._first(place)
