"""Experts that follow each other stay together."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.sharding.base import Sharding

__all__ = ["Affinity"]


class Affinity(Sharding):
    """Maximise ``sum C[l][i, j]`` over the pairs on one device, C how often expert j of layer l + 1
    follows expert i of layer l, with E / D experts a device (ExFlow, arXiv 2401.08383, which solves
    it as an integer program). Here layer by layer: the strongest bonds first, then exchanges of two
    experts as long as one helps.
    """

    name = "affinity"

    def _share(self, ids: np.ndarray, n_experts: int) -> np.ndarray:
        devices, room = self.n_devices, -(-n_experts // self.n_devices)
        home = np.zeros((ids.shape[1], n_experts), np.int64)
        home[0] = np.arange(n_experts) * devices // n_experts
        for layer in range(1, ids.shape[1]):
            bonds = np.zeros((n_experts, devices))  # of the experts here, with each device before
            here, before = ids[:, layer], ids[:, layer - 1]
            for slot in range(ids.shape[2]):
                for earlier in range(ids.shape[2]):
                    both = (here[:, slot] >= 0) & (before[:, earlier] >= 0)
                    np.add.at(bonds, (here[both, slot], home[layer - 1, before[both, earlier]]), 1)
            home[layer] = _exchanged(bonds, _greedy(bonds, room))
        return (np.arange(devices)[:, None] == home[:, None]).astype(float)


def _greedy(bonds: np.ndarray, room: int) -> np.ndarray:
    """Return a device for each expert, the strongest bond first."""
    home = np.full(len(bonds), -1)
    free = np.full(bonds.shape[1], room)
    for place in (-bonds.ravel()).argsort(kind="stable"):
        expert, device = divmod(int(place), bonds.shape[1])
        if home[expert] < 0 and free[device]:
            home[expert] = device
            free[device] -= 1
    return home


def _exchanged(bonds: np.ndarray, home: np.ndarray) -> np.ndarray:
    """Exchange the best pair of experts until no exchange helps."""
    while True:
        own = bonds[np.arange(len(home)), home]
        gain = bonds[:, home] - own[:, None]  # of moving i to where j is
        gain = gain + gain.T
        i, j = divmod(int(gain.argmax()), len(home))
        if gain[i, j] <= 0:
            return home
        home[i], home[j] = home[j], home[i]
