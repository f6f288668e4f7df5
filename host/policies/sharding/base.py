"""What shardings have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moeaccel.host.errors import InvalidOption

__all__ = ["Sharding", "Shards", "packed"]


@dataclass(frozen=True)
class Shards:
    """Which share of an expert's work each device does.

    Parameters
    ----------
    share : float, (n_layers, n_devices, n_experts)
        An expert's shares add up to 1: 1 on one device; a part on each that has a replica; a part
        on every device where the rows of all experts are dealt out.
    """

    share: np.ndarray

    def loads(self, uses: np.ndarray) -> np.ndarray:
        """Return each device's work.

        Parameters
        ----------
        uses : (n_layers, n_experts)
            Tokens of each expert.

        Returns
        -------
        :class:`numpy.ndarray` of float64, (n_layers, n_devices)
        """
        return np.einsum("lde,le->ld", self.share, uses)

    def imbalance(self, uses: np.ndarray) -> float:
        """Return the busiest device's work over the mean's, averaged over the layers with work."""
        loads = self.loads(uses)
        busy = loads.sum(1) > 0
        return float((loads[busy].max(1) / loads[busy].mean(1)).mean()) if busy.any() else 1.0

    def stays(self, ids: np.ndarray) -> float:
        """Return how likely an expert of the next layer is on the device of an expert of the layer
        before, over all pairs of a token's experts.

        Parameters
        ----------
        ids : integer, (tokens, n_layers, top_k)
            -1: slot not used.
        """
        found, total = 0.0, 0
        for layer in range(ids.shape[1] - 1):
            here, there = ids[:, layer], ids[:, layer + 1]
            a = np.where(here[..., None] >= 0, self.share[layer].T[here], 0).sum(1)
            b = np.where(there[..., None] >= 0, self.share[layer + 1].T[there], 0).sum(1)
            found += float((a * b).sum())
            total += int(((here >= 0).sum(1) * (there >= 0).sum(1)).sum())
        return found / total if total else 1.0


class Sharding(ABC):
    """A way to deal experts to devices.

    Parameters
    ----------
    n_devices : :class:`int`

    Raises
    ------
    InvalidOption
        If there is no device; from :meth:`shard`, if a layer has fewer experts than devices.
    """

    name: ClassVar[str]

    def __init__(self, *, n_devices: int) -> None:
        if n_devices < 1:
            raise InvalidOption(f"n_devices must be at least 1, not {n_devices}")
        self.n_devices = n_devices

    def shard(self, ids: np.ndarray, n_experts: int) -> Shards:
        """Return the shards for routes like these.

        Parameters
        ----------
        ids : integer, (tokens, n_layers, top_k)
            -1: slot not used.
        n_experts : :class:`int`
        """
        if n_experts < self.n_devices:
            raise InvalidOption(f"n_devices must be at most the {n_experts} experts of a layer, "
                                f"not {self.n_devices}")
        return Shards(self._share(ids, n_experts))

    @abstractmethod
    def _share(self, ids: np.ndarray, n_experts: int) -> np.ndarray:
        """Return :attr:`Shards.share`."""

    @staticmethod
    def counts(ids: np.ndarray, n_experts: int) -> np.ndarray:
        """Return how many tokens each expert has, (n_layers, n_experts)."""
        return np.stack([np.bincount(of[of >= 0].ravel(), minlength=n_experts)
                         for of in ids.swapaxes(0, 1)])


def packed(weights: np.ndarray, n_packs: int, room: int) -> np.ndarray:
    """Put items into packs of `room` items, heaviest first, each into the lightest that has room.

    Returns
    -------
    :class:`numpy.ndarray` of integer, like `weights`: the pack of each.
    """
    pack = np.zeros(len(weights), np.int64)
    load, free = np.zeros(n_packs), np.full(n_packs, room)
    for item in (-weights).argsort(kind="stable"):
        chosen = int(np.where(free > 0, load, np.inf).argmin())
        pack[item] = chosen
        load[chosen] += weights[item]
        free[chosen] -= 1
    return pack
