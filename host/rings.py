"""The submission and the completion ring.

Both have the same number of entries and wrap. One entry always stays empty: equal indices mean an
empty ring. A completion is there when ``CQ_TAIL`` has passed it. Its phase bit, which inverts on
every pass around the ring, is not enough: it is in the first beat of an entry that may have eight,
and memory may be read between them.

Beside the rings lies memory for two calls in flight, :mod:`moeaccel.host.sides`: such a call is
written together with its entry, and its result is read together with its completion.

``CQ_TAIL`` need not be read where the interrupt says the same: while there was nothing in flight
when the interrupt was cleared last, the next one means that the oldest command has completed, as
completions come in order. ``CQ_HEAD`` is told when the device would run out of entries.

A call may be interrupted anywhere (Ctrl-C, a signal's handler). So nothing here is half done: a
command is in flight before its doorbell rings, and whether it rang is asked of the device by
whoever comes next; a completion is taken by one statement, and entries are given back by whoever
comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from moeaccel.host.errors import LOST, CommandFailed, InvalidOption, command_error
from moeaccel.host.memory import Allocation, Allocator
from moeaccel.host.registers import RegisterAccess, mask
from moeaccel.host.sides import Place, Reply, Side, Sides
from moeaccel.host.transports.base import Bytes, Transport
from moeaccel.interface.commands import (
    COMPLETION,
    ENTRY_BYTES,
    SUBMISSION,
    Status,
    decoder,
    encode,
    field_of,
)
from moeaccel.interface.registers import REGISTERS

if TYPE_CHECKING:
    from moeaccel.host.staging import CallShape

__all__ = ["Command", "CommandRings", "Completion"]

logger = logging.getLogger(__name__)

_TAGS = 1 << 16
_TAG_OFFSET = field_of(SUBMISSION, "tag").offset
_COMPLETION = mask("IRQ_STATUS", "completion")
_decode = decoder(COMPLETION)
_PHASE = COMPLETION.index(field_of(COMPLETION, "phase"))
_IRQ_STATUS, _SQ_TAIL = (REGISTERS[name].address for name in ("IRQ_STATUS", "SQ_TAIL"))


class Completion(NamedTuple):
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
    reply : :class:`Reply`, optional
        Where it writes what is read together with its completion.
    raw : uint8 array, optional
        That, once it is complete and did not fail.
    """

    __slots__ = ("__weakref__", "buffers", "completion", "first_token", "keep", "name", "raw",
                 "reply", "wanted")

    def __init__(self, name: str, keep: Sequence[object] = (), *,
                 buffers: Allocation | None = None, first_token: int = 0) -> None:
        self.name = name
        self.keep = keep
        self.buffers = buffers
        self.first_token = first_token
        self.wanted = True
        self.reply: Reply | None = None
        self.raw: Bytes | None = None
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
    polling : :class:`bool`
        Nobody waits for interrupts.

    Raises
    ------
    InvalidOption
        For a number of entries that the device does not have.
    """

    def __init__(self, transport: Transport, memory: Allocator, *, entries_log2: int,
                 polling: bool = False) -> None:
        if not 1 <= entries_log2 <= 8:
            raise InvalidOption(f"ring_log2 must be from 1 to 8, not {entries_log2}")
        self._transport = transport
        self._registers = RegisterAccess(transport)
        self._log2 = entries_log2
        self._polling = polling
        self._sides = Sides(transport, memory, ring_bytes=ENTRY_BYTES << entries_log2)
        # Since the last reset: commands offered to the device, completions taken, and entries of
        # the completion ring that the device knows to be free again.
        self._submitted = self._taken = self._told = 0
        self._offered: tuple[int, int] | None = None  # (tag, number behind it), if perhaps rung
        self._alone = False  # the next interrupt is the oldest command's
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
    def announced(self) -> bool:
        """Whether the next interrupt says that the oldest command is complete, and nothing else
        does."""
        return self._alone and self._offered is None

    @property
    def cycles(self) -> int:
        """Cycles of every completion taken so far."""
        return self._cycles

    @property
    def full(self) -> bool:
        """Whether nothing can be submitted before a completion is taken."""
        return len(self._in_flight) >= (1 << self._log2) - 1

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
        self._alone = False
        self._sides.clear()
        self._registers.write64("SQ_BASE", self._sides.submissions)
        self._registers.write64("CQ_BASE", self._sides.completions)
        self._registers.write("RING_LOG2", self._log2)
        self._registers.write("SQ_TAIL", 0)
        self._registers.write("CQ_HEAD", 0)

    @property
    def workspace(self) -> int:
        """Address of the workspace of calls beside the rings."""
        return self._sides.workspace

    @property
    def staging(self) -> Bytes:
        """What the host writes: both sides and the submissions between them."""
        return self._sides.staging

    def side(self, shape: CallShape) -> Side | None:
        """Return a side that has room for a call that is submitted next, or None.

        It has to be put into its staging, and submitted, before anything else is.
        """
        return self._sides.choose(self._submitted & ((1 << self._log2) - 1), shape)

    def submit(self, values: Mapping[str, int], command: Command | None = None) -> int:
        """Write a submission, ring the doorbell and return the command's tag.

        Must not be called while :attr:`full`.
        """
        entry = int.from_bytes(encode(SUBMISSION, values), "little")
        return self._offer(entry, command or Command("command"), None)

    def submit_beside(self, place: Place, command: Command) -> int:
        """Submit a call whose arrays are in the staging of a side; see :meth:`submit`."""
        command.reply = place.reply
        place.side.take(command)
        return self._offer(place.entry, command, place)

    def _offer(self, entry: int, command: Command, place: Place | None) -> int:
        self._settle()
        entries = 1 << self._log2
        if len(self._in_flight) >= entries - 1:
            raise InvalidOption(f"submission ring must have room, but all {self.in_flight} "
                                "entries are in use; take completions first")
        while self._tag in self._in_flight:
            self._tag = (self._tag + 1) % _TAGS
        tag, self._tag = self._tag, (self._tag + 1) % _TAGS
        number = self._submitted
        behind = number + 1
        if self._taken - self._told + len(self._in_flight) + 1 >= entries:
            self._tell()
        if not (self._in_flight or self._alone or self._polling):
            # Whatever came before this command: nothing of it is left.
            self._transport.register_write(_IRQ_STATUS, _COMPLETION)
            self._alone = True
        self._sides.write(number % entries, (entry | tag << _TAG_OFFSET).to_bytes(64, "little"),
                          place)
        self._offered = tag, behind
        self._in_flight[tag] = command
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("submit tag %d, %s", tag, command.name)
        self._transport.register_write(_SQ_TAIL, behind % entries)
        self._submitted = behind
        self._offered = None
        return tag

    def _tell(self) -> None:
        """Give the entries of what was taken back to the device."""
        told = self._taken
        if self._told != told:
            self._registers.write("CQ_HEAD", told % self.entries)
            self._told = told

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
        """Ask the device, and return the new completions, oldest first.

        Their commands have been told.
        """
        self._settle()
        taken: list[Completion] = []
        if self._in_flight:
            tail = self._registers.read("CQ_TAIL") % self.entries
            while self._taken % self.entries != tail:
                self._alone = False  # their interrupt may come, or be there, still
                if (completion := self._next()) is not None:
                    taken.append(completion)
        return taken

    def interrupted(self) -> bool:
        """Clear the interrupt and take what it announces; return whether that was anything."""
        alone, self._alone = self.announced, False
        self._transport.register_write(_IRQ_STATUS, _COMPLETION)
        if not (alone and self._in_flight):
            return bool(self.take())
        if self._next(announced=True) is None:
            return False
        # Others may have completed before it was cleared: nothing will announce them.
        self._alone = not self._in_flight
        return True

    def _next(self, *, announced: bool = False) -> Completion | None:
        """Take an entry; return its completion, unless it is nobody's.

        ``announced``: it may not be there yet; where it is not, nothing happens.
        """
        number = self._taken
        oldest = next(iter(self._in_flight.values()), None)
        reply = oldest.reply if oldest is not None and oldest.wanted else None
        raw, answer = self._sides.read(number % self.entries, reply)
        values = _decode(raw)
        written = values.pop(_PHASE) == 1 ^ number >> self._log2 & 1
        if announced and not written:
            return None
        completion = Completion(*values)
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
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("complete tag %d, status %d, %d cycles", completion.tag,
                         completion.status, completion.cycles)
        if (completion.status == Status.OK and command.reply is not None
                and command.completion is None):  # else it was told, and the side may be another's
            command.raw = answer if command is oldest else self._sides.read(0, command.reply)[1]
        command.finish(completion)
        cycles = self._cycles + completion.cycles
        left = {tag: one for tag, one in self._in_flight.items() if one is not command}
        # One statement without a call: an interrupt comes before or behind all of it.
        self._taken, self._cycles, self._in_flight = number + 1, cycles, left
        return completion
