"""Sums that leave the chip: a pass retires, its rows go to memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeaccel.cycles.activation_loader import PACE, POLL_CYCLES
from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import WRITE_CYCLES, MemoryPort
from moeaccel.cycles.schedule import Process, Read, Schedule

COMBINER_CYCLES = 15
"""RowSums: from an output to its place in the y buffer."""
SUMS_READ_CYCLES = 3
"""RowSums: from an address to the sums."""
FLOAT_CYCLES = 10
"""Combiner: from a sum to float32."""
KIND_CYCLES = SUMS_READ_CYCLES + FLOAT_CYCLES + 6
"""Combiner: words are followed for so long, so that rows of two kinds do not meet."""


class Combiner:
    """Drains the y buffer, one row after another.

    Parameters
    ----------
    job : :class:`Job`
    schedule : :class:`Schedule`
    port : :class:`MemoryPort`
    waiting : callable
        Of the sequencer, :meth:`~moeaccel.cycles.sequencer.Sequencer.waiting`.

    Attributes
    ----------
    free : :class:`int`
        Cycle from which it can take a row of zeros.
    """

    def __init__(self, job: Job, schedule: Schedule, port: MemoryPort,
                 waiting: Callable[[int], bool]) -> None:
        self._job = job
        self._schedule = schedule
        self._port = port
        self._waiting = waiting
        self.free = 0

    def start(self) -> None:
        """Let every pass retire in its time."""
        for n in range(len(self._job.passes)):
            self._schedule.start(0, self._retire(n))

    def zero_row(self, cycle: int) -> int:
        """Take the row of zeros of a token without an expert, offered from ``cycle`` on; return the
        cycle behind that."""
        cycle = max(cycle, self.free) + 1
        row = self._write_row(self._row_address(cycle) + 1, _Row(), last=True)
        self.free = row.acknowledged + 1
        return cycle

    def _retire(self, n: int) -> Process:
        """Retire a pass when its outputs are in the y buffer and the next pass is known.

        If that has other tokens, each slot's row goes to memory first. The pass before has retired.
        """
        job, events = self._job, self._job.events
        yield events[n].in_y
        cycle = events[n].in_y.cycle + 1
        if n:
            yield events[n - 1].retired
            cycle = max(cycle, events[n - 1].retired.cycle + 2)
        if n + 1 < len(events):
            yield events[n + 1].offered
            cycle = max(cycle, events[n + 1].offered.cycle)
        cycle += 1
        if job.plan.drains(n):
            cycle = max(cycle, self.free)
            yield cycle
            yield from self._drain(n, cycle)
            cycle = self.free
        self._schedule.set(events[n].retired, cycle)

    def _can_wait(self, n: int, cycle: int) -> bool:
        """Return whether the array works while sums leave behind pass ``n``."""
        return not self._waiting(cycle) and any(after.handed.cycle < cycle <= after.issued.cycle
                   for after in self._job.events[n + 1 : n + 3])

    def _drain(self, n: int, cycle: int) -> Process:
        """Let the rows of a pass leave, one behind another; the request is accepted in ``cycle``.

        While one leaves the next is looked up, and its partial sums are added.
        """
        job, now = self._job, self._job.passes[n]
        before = _Row()
        token_before = -1
        for token, first, last in zip(now.tokens, now.first, now.last, strict=True):
            cycle = self._row_address(cycle + 3)  # the slot table, two cycles
            if not first:
                if token == token_before:
                    cycle = max(cycle, before.acknowledged + 1)
                yield cycle
                beats = job.beats(job.d_out, 8)
                read = self._port.read(cycle, beats)
                yield read
                cycle = read.last + 2 + SUMS_READ_CYCLES
                before.wait(read, beats)
            cycle = max(cycle, before.end)
            if job.config.y_banks > 1 and before.last is not None:
                turn = before.asked + 1 + PACE * job.beats(job.d_out, 4 if before.last else 8)
                while cycle < turn and self._can_wait(n, cycle):
                    yield cycle
                    cycle = min(cycle + POLL_CYCLES, turn)
            yield cycle
            before = self._write_row(cycle + 1, before, last=last)
            token_before = token
        self.free = before.acknowledged + 1

    def _row_address(self, cycle: int) -> int:
        """Return when a row's address is known whose token is multiplied from ``cycle`` on."""
        return cycle + 2 + self._job.steps_out.bit_length()

    def _write_row(self, cycle: int, before: _Row, *, last: bool) -> _Row:
        """Write a row; the request is accepted in ``cycle``.

        Sums leave a word in as many cycles as it makes beats; a beat may take several words
        (floats). Then their memories, conversion (of integers 2 cycles), the FIFO (2) and W's
        register. One of the other kind than the row before waits until nothing of that is under
        way.
        """
        job, config = self._job, self._job.config
        beats = job.beats(job.d_out, job.y_type.bytes if last else 8)
        words = job.d_out // config.quantiser_lanes
        begin = cycle + 1
        if before.last not in (None, last):
            begin = max(begin, before.end + KIND_CYCLES + 1)
        first = begin + SUMS_READ_CYCLES + (FLOAT_CYCLES if last else 2) + 2 + 1
        spacing = 1
        if beats < words:
            spacing = words // beats
            first += spacing - 1
        end = begin + (words - 1) * max(1, beats // words)
        self._schedule.start(first, self._write(first, beats, spacing))
        return _Row(last, cycle, begin, end,
                    first + (beats - 1) * spacing + job.latency + WRITE_CYCLES)

    def _write(self, cycle: int, beats: int, spacing: int) -> Process:
        """Put beats on the bus, a few at a time if they are not dense."""
        step = beats if spacing == 1 else 8
        for begin in range(0, beats, step):
            yield cycle + begin * spacing
            self._port.write(cycle + begin * spacing, min(step, beats - begin))


@dataclass
class _Row:
    """A row on its way.

    Parameters
    ----------
    last : :class:`bool`, optional
        It goes to y, not to the workspace.
    asked : :class:`int`
        Cycle in which its request is accepted.
    begin, end : :class:`int`
        Cycles in which its first and last word leave the y buffer.
    acknowledged : :class:`int`
        Cycle in which memory has all of it.
    """

    last: bool | None = None
    asked: int = 0
    begin: int = 0
    end: int = 0
    acknowledged: int = 0

    def wait(self, read: Read, beats: int) -> None:
        """Stand still for each beat of the next row's partial sums that comes before the last word
        has left; what writes delay of these, leaves meanwhile."""
        if read.first <= self.end:
            later = max(0, beats - max(0, self.begin - read.first))
            self.end += later
            self.acknowledged += later
