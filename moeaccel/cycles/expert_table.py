"""Experts with tokens: their entries are asked for, checked, and handed out."""

from __future__ import annotations

from collections.abc import Sequence

from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import MemoryPort
from moeaccel.cycles.schedule import Event, Process, Read, Schedule
from moeaccel.interface.commands import ENTRY_BYTES

ENTRIES = 16
"""ExpertTable: entries that are under way or stored at most."""
ASK_CYCLES = 3
"""ExpertTable: from where an expert counts to the request, and from one request to the next."""
ENTRY_CYCLES = 4
"""ExpertTable: from the last beat of an entry to the check of its sections."""
CHECK_CYCLES = 5
"""ExpertTable: for each section, with the bits of its steps."""
OFFER_CYCLES = 5
"""ExpertTable: from the last section to the offer."""


class ExpertTable:
    """Asks for the entry of each expert with tokens, as they become known, and checks them.

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

    def start(self, known: Sequence[int]) -> None:
        """Ask for entries of experts that become known in those cycles."""
        if known:
            self._schedule.start(known[0], self._walk(known))

    def _walk(self, known: Sequence[int]) -> Process:
        """Ask for each entry, as soon as there is room."""
        experts = self._experts
        beats = self._job.beats(ENTRY_BYTES, 1)
        cycle = 0
        for i, at in enumerate(known):
            cycle = max(cycle, at) + ASK_CYCLES
            if i >= ENTRIES:
                room = self._checked[experts[i - ENTRIES]]
                yield room
                cycle = max(cycle, room.cycle + 1)
            yield cycle
            read = self._port.read(cycle, beats)
            self._schedule.start(cycle, self._check(i, read))

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
