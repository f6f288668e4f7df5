"""Memory beside the rings, in which a call is one write and its answer one read.

::

    [ front's x, ids, weights ][ submissions ][ back's x, ids, weights ]
    [               front's y ][ completions ][ back's y               ]

Entries of a ring lie one behind the other, so what is to be written together with an entry must
touch the ring. A ring has two ends: two calls can be in flight that are written together with their
submissions, and read together with their completions, whatever their size. The entries between are
moved along, those that are in flight as they are: at most 64 * (entries / 2 - 1) bytes when the
nearer side is free, 448 of a ring of 16, which take 40 nanoseconds where a DMA takes microseconds.
What does not fit, or comes third, is written and read beside its entries.

Commands run one at a time: the workspace is the same for all.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moeaccel.host.memory import COMMAND_ALIGNMENT, Allocator
from moeaccel.host.transports.base import Bytes, Transport
from moeaccel.interface.commands import ENTRY_BYTES

if TYPE_CHECKING:
    from moeaccel.host.rings import Command
    from moeaccel.host.staging import CallShape

__all__ = ["Place", "Reply", "Side", "Sides", "aligned"]

_SHARE = 192
"""A side's inputs take that part of the device's memory, all of it six: 3 %."""

_MOST_BYTES = 4 << 20
"""And at most that: 512 tokens of 2,048 elements in float32, 256 of 4,096."""

_PAGE = 4096


def aligned(size: int) -> int:
    """Return a size rounded up to what a command may name."""
    return -(-size // COMMAND_ALIGNMENT) * COMMAND_ALIGNMENT


def _staging(size: int) -> Bytes:
    """Return page-aligned bytes of zeros, pinned where CUDA is in use: its copies need no other."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True).numpy()
    whole = np.zeros(size + _PAGE, np.uint8)
    return whole[-whole.ctypes.data % _PAGE :][:size]


class Reply(NamedTuple):
    """What a command writes beside the completions.

    Parameters
    ----------
    address, size : :class:`int`
    """

    address: int
    size: int


class Place(NamedTuple):
    """A call in the staging of a side.

    Parameters
    ----------
    side : :class:`Side`
    low, high : :class:`int`
        Bytes of the staging, without the entry.
    entry : :class:`int`
        The submission, but for its tag.
    reply : :class:`Reply`
    """

    side: Side
    low: int
    high: int
    entry: int
    reply: Reply


class Side:
    """One end of both rings.

    Parameters
    ----------
    sides : :class:`Sides`
    front : :class:`bool`
        Before the rings, or behind them.
    """

    def __init__(self, sides: Sides, *, front: bool) -> None:
        self._sides = sides
        self.front = front
        # Kept by whoever holds the command: the rings while it is in flight, its handle.
        self._command: weakref.ref[Command] | None = None
        self.cleared = 0

    @property
    def free(self) -> bool:
        """Whether the device has nothing to do here."""
        command = None if self._command is None else self._command()
        return command is None or command.completion is not None

    def take(self, command: Command) -> None:
        """Give it to a command until that is complete."""
        self._command = weakref.ref(command)

    def inputs(self, size: int) -> tuple[int, int]:
        """Return where inputs of so many bytes go: byte of the staging, and address."""
        sides = self._sides
        low = sides.side_bytes - size if self.front else sides.side_bytes + sides.ring_bytes
        return low, sides.submissions - sides.side_bytes + low

    def reply(self, size: int) -> Reply:
        """Return where a result of so many bytes goes."""
        sides = self._sides
        return Reply(sides.completions + (-size if self.front else sides.ring_bytes), size)


class Sides:
    """Both rings and what is beside them, in device memory and in the host's.

    Parameters
    ----------
    transport : :class:`Transport`
    memory : :class:`Allocator`
    ring_bytes : :class:`int`
        Of each ring.
    """

    def __init__(self, transport: Transport, memory: Allocator, *, ring_bytes: int) -> None:
        self._transport = transport
        self.ring_bytes = ring_bytes
        self.side_bytes = min(memory.size // _SHARE // COMMAND_ALIGNMENT * COMMAND_ALIGNMENT,
                              _MOST_BYTES)
        self._inputs = memory.allocate(2 * self.side_bytes + ring_bytes)
        self._outputs = memory.allocate(2 * self.side_bytes + ring_bytes)
        self._workspace = memory.allocate(2 * self.side_bytes) if self.side_bytes else None
        self.submissions = self._inputs.address + self.side_bytes
        self.completions = self._outputs.address + self.side_bytes
        self.staging = _staging(2 * self.side_bytes + ring_bytes)
        self._view = self.staging.data
        self._front, self._back = Side(self, front=True), Side(self, front=False)
        # How far along the ring moving entries in vain is cheaper than another verb.
        self._far = transport.verb_bytes // ENTRY_BYTES
        self._last = ring_bytes // ENTRY_BYTES - 1

    @property
    def workspace(self) -> int:
        """Address of the partial sums of calls that are beside the rings."""
        assert self._workspace is not None
        return self._workspace.address

    def clear(self) -> None:
        """Write zeros to the completions: memory is not read before it was written."""
        self._transport.memory_write(self.completions, np.zeros(self.ring_bytes, np.uint8))
        self._front.cleared = self._back.cleared = 0

    def choose(self, index: int, shape: CallShape) -> Side | None:
        """Return a free side, the nearer one to the entry with an index, or None."""
        output_bytes, most = shape.output_bytes, self.side_bytes
        if shape.input_bytes > most or output_bytes > most or shape.sum_bytes > 2 * most:
            return None
        sides = (self._front, index), (self._back, self._last - index)
        for side, between in sides if 2 * index <= self._last else sides[::-1]:
            if between <= self._far and side.free:
                if side.cleared < output_bytes:
                    self._clear(side, output_bytes)
                return side
        return None

    def _clear(self, side: Side, size: int) -> None:
        """Write zeros where y goes: it is read whether the device has written it or not."""
        more = min(max(size, 2 * side.cleared), self.side_bytes)
        reply = side.reply(more)
        behind = reply.address + (0 if side.front else side.cleared)
        self._transport.memory_write(behind, np.zeros(more - side.cleared, np.uint8))
        side.cleared = more

    def write(self, index: int, entry: bytes, place: Place | None) -> None:
        """Write a submission, and with it what is in the staging of a side."""
        low = self.side_bytes + ENTRY_BYTES * index
        high = low + ENTRY_BYTES
        self._view[low:high] = entry
        if place is not None:
            low, high = min(low, place.low), max(high, place.high)
        self._transport.memory_write(self._inputs.address + low, self.staging[low:high])

    def read(self, index: int, reply: Reply | None) -> tuple[bytes, Bytes | None]:
        """Return a completion's entry, and with it a reply."""
        where = low = self.completions + ENTRY_BYTES * index
        high = low + ENTRY_BYTES
        if reply is not None:
            low, high = min(low, reply.address), max(high, reply.address + reply.size)
        data = self._transport.memory_read(low, high - low)
        entry = data[where - low : where - low + ENTRY_BYTES].tobytes()
        if reply is None:
            return entry, None
        return entry, data[reply.address - low : reply.address - low + reply.size]
