"""The submission and the completion ring.

Both have the same number of entries and wrap. One entry always stays empty: equal indices mean an
empty ring. A completion is there when ``CQ_TAIL`` has passed it. Its phase bit, which inverts on
every pass around the ring, is not enough: it is in the first beat of an entry that may have eight,
and memory may be read between them.

A call may be interrupted anywhere (Ctrl-C, a signal's handler). So nothing here is half done: a
command is in flight before its doorbell rings, and whether it rang is asked of the device by
whoever comes next; a completion is taken by one statement, and entries are given back by whoever
comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeaccel.host.errors import LOST, CommandFailed, InvalidOption, command_error
from moeaccel.host.memory import Allocation, Allocator
from moeaccel.host.registers import RegisterAccess
from moeaccel.host.transports.base import Transport
from moeaccel.interface.commands import (
    COMPLETION,
    ENTRY_BYTES,
    SUBMISSION,
    Opcode,
    Status,
    decode,
    encode,
)

__all__ = ["Command", "CommandRings", "Completion"]

logger = logging.getLogger(__name__)

_TAGS = 1 << 16


@dataclass(frozen=True)
class Completion:
    """What the device said at the end of a command.

    Parameters
    ----------
    tag, status, detail, address, cycles, underflows : :class:`int`
        As in :data:`moeaccel.interface.commands.COMPLETION`; status :data:`LOST` where it was not
        written.
    """

    tag: int
    status: int
    detail: int = 0
    address: int = 0
    cycles: int = 0
    underflows: int = 0


class Command:
    """A command on its way: what it is, what it needs alive, and how it ended.

    Parameters
    ----------
    name : :class:`str`
        For messages.
    keep : sequence
        Whatever must stay in device memory until it has completed.
    buffers : :class:`Allocation`, optional
        Of this command alone; they go back when it has completed and :attr:`wanted` is false.
    first_token : :class:`int`
        Row of the caller's x that is this command's first token.

    Attributes
    ----------
    wanted : :class:`bool`
        Whether somebody will read what it wrote.
    """

    def __init__(self, name: str, keep: Sequence[object] = (), *,
                 buffers: Allocation | None = None, first_token: int = 0) -> None:
        self.name = name
        self.keep = keep
        self.buffers = buffers
        self.first_token = first_token
        self.wanted = True
        self.completion: Completion | None = None

    def error(self) -> CommandFailed | None:
        """Return why it failed; None if it succeeded or is not complete."""
        done = self.completion
        if done is None or done.status == Status.OK:
            return None
        return command_error(done.status, done.detail, done.address, first_token=self.first_token)

    def finish(self, completion: Completion) -> None:
        """Take note of its end; a second call changes nothing."""
        self.completion = completion
        self.keep = ()
        if not self.wanted:
            self.give_back()

    def give_back(self) -> None:
        """Free the buffers, once nobody wants what is in them: at the end, if it is not there."""
        self.wanted = False
        if self.completion is not None and self.buffers is not None:
            self.buffers.free()


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
        # Since the last reset: commands offered to the device, completions taken, and entries of
        # the completion ring that the device knows to be free again.
        self._submitted = self._taken = self._told = 0
        self._offered: tuple[int, int] | None = None  # (tag, number behind it), if perhaps rung
        self._tag = 0
        self._cycles = 0
        self._in_flight: dict[int, Command] = {}

    @property
    def entries(self) -> int:
        """Entries of each ring."""
        return 1 << self._log2

    @property
    def in_flight(self) -> int:
        """Commands whose completion was not taken yet."""
        return len(self._in_flight)

    @property
    def commands(self) -> tuple[Command, ...]:
        """Those commands, oldest first."""
        return tuple(self._in_flight.values())

    @property
    def cycles(self) -> int:
        """Cycles of every completion taken so far."""
        return self._cycles

    @property
    def full(self) -> bool:
        """Whether nothing can be submitted before a completion is taken."""
        return self.in_flight >= self.entries - 1

    def drop(self) -> None:
        """End every command in flight with ABORTED: after a reset, or when nobody will ask."""
        for tag, command in self._in_flight.items():
            command.finish(Completion(tag, Status.ABORTED))
        self._in_flight = {}
        self._offered = None

    def reset(self) -> None:
        """Empty the rings and tell a device that is disabled or just reset where they are."""
        self.drop()
        self._submitted = self._taken = self._told = 0
        empty = np.zeros(ENTRY_BYTES << self._log2, np.uint8)
        self._transport.memory_write(self._completions.address, empty)
        self._registers.write64("SQ_BASE", self._submissions.address)
        self._registers.write64("CQ_BASE", self._completions.address)
        self._registers.write("RING_LOG2", self._log2)
        self._registers.write("SQ_TAIL", 0)
        self._registers.write("CQ_HEAD", 0)

    def submit(self, values: Mapping[str, int], command: Command | None = None) -> int:
        """Write a submission, ring the doorbell and return the command's tag.

        Must not be called while :attr:`full`.
        """
        self._settle()
        if self.full:
            raise InvalidOption(f"submission ring must have room, but all {self.in_flight} "
                                "entries are in use; take completions first")
        while self._tag in self._in_flight:
            self._tag = (self._tag + 1) % _TAGS
        tag, self._tag = self._tag, (self._tag + 1) % _TAGS
        entry = encode(SUBMISSION, {**values, "tag": tag})
        where = self._submissions.address + ENTRY_BYTES * (self._submitted % self.entries)
        self._transport.memory_write(where, entry)
        behind = self._submitted + 1
        self._offered = tag, behind
        self._in_flight[tag] = command or Command("command")
        logger.debug("submit tag %d, opcode %d", tag, values.get("opcode", Opcode.NOP))
        self._registers.write("SQ_TAIL", behind % self.entries)
        self._submitted = behind
        self._offered = None
        return tag

    def _settle(self) -> None:
        """Find out whether the doorbell of an interrupted submission has rung."""
        if self._offered is None:
            return
        tag, behind = self._offered
        if self._registers.read("SQ_TAIL") % self.entries == behind % self.entries:
            self._submitted = behind
        elif (command := self._in_flight.get(tag)) is not None:
            command.finish(Completion(tag, Status.ABORTED))
            del self._in_flight[tag]
        self._offered = None

    def take(self) -> list[Completion]:
        """Return the new completions, oldest first, and give their entries back.

        Their commands have been told.
        """
        self._settle()
        taken: list[Completion] = []
        if self._in_flight:
            tail = self._registers.read("CQ_TAIL") % self.entries
            while self._taken % self.entries != tail:
                if (completion := self._next()) is not None:
                    taken.append(completion)
        if self._told != self._taken:
            told = self._taken
            self._registers.write("CQ_HEAD", told % self.entries)
            self._told = told
        return taken

    def _next(self) -> Completion | None:
        """Take an entry; return its completion, unless it is nobody's."""
        number = self._taken
        where = self._completions.address + ENTRY_BYTES * (number % self.entries)
        values = decode(COMPLETION, self._transport.memory_read(where, ENTRY_BYTES).tobytes())
        written = values.pop("phase") == 1 ^ number // self.entries & 1
        completion = Completion(**values)
        if not written and self._in_flight:
            # Acknowledged, but not in memory. Commands complete in order: it is the oldest one's.
            completion = Completion(next(iter(self._in_flight)), LOST)
            logger.warning("completion %d, of tag %d, was not written, and is lost",
                           number % self.entries, completion.tag)
        command = self._in_flight.get(completion.tag)
        if command is None:
            logger.warning("completion with unknown tag %d dropped", completion.tag)
            self._taken = number + 1
            return None
        logger.debug("complete tag %d, status %d, %d cycles", completion.tag, completion.status,
                     completion.cycles)
        command.finish(completion)
        cycles = self._cycles + completion.cycles
        left = {tag: one for tag, one in self._in_flight.items() if one is not command}
        # One statement without a call: an interrupt comes before or behind all of it.
        self._taken, self._cycles, self._in_flight = number + 1, cycles, left
        return completion
