"""The port as its clients see it."""

from __future__ import annotations

from collections import deque

from moeaccel.cycles.schedule import Read

READ_CYCLES = 6
"""From a reader's request to its first beat, but for the latency: splitter, grant, choice and AR,
and two registers behind R."""
WRITE_CYCLES = 2
"""From the last beat on W to the writer's ``done``, but for the latency: B is counted, ``done``."""
WRITE_AHEAD_CYCLES = 3
"""From a beat on W to the first beat that a reader gets later for it: a beat on R in the same cycle
is there already, and two registers are behind R."""


class MemoryPort:
    """The port as its clients see it: beats of one request after another, one a cycle.

    Calls must come in the order of their cycles.
    """

    def __init__(self, latency: int) -> None:
        self._latency = latency
        self._free = 0
        self._pending: deque[Read] = deque()
        self.bursts: list[Read] = []
        """Reads of weights in their order; one that writes interrupt becomes two."""
        self.beats_read = 0
        self.beats_written = 0

    def read(self, cycle: int, beats: int, beat: int = -1) -> Read:
        """Return the read of a request that is accepted in ``cycle``; ``beat``: of weights."""
        first = max(cycle + READ_CYCLES + self._latency, self._free)
        self._free = first + beats
        self.beats_read += beats
        read = Read(beat, first, first + beats - 1)
        pending = self._pending
        while pending and pending[0].last < cycle:
            pending.popleft()
        pending.append(read)
        if beat >= 0:
            self.bursts.append(read)
        return read

    @property
    def only_weights(self) -> bool:
        """Whether nothing but weights may be on its way."""
        return all(read.beat >= 0 for read in self._pending)

    def skip(self, later: int, beats: int) -> None:
        """Take ``beats`` of weights to be read, and what comes to come ``later``."""
        self._free += later
        self.beats_read += beats

    def write(self, cycle: int, beats: int) -> None:
        """Put ``beats`` on the bus from ``cycle`` on: reads wait meanwhile."""
        self.beats_written += beats
        cycle += WRITE_AHEAD_CYCLES
        free = cycle + beats
        for read in list(self._pending):
            if read.last < cycle:
                continue
            if read.first >= cycle:
                count = read.last - read.first
                read.first = max(read.first, free)
                read.last = read.first + count
            elif read.beat < 0:
                read.last += beats
            else:
                rest = Read(read.beat + cycle - read.first, free, read.last + beats)
                read.last = cycle - 1
                self._pending.insert(self._pending.index(read) + 1, rest)
                at = len(self.bursts) - 1
                while self.bursts[at] is not read:
                    at -= 1
                self.bursts.insert(at + 1, rest)
                read = rest
            free = read.last + 1
        self._free = max(self._free, free)
