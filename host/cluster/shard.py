"""What a device does for a cluster, and how it is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.device import Device
from moeaccel.host.errors import (
    DeviceClosed,
    DeviceStopped,
    DeviceTimeout,
    LinkLost,
)
from moeaccel.host.layers import Experts

__all__ = ["LOST", "LocalShard", "Pairs", "Shard", "Worker"]

LOST = (LinkLost, DeviceStopped, DeviceTimeout, DeviceClosed)
"""What a device raises that does not answer any more."""

Floats = NDArray[np.float32]


class Pairs(NamedTuple):
    """The part of a call that goes to one shard.

    Parameters
    ----------
    x : float32, (T, H)
    ids : int32, (T, K)
        Numbers of experts on the shard, -1 where it has none.
    weights : float32, (T, K)
    """

    x: Floats
    ids: NDArray[np.int32]
    weights: Floats


class Worker:
    """Layers on a device, by number; runs where the device is.

    Parameters
    ----------
    device : :class:`Device`
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._layers: dict[int, Experts] = {}

    def load(self, key: int, gate_up: Sequence[Floats], down: Sequence[Floats],
             options: dict[str, Any]) -> None:
        """Load some experts; see :meth:`Device.load_experts`."""
        self._layers[key] = self.device.load_experts(gate_up, down, **options)

    def submit(self, key: int, pairs: Pairs) -> Callable[[], Floats]:
        """Send a call to the device, and return what waits for y."""
        layer = self._layers[key]
        handle = layer.submit(*pairs)
        return lambda: layer.sync(handle)

    def drop(self, key: int) -> None:
        """Free experts."""
        layer = self._layers.pop(key, None)
        if layer is not None:
            layer.close()


class Shard(ABC):
    """A device of a cluster.

    Every method raises what the device raises, one of :data:`LOST` where it, or the process that
    has it, does not answer any more.

    Attributes
    ----------
    name : :class:`str`
        What errors call it.
    """

    name: str

    @abstractmethod
    def load(self, key: int, gate_up: Sequence[Floats], down: Sequence[Floats],
             options: dict[str, Any]) -> Callable[[], None]:
        """Begin to load some experts under a number, and return what waits for it."""

    @abstractmethod
    def submit(self, key: int, pairs: Pairs) -> Callable[[], Floats]:
        """Begin a call, and return what waits for y, float32 (T, H)."""

    @abstractmethod
    def drop(self, key: int) -> None:
        """Free experts."""

    @abstractmethod
    def close(self) -> None:
        """End what belongs to the cluster alone."""


class LocalShard(Shard):
    """A device that is open in this process; it stays its owner's to close.

    Parameters
    ----------
    device : :class:`Device`
    number : :class:`int`
    """

    def __init__(self, device: Device, number: int) -> None:
        self.name = f"{number}, device of config {device.config.name!r} in this process"
        self.device = device
        self._worker = Worker(device)

    def load(self, key: int, gate_up: Sequence[Floats], down: Sequence[Floats],
             options: dict[str, Any]) -> Callable[[], None]:
        self._worker.load(key, gate_up, down, options)
        return lambda: None

    def submit(self, key: int, pairs: Pairs) -> Callable[[], Floats]:
        return self._worker.submit(key, pairs)

    def drop(self, key: int) -> None:
        self._worker.drop(key)

    def close(self) -> None:
        """Leave the device open."""


