"""What a device does for a cluster, and how it is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig
from moeaccel.host.device import Device
from moeaccel.host.errors import (
    DeviceClosed,
    DeviceStopped,
    DeviceTimeout,
    LinkLost,
)
from moeaccel.host.layers import Experts
from moeaccel.host.router_layer import RouterLayer
from moeaccel.host.routing import Router

__all__ = ["LOST", "LocalShard", "Pairs", "Routed", "Shard", "Worker"]

LOST = (LinkLost, DeviceStopped, DeviceTimeout, DeviceClosed)
"""What a device raises that does not answer any more."""

Floats = NDArray[np.float32]

Routed = tuple[NDArray[np.int64], Floats]
"""Ids and weights, (T, k) each."""


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
        self._routers: dict[int, RouterLayer] = {}

    def load(self, key: int, gate_up: Sequence[Floats], down: Sequence[Floats],
             options: dict[str, Any]) -> None:
        """Load some experts; see :meth:`Device.load_experts`."""
        self._layers[key] = self.device.load_experts(gate_up, down, **options)

    def submit(self, key: int, pairs: Pairs) -> Callable[[], Floats]:
        """Send a call to the device, and return what waits for y."""
        layer = self._layers[key]
        handle = layer.submit(*pairs)
        return lambda: layer.sync(handle)

    def load_router(self, key: int, router: Router) -> None:
        """Load a router; see :meth:`Device.load_router`."""
        self._routers[key] = self.device.load_router(router)

    def route(self, key: int, x: Floats) -> Routed:
        """Return what a router chooses."""
        return self._routers[key].route(x)

    def drop(self, key: int) -> None:
        """Free experts, or a router."""
        layer = self._layers.pop(key, None) or self._routers.pop(key, None)
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
    config : :class:`AcceleratorConfig`
        Of its device.
    """

    name: str
    config: AcceleratorConfig

    @abstractmethod
    def load(self, key: int, gate_up: Sequence[Floats], down: Sequence[Floats],
             options: dict[str, Any]) -> Callable[[], None]:
        """Begin to load some experts under a number, and return what waits for it."""

    @abstractmethod
    def submit(self, key: int, pairs: Pairs) -> Callable[[], Floats]:
        """Begin a call, and return what waits for y, float32 (T, H)."""

    @abstractmethod
    def load_router(self, key: int, router: Router) -> Callable[[], None]:
        """Begin to load a router under a number, and return what waits for it."""

    @abstractmethod
    def route(self, key: int, x: Floats) -> Callable[[], Routed]:
        """Begin to route x, (T, H), and return what waits for ids and weights."""

    @abstractmethod
    def drop(self, key: int) -> None:
        """Free experts, or a router."""

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
        self.device, self.config = device, device.config
        self._worker = Worker(device)

    def load(self, key: int, gate_up: Sequence[Floats], down: Sequence[Floats],
             options: dict[str, Any]) -> Callable[[], None]:
        self._worker.load(key, gate_up, down, options)
        return lambda: None

    def submit(self, key: int, pairs: Pairs) -> Callable[[], Floats]:
        return self._worker.submit(key, pairs)

    def load_router(self, key: int, router: Router) -> Callable[[], None]:
        self._worker.load_router(key, router)
        return lambda: None

    def route(self, key: int, x: Floats) -> Callable[[], Routed]:
        found = self._worker.route(key, x)
        return lambda: found

    def drop(self, key: int) -> None:
        self._worker.drop(key)

    def close(self) -> None:
        """Leave the device open."""


