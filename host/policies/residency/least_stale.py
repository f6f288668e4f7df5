"""One pool for all layers, and what the pass has left behind goes first."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.policies.residency.base import Residency

__all__ = ["LeastStale"]

_NEVER = np.iinfo(np.int64).max
_NOTHING = np.zeros(0, np.int64)


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
        self._stamp = np.zeros(self.resident.shape, np.int64)  # pass of the last use
        self._oldest = np.full(len(self.slots), _NEVER)  # of what a layer holds
        self._pass, self._last, self._count = 0, len(self.slots), 0

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        self._stamp[layer, used] = self._pass

    def use(self, layer: int, uses: np.ndarray, *, mass: np.ndarray | None = None,
            arrived: np.ndarray | None = None, room: int | None = None) -> np.ndarray:
        """Use experts, and let them in; see :meth:`Residency.use`."""
        self._pass += layer <= self._last
        self._last = layer
        resident = self.resident[layer]
        used = uses.nonzero()[0]  # few of many
        self._stamp[layer][used] = self._pass
        new, moving = used[~resident[used]], _NOTHING
        if not self.room:
            return moving
        if arrived is not None and len(new):
            new, moving = self._within(new, self._stamp[layer], arrived, room)
        if len(new):
            resident[new] = True
            self._count += len(new)
        self._look(layer)
        while self._count > self.room:
            self._evict(layer, self._count - self.room)
        return moving[resident[moving]] if len(moving) else moving

    def _look(self, layer: int) -> None:
        stamps = self._stamp[layer][self.resident[layer]]
        # argmin is quicker than min for so few
        self._oldest[layer] = stamps[stamps.argmin()] if len(stamps) else _NEVER

    def _evict(self, layer: int, most: int) -> None:
        # Layers behind the pass, least recent use first, the layer just computed first; where the
        # pass has used all that they hold, the end of what is to come.
        behind = self._oldest[: layer + 1]
        place = layer - int(behind[::-1].argmin())
        if behind[place] >= self._pass:
            ahead = (self._oldest[layer + 1 :] < _NEVER).nonzero()[0]
            place = layer + 1 + int(ahead[-1]) if len(ahead) else place
        stale = self.resident[place] & (self._stamp[place] == self._oldest[place])
        gone = stale.nonzero()[0][:most]
        self.resident[place, gone] = False
        self._count -= len(gone)
        self._look(place)
