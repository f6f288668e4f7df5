"""The submission and the completion ring.

Both have the same number of entries and wrap. One entry always stays empty: equal indices mean an
empty ring. A completion is there when ``CQ_TAIL`` has passed it. Its phase bit, which inverts on
every pass around the ring, is not enough: it is in the first beat of an entry that may have eight,
and memory may be read between them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moeaccel.commands import COMPLETION, ENTRY_BYTES, SUBMISSION, Opcode, decode, encode
from moeaccel.host.errors import InvalidOption
from moeaccel.host.memory import Allocator
from moeaccel.host.registers import RegisterAccess
from moeaccel.host.transports.base import Transport

__all__ = ["Completion", "CommandRings"]

logger = logging.getLogger(__name__)

_TAGS = 1 << 16


@dataclass(frozen=True)
class Completion:
    """What the device said at the end of a command.

    Parameters
    ----------
    tag, status, detail, address, cycles : :class:`int`
        As in :data:`moeaccel.commands.COMPLETION`.
    """

    tag: int
    status: int
    detail: int = 0
    address: int = 0
    cycles: int = 0


class CommandRings:
    """Both rings of a device, in its memory.

    Parameters
    ----------
    transport : :class:`Transport`
    memory : :class:`Allocator`
        Of the transport's memory.
    entries_log2 : :class:`int`
        1 to 8: log2 of the entries of each ring.

    Raises
    ------
    InvalidOption
        For a number of entries that the device does not have.
    """

    def __init__(self, transport: Transport, memory: Allocator, *, entries_log2: int) -> None:
        if not 1 <= entries_log2 <= 8:
            raise InvalidOption(f"ring_log2 must be from 1 to 8, not {entries_log2}")
        self._transport = transport
        self._registers = RegisterAccess(transport)
        self._log2 = entries_log2
        size = ENTRY_BYTES << entries_log2
        self._submissions = memory.allocate(size)
        self._completions = memory.allocate(size)
        self._tail = self._head = self._tag = 0
        self._phase = 1
        self._in_flight: set[int] = set()

    @property
    def entries(self) -> int:
        """Entries of each ring."""
        return 1 << self._log2

    @property
    def in_flight(self) -> int:
        """Commands whose completion was not taken yet."""
        return len(self._in_flight)

    @property
    def full(self) -> bool:
        """Whether nothing can be submitted before a completion is taken."""
        return self.in_flight == self.entries - 1

    def reset(self) -> None:
        """Empty the rings and tell a device that is disabled or just reset where they are."""
        self._tail = self._head = 0
        self._phase = 1
        self._in_flight.clear()
        empty = np.zeros(ENTRY_BYTES << self._log2, np.uint8)
        self._transport.memory_write(self._completions.address, empty)
        self._registers.write64("SQ_BASE", self._submissions.address)
        self._registers.write64("CQ_BASE", self._completions.address)
        self._registers.write("RING_LOG2", self._log2)
        self._registers.write("SQ_TAIL", 0)
        self._registers.write("CQ_HEAD", 0)

    def submit(self, values: Mapping[str, int]) -> int:
        """Write a submission, ring the doorbell and return the command's tag.

        Must not be called while :attr:`full`.
        """
        if self.full:
            raise InvalidOption(f"submission ring must have room, but all {self.in_flight} "
                                "entries are in use; take completions first")
        while self._tag in self._in_flight:
            self._tag = (self._tag + 1) % _TAGS
        tag, self._tag = self._tag, (self._tag + 1) % _TAGS
        entry = encode(SUBMISSION, {**values, "tag": tag})
        self._transport.memory_write(self._submissions.address + ENTRY_BYTES * self._tail, entry)
        self._tail = (self._tail + 1) % self.entries
        self._in_flight.add(tag)
        logger.debug("submit tag %d, opcode %d", tag, values.get("opcode", Opcode.NOP))
        self._registers.write("SQ_TAIL", self._tail)
        return tag

    def take(self) -> list[Completion]:
        """Return the new completions, oldest first, and give their entries back."""
        taken: list[Completion] = []
        if not self._in_flight:
            return taken
        begin, tail = self._head, self._registers.read("CQ_TAIL") % self.entries
        while self._head != tail:
            where = self._completions.address + ENTRY_BYTES * self._head
            values = decode(COMPLETION, self._transport.memory_read(where, ENTRY_BYTES).tobytes())
            written = values.pop("phase") == self._phase
            completion = Completion(**values)
            logger.debug("complete tag %d, status %d, %d cycles", completion.tag,
                         completion.status, completion.cycles)
            if not written:  # acknowledged, but not in memory
                logger.warning("completion %d was not written, and is lost", self._head)
            elif completion.tag in self._in_flight:
                self._in_flight.remove(completion.tag)
                taken.append(completion)
            else:
                logger.warning("completion with unknown tag %d dropped", completion.tag)
            self._head = (self._head + 1) % self.entries
            self._phase ^= self._head == 0
        if self._head != begin:
            self._registers.write("CQ_HEAD", self._head)
        return taken
