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
    cuda
        What :mod:`torch.cuda` does.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._stream: Any = cuda.Stream(device)
        self._moved: Any = ()

    def move(self, work: Callable[[], _Result]) -> _Result:
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            moved = work()
        self._moved = moved
        return moved

    def ready(self) -> None:
        current = self._cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # Their memory is the other stream's: it must not be used again before this one has read it.
        for one in self._moved:
            if getattr(one, "is_cuda", False):
                one.record_stream(current)
        self._moved = ()


def lane_for(device: torch.device) -> Lane:
    """Return a lane for the device on which x is."""
    return CudaLane(device) if device.type == "cuda" else HostLane()
