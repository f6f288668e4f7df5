"""The bound: replacement that knows what comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.residency.base import Residency

__all__ = ["Belady"]


class Belady(Residency):
    """Keep what is used next: ``score = -step of the next use``.

    With bypass: an expert may be used without becoming resident, so that this is the best that any
    policy can do that moves an expert only when it is used (Belady 1966; Mattson et al. 1970).

    Parameters
    ----------
    future : iterable of integer (n_layers, n_experts)
        The steps that will come, as :meth:`step` will get them.
    slots : :class:`int`, or one for each layer
        See :class:`Residency`.

    Raises
    ------
    InvalidOption
        If there is no step; from :meth:`use`, if it is not the one that was announced.
    """

    name = "belady"
    bypass = True

    def __init__(self, *, future: Iterable[np.ndarray], slots: int | Sequence[int]) -> None:
        kept = list(future)
        found = [np.flatnonzero(uses > 0) for uses in kept]
        if not kept:
            raise InvalidOption("the future of Belady must have a step")
        super().__init__(n_layers=kept[0].shape[0], n_experts=kept[0].shape[1], slots=slots)
        # The uses of each expert one after the other, and behind them one that never comes.
        size = self.score.size
        entries = np.concatenate([*found, np.arange(size)])
        steps = np.repeat(np.arange(len(kept) + 1), [len(f) for f in found] + [size])
        order = np.argsort(entries, kind="stable")
        self._times = steps[order]
        self._at = np.searchsorted(entries[order], np.arange(size)).reshape(self.score.shape)
        self._now = [0] * self.score.shape[0]
        self.score[:] = -self._times[self._at]

    def _use(self, layer: int, uses: np.ndarray, used: np.ndarray, mass: np.ndarray | None) -> None:
        at, now = self._at[layer], self._now[layer]
        experts = used.nonzero()[0]
        if not (self._times[at[experts]] == now).all():
            raise InvalidOption("steps of Belady must be those of its future; "
                                f"step {now} uses other experts")
        at[experts] += 1
        self._now[layer] += 1
        self.score[layer, experts] = -self._times[at[experts]]
