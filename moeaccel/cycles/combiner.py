"""Sums that leave the chip: a pass retires, its rows go to memory."""

from __future__ import annotations

from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import WRITE_CYCLES, MemoryPort
from moeaccel.cycles.schedule import Process, Schedule

COMBINER_CYCLES = 15
"""RowSums: from an output to its place in the y buffer."""
SUMS_READ_CYCLES = 3
"""RowSums: from an address to the sums."""
FLOAT_CYCLES = 10
"""Combiner: from a sum to float32."""


class Combiner:
    """Drains the y buffer, one row after another.

    Parameters
    ----------
    job : :class:`Job`
    schedule : :class:`Schedule`
    port : :class:`MemoryPort`

    Attributes
    ----------
    free : :class:`int`
        Cycle from which it can take a row of zeros.
    """

    def __init__(self, job: Job, schedule: Schedule, port: MemoryPort) -> None:
        self._job = job
        self._schedule = schedule
        self._port = port
        self.free = 0

    def start(self) -> None:
        """Let every pass retire in its time."""
        for n in range(len(self._job.passes)):
            self._schedule.start(0, self._retire(n))

    def zero_row(self, cycle: int) -> int:
        """Take the row of zeros of a token without an expert, offered from ``cycle`` on; return the
        cycle behind that."""
        cycle = max(cycle, self.free) + 1
        self.free = self._write_row(self._row_address(cycle) + 1, last=True) + 1
        return cycle

    def _retire(self, n: int) -> Process:
        """Retire a pass when its outputs are in the y buffer and the next pass is known.

        If that has other tokens, each slot's row goes to memory first, one after another.
        """
        job, now, events = self._job, self._job.passes[n], self._job.events
        yield events[n].in_y
        cycle = events[n].in_y.cycle + 1
        if n + 1 < len(events):
            yield events[n + 1].offered
            cycle = max(cycle, events[n + 1].offered.cycle)
        cycle += 1
        if job.plan.drains(n):
            cycle = max(cycle, self.free)
            for first, last in zip(now.first, now.last, strict=True):
                cycle = self._row_address(cycle + 3)  # the slot table, two cycles
                if not first:
                    yield cycle
                    read = self._port.read(cycle, job.beats(job.d_out, 8))
                    yield read
                    cycle = read.last + 2 + SUMS_READ_CYCLES
                yield cycle
                cycle = self._write_row(cycle + 1, last=last)
            cycle += 1
        self._schedule.set(events[n].retired, cycle)

    def _row_address(self, cycle: int) -> int:
        """Return when a row's address is known whose token is multiplied from ``cycle`` on."""
        return cycle + 2 + self._job.steps_out.bit_length()

    def _write_row(self, cycle: int, *, last: bool) -> int:
        """Return when a row is written and acknowledged; the request is accepted in ``cycle``.

        Sums leave a word a cycle, or in two if a word makes two beats (integers); a beat may take
        several words (floats). Then their memories, conversion (of integers 2 cycles), the FIFO (2)
        and W's register.
        """
        job, config = self._job, self._job.config
        beats = job.beats(job.d_out, job.y_type.bytes if last else 8)
        words = job.d_out // config.quantiser_lanes
        first = cycle + 1 + SUMS_READ_CYCLES + (FLOAT_CYCLES if last else 2) + 2 + 1
        spacing = 1
        if last and beats < words:
            spacing = words // beats
            first += spacing - 1
        self._schedule.start(first, self._write(first, beats, spacing))
        return first + (beats - 1) * spacing + job.latency + WRITE_CYCLES

    def _write(self, cycle: int, beats: int, spacing: int) -> Process:
        """Put beats on the bus, a few at a time if they are not dense."""
        step = beats if spacing == 1 else 8
        for begin in range(0, beats, step):
            yield cycle + begin * spacing
            self._port.write(cycle + begin * spacing, min(step, beats - begin))
