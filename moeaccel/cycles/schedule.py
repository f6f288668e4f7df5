"""Cycles in which things happen, and processes that wait for them."""

from __future__ import annotations

import heapq
from collections.abc import Generator
from typing import TypeAlias

Process: TypeAlias = "Generator[int | Event | Read, None, None]"
"""Waits for what it yields: a cycle, an event, the end of a read."""

NEVER = 1 << 62
"""The cycle of what is not known yet."""


class Event:
    """Something that happens once, in a cycle that may become known ahead of it."""

    def __init__(self) -> None:
        self.cycle = NEVER
        self.waiting: list[Process] = []

    @property
    def known(self) -> bool:
        """Whether its cycle is known."""
        return self.cycle < NEVER


class Read:
    """Consecutive beats on their way; writes may still delay those that have not come.

    Parameters
    ----------
    beat : :class:`int`
        Number of the first one in the weight stream.
    first, last : :class:`int`
        Cycles of the first and last beat.
    """

    __slots__ = ("beat", "first", "last")

    def __init__(self, beat: int, first: int, last: int) -> None:
        self.beat, self.first, self.last = beat, first, last


class Schedule:
    """Processes in the order of their cycles; one waits for a cycle, an event or a read's end."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Process, Read | None]] = []
        self._sequence = 0

    @property
    def next(self) -> int:
        """Cycle of the process whose turn it is."""
        return self._heap[0][0] if self._heap else NEVER

    def start(self, cycle: int, process: Process, read: Read | None = None) -> None:
        """Let a process run from ``cycle`` on."""
        self._sequence += 1
        heapq.heappush(self._heap, (cycle, self._sequence, process, read))

    def set(self, event: Event, cycle: int) -> None:
        """Make the cycle of an event known."""
        event.cycle = cycle
        for process in event.waiting:
            self.start(cycle, process)
        event.waiting.clear()

    def resume(self) -> None:
        """Let one process run until it waits."""
        cycle, _, process, read = heapq.heappop(self._heap)
        if read is not None and read.last > cycle:
            self.start(read.last, process, read)
            return
        wanted = next(process, None)
        if isinstance(wanted, int):
            self.start(max(cycle, wanted), process)
        elif isinstance(wanted, Read):
            self.start(max(cycle, wanted.last), process, wanted)
        elif wanted is not None and wanted.known:
            self.start(max(cycle, wanted.cycle), process)
        elif wanted is not None:
            wanted.waiting.append(process)
