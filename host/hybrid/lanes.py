"""Where moves run: beside computing on a GPU, in order with it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["CudaLane", "HostLane", "Lane", "lane_for"]

_Result = TypeVar("_Result")


class Lane(Protocol):
    """A stream of moves."""

    def move(self, work: Callable[[], _Result]) -> _Result:
        """Start moves; what they return may be used after :meth:`ready`."""
        ...

    def ready(self) -> None:
        """Let computing that is started from now on wait for the moves."""
        ...


class HostLane:
    """Moves that are done when they are asked for: the torch device is this process."""

    def move(self, work: Callable[[], _Result]) -> _Result:
        return work()

    def ready(self) -> None:
        pass


class CudaLane:
    """Moves on a stream of their own.

    Parameters
    ----------
    device : :class:`torch.device`
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)

    def move(self, work: Callable[[], _Result]) -> _Result:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return work()

    def ready(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def lane_for(device: torch.device) -> Lane:
    """Return a lane for the device on which x is."""
    return CudaLane(device) if device.type == "cuda" else HostLane()
