"""Calls that are commands with buffers of their own, one behind the other: those that route."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.errors import HandleConsumed, OutOfDeviceMemory
from moeaccel.host.memory import Allocation
from moeaccel.host.process import Bound
from moeaccel.host.rings import Command

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["Pending", "Sent"]


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
        self.command = Command(name, keep, buffers=buffers, first_token=first_token)
        self._fetched = False
        try:
            for address, raw in inputs.items():
                device.transport.memory_write(address, raw)
            device.submit(fields, self.command)
        except BaseException:
            self.abandon()
            raise

    def fetch(self) -> None:
        """Take what it wrote, if it has completed, and free its buffers; once."""
        if self.command.completion is None or self._fetched:
            return
        if self.command.error() is None:
            self._take()
        self._fetched = True
        self.command.give_back()

    def abandon(self) -> None:
        """Free its buffers as soon as it has completed, or now if it never will."""
        self._fetched = True
        self.command.give_back()
        if self.command.completion is None and self.command not in self._device.in_flight:
            self._buffers.free()


class Pending(Bound):
    """A call on its way, in as many commands as it takes; its buffers go back with it.

    While it is kept they go back when the device's memory runs short: what they hold then waits
    here.

    Parameters
    ----------
    device : :class:`Device`
    owner : object
        Whose call it is, and may take its result.
    collect : callable
        Returns what all of its commands wrote.
    """

    def __init__(self, device: Device, owner: object, collect: Callable[[], Any]) -> None:
        self.owner = owner
        self._device, self._collect = device, collect
        self._parts: list[Sent] = []
        self._taken = False

    @property
    def cycles(self) -> int:
        """Cycles of its commands that have completed; all of them, once there is a result."""
        done = (part.command.completion for part in self._parts)
        return sum(completion.cycles for completion in done if completion is not None)

    def send(self, tokens: int, most: int, start: Callable[[slice], Sent], *,
             together: bool = False) -> Self:
        """Send it in commands as large as limits and free memory allow, and return it.

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
        first = 0
        try:
            with self._device._lock:
                self._device._handles.add(self)  # what has completed is room for the rest
                while first < tokens:
                    part = slice(first, min(first + most, tokens))
                    try:
                        self._parts.append(start(part))
                    except OutOfDeviceMemory:
                        most = (part.stop - first) // 2
                        if not most or together:
                            raise
                    else:
                        first = part.stop
        except BaseException:
            self._abandon()
            raise
        return self

    def result(self, *, timeout_s: float | None = None) -> Any:
        """Wait for all of it, and return what it wrote; once.

        Parameters
        ----------
        timeout_s : :class:`float`, optional
            For each of its commands; the device's when left out, 0: look once, do not wait.

        Raises
        ------
        DeviceTimeout
            If it takes too long; the handle can be used again.
        HandleConsumed
            The second time.
        CommandFailed
            The first that failed.
        """
        if not self._taken:
            for part in self._parts:
                self._device.wait(part.command, timeout_s=timeout_s)
        with self._device._lock:
            if self._taken:
                raise HandleConsumed("handle must be used once; its result was already taken")
            self._fetch()
            self._device._last_cycles = self.cycles
            self._taken = True
        for part in self._parts:
            if (error := part.command.error()) is not None:
                raise error
        return self._collect()

    def only_result(self) -> Any:
        """Return :meth:`result` of a call that nobody else has a handle of."""
        try:
            return self.result()
        except BaseException:
            self._abandon()  # also while the traceback keeps it alive
            raise

    def _fetch(self) -> None:
        """Take what is there, and give its buffers back."""
        for part in self._parts:
            part.fetch()

    def _abandon(self) -> None:
        """Let go of what nobody waits for any more."""
        for part in self._parts:
            part.abandon()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor may have failed early
            self._abandon()
