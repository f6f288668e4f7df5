"""What a driver needs of a device, five verbs; and how devices of a kind are named and opened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.closing import Closing
from moeaccel.config import AcceleratorConfig
from moeaccel.host.process import Bound

__all__ = ["Bytes", "DeviceSpec", "Scheme", "Transport"]

Bytes = NDArray[np.uint8]


class Transport(Bound, Closing, ABC):
    """A way to a device: registers, memory, interrupt.

    Where the device has several memory channels, addresses are ``config.device_address(channel,
    address)``; an access stays within a channel.

    Nothing above this class knows what is behind it. A transport is used by one thread at a time.
    A call may be interrupted by an exception at any moment (Ctrl-C, a signal's handler): it has
    then been done, or in part, or not at all, and the next call works.
    """

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes of device memory on each channel; that of channel 0 starts at address 0."""

    @abstractmethod
    def register_read(self, address: int) -> int:
        """Return the 32-bit register at a byte address."""

    @abstractmethod
    def register_write(self, address: int, value: int) -> None:
        """Write the 32-bit register at a byte address.

        Writes of registers and memory are done in order, before anything that is called later; a
        transport may return earlier and raise their errors from a later call.
        """

    @abstractmethod
    def memory_read(self, address: int, count: int) -> Bytes:
        """Return ``count`` bytes of device memory, uint8 (count,).

        The driver asks for nothing that was not written since the device was powered.
        """

    @abstractmethod
    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        """Write bytes, uint8 (n,), to device memory; see :meth:`register_write`.

        The driver writes whole blocks of 64 bytes at multiples of 64.
        """

    @abstractmethod
    def wait_interrupt(self, timeout_s: float) -> bool:
        """Wait until the interrupt is high and return True, or False when the time is over.

        With 0 this looks once; no wait is longer than some tenths of a second without looking for
        signals (Ctrl-C).
        """

    def reconnect(self) -> bool:
        """Bring a lost connection back and return True, or False if none was lost."""
        return False

    @property
    def verb_bytes(self) -> int:
        """Bytes that take as long to move as a call of :meth:`memory_read` or :meth:`memory_write`
        takes by itself: what may be moved in vain to save one."""
        return 4096

    @property
    def waits_beside(self) -> bool:
        """Whether :meth:`wait_interrupt` may run while other threads use the other verbs."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Let the device go; a second call does nothing."""


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """What was asked of :func:`moeaccel.host.open_device`, checked as far as it can be.

    Parameters
    ----------
    argument : :class:`str`
        What stands behind the colon.
    config : :class:`AcceleratorConfig`
        What the device was built from; None where the scheme has no preset and nobody said.
    memory_bytes : :class:`int`, optional
    timeout_s : :class:`float`
    options : mapping
        All else, by name.
    """

    argument: str
    config: Any
    memory_bytes: int | None
    timeout_s: float
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How devices of a kind are named, ``scheme:ARGUMENT``, and opened.

    The scheme is the name of the file that has it as its ``SCHEME``.

    Parameters
    ----------
    help : :class:`str`
        What is behind it.
    time : :class:`str`
        What cycles and timeouts of such a device are.
    open : callable
        Opens one; returns it and what it was built from.
    argument : :class:`str`
        Name of what stands behind the colon; empty: there is no colon.
    config : :class:`str`, optional
        Preset of a device of which nobody says what it was built from; None: the device says it.
    sized : :class:`bool`
        The device says how much memory it has: ``memory_bytes`` must be left out.
    options : tuple of callables, optional
        The options are their keyword-only arguments; None: ``open`` checks them.
    """

    help: str
    time: str
    open: Callable[[DeviceSpec], tuple[Transport, AcceleratorConfig]]
    argument: str = ""
    config: str | None = "small"
    sized: bool = False
    options: tuple[Callable[..., Any], ...] | None = None
