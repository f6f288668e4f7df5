"""Experts with tokens: their entries are asked for, checked, and handed out."""

from __future__ import annotations

from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import MemoryPort
from moeaccel.cycles.schedule import Event, Process, Read, Schedule
from moeaccel.interface.commands import ENTRY_BYTES

ENTRIES = 16
"""ExpertTable: entries that are under way or stored at most."""
ENTRY_CYCLES = 4
"""ExpertTable: from the last beat of an entry to the check of its sections."""
CHECK_CYCLES = 5
"""ExpertTable: for each section, with the bits of its steps."""
OFFER_CYCLES = 5
"""ExpertTable: from the last section to the offer."""


class ExpertTable:
    """Walks over the counts, asks for the entry of each expert with tokens, and checks them.

    Parameters
    ----------
    job : :class:`Job`
    schedule : :class:`Schedule`
    port : :class:`MemoryPort`

    Attributes
    ----------
    offered, taken : dict of int and :class:`Event`
        By expert: it may be taken from then on; the dispatcher takes it.
    """

    def __init__(self, job: Job, schedule: Schedule, port: MemoryPort) -> None:
        self._job = job
        self._schedule = schedule
        self._port = port
        self._experts = experts = job.plan.experts
        self.offered = {expert: Event() for expert in experts}
        self.taken = {expert: Event() for expert in experts}
        self._checked = {expert: Event() for expert in experts}  # its check begins

    def start(self, cycle: int) -> None:
        """Read the count of expert 0 in ``cycle``."""
        self._schedule.start(cycle, self._walk(cycle))

    def _walk(self, cycle: int) -> Process:
        """Two cycles for each expert, and one to ask for its entry, as soon as there is room."""
        experts = self._experts
        beats = self._job.beats(ENTRY_BYTES, 1)
        before = 0
        for i, expert in enumerate(experts):
            cycle += 2 * (expert - before) + 2
            before = expert + 1
            if i >= ENTRIES:
                room = self._checked[experts[i - ENTRIES]]
                yield room
                cycle = max(cycle, room.cycle + 1)
            yield cycle
            read = self._port.read(cycle, beats)
            self._schedule.start(cycle, self._check(i, read))
            cycle += 1

    def _check(self, i: int, read: Read) -> Process:
        """Check an entry when it has come and the one before has been taken."""
        experts = self._experts
        yield read
        cycle = read.last + ENTRY_CYCLES
        if i:
            taken = self.taken[experts[i - 1]]
            yield taken
            cycle = max(cycle, taken.cycle + 1)
        self._schedule.set(self._checked[experts[i]], cycle)
        sections = self._job.experts[experts[i]]
        cycle += OFFER_CYCLES + sum(
            CHECK_CYCLES + section.weight_words.bit_length() for section in sections)
        self._schedule.set(self.offered[experts[i]], cycle)
