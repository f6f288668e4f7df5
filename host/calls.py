"""Calls that are commands with buffers of their own, one behind the other: those that route."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.errors import CommandFailed, DeviceTimeout, HandleConsumed, OutOfDeviceMemory
from moeaccel.host.memory import Allocation
from moeaccel.host.rings import Command

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["Pending", "Sent", "send_parts"]


class Sent:
    """A command on its way, of which somebody wants what it writes.

    Parameters
    ----------
    device : :class:`Device`
    name : :class:`str`
        Of the command.
    fields : mapping
        Of the submission.
    buffers : :class:`Allocation`
        Of the command alone; freed with it, also if it cannot be sent.
    inputs : mapping of int to uint8 array
        What is written first, by address.
    take : callable
        Reads what the command wrote.
    keep : sequence
        What must stay in device memory until it has completed.
    first_token : :class:`int`
        Row of the caller's x that is its first token.
    """

    def __init__(self, device: Device, name: str, fields: Mapping[str, int], *,
                 buffers: Allocation, inputs: Mapping[int, NDArray[np.uint8]],
                 take: Callable[[], None], keep: tuple[object, ...] = (), first_token: int = 0
                 ) -> None:
        self._device, self._buffers, self._take = device, buffers, take
        self._command = Command(name, keep, buffers=buffers, first_token=first_token)
        self.settled = False
        self.cycles = 0
        self.error: CommandFailed | None = None
        try:
            with device._lock:  # a transport serves one thread at a time
                for address, raw in inputs.items():
                    device.transport.memory_write(address, raw)
                device.submit(fields, self._command)
        except BaseException:
            self.abandon()
            raise

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait for it, take what it wrote, and free its buffers; a second call does nothing.

        Raises
        ------
        DeviceTimeout, DeviceStopped, ...
            If the device does not complete it; it is still on its way. That it failed is
            :attr:`error`.
        """
        if self.settled:
            return
        self.cycles = self._device.wait(self._command, timeout_s=timeout_s).cycles
        try:
            self.error = self._command.error()
            if self.error is None:
                with self._device._lock:
                    self._take()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Free its buffers as soon as it has completed, or now if it never will."""
        if not self.settled:
            self.settled = True
            self._command.give_back()
            if self._command.completion is None and self._command not in self._device.in_flight:
                self._buffers.free()


class Pending:
    """A call on its way, in as many commands as it takes; its buffers go back with it.

    Parameters
    ----------
    device : :class:`Device`
    parts : list of :class:`Sent`
    collect : callable
        Returns what all of them wrote.
    owner : :class:`object`, optional
        Whose call it is.
    """

    def __init__(self, device: Device, parts: list[Sent], collect: Callable[[], Any],
                 owner: object = None) -> None:
        self._device, self._parts, self._collect = device, parts, collect
        self.owner = owner
        self._taken = False

    @property
    def cycles(self) -> int:
        """Cycles of its commands that have completed; all of them, once there is a result."""
        return sum(part.cycles for part in self._parts)

    def result(self, *, timeout_s: float | None = None, again: bool = False) -> Any:
        """Wait for all of it, and return what it wrote; once.

        Parameters
        ----------
        timeout_s : :class:`float`, optional
            For each command; the device's when left out.
        again : :class:`bool`
            After a timeout it may be asked again.

        Raises
        ------
        HandleConsumed
            The second time.
        CommandFailed
            The first that failed.
        """
        if self._taken:
            raise HandleConsumed("handle must be used once; its result was already taken")
        self._taken = True
        try:
            for part in self._parts:
                part.settle(timeout_s)
                if part.error is not None:
                    raise part.error
        except BaseException as error:
            if again and isinstance(error, DeviceTimeout):
                self._taken = False
            else:
                self.abandon()
            raise
        self._device._last_cycles = self.cycles
        return self._collect()

    def abandon(self) -> None:
        """Let go of what nobody waits for any more."""
        for part in self._parts:
            part.abandon()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor may have failed early
            self.abandon()


def send_parts(tokens: int, most: int, start: Callable[[slice], Sent], *,
               together: bool = False) -> list[Sent]:
    """Send a call in commands as large as limits and free memory allow.

    Parameters
    ----------
    tokens, most : :class:`int`
        Of the call, and of a command.
    start : callable
        Sends the command of some tokens.
    together : :class:`bool`
        They are of one command or of none.

    Raises
    ------
    OutOfDeviceMemory
        If not even the buffers of one token fit.
    """
    parts: list[Sent] = []
    first = 0
    try:
        while first < tokens:
            part = slice(first, min(first + most, tokens))
            try:
                parts.append(start(part))
            except OutOfDeviceMemory:
                waiting = [one for one in parts if not one.settled]
                for one in waiting:  # their buffers are room for this one
                    one.settle()
                most = most if waiting else (part.stop - first) // 2
                if not most or together:
                    raise
            else:
                first = part.stop
    except BaseException:
        for one in parts:
            one.abandon()
        raise
    return parts
