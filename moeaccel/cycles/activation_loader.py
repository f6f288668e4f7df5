"""x of a pass: fetched and quantised."""

from __future__ import annotations

from moeaccel.cycles.hidden_buffer import QUANTISER_CYCLES
from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import MemoryPort
from moeaccel.cycles.schedule import Process, Read, Schedule

PACE = 4
"""ActivationLoader, Combiner: rows whose time one takes that can wait."""
POLL_CYCLES = 8
"""How often it is looked whether somebody waits."""


class ActivationLoader:
    """Rows of x, one after another.

    Parameters
    ----------
    job : :class:`Job`
    schedule : :class:`Schedule`
    port : :class:`MemoryPort`
    """

    def __init__(self, job: Job, schedule: Schedule, port: MemoryPort) -> None:
        self._job = job
        self._schedule = schedule
        self._port = port

    def load(self, n: int, cycle: int) -> Process:
        """Fetch and quantise the rows of pass ``n``; the line buffer holds two.

        A row: 2 cycles to look up its token, a multiplication by the steps, the request. When its
        last beat is through the tree of maxima it leaves, ``quantiser_lanes`` elements a cycle, but
        not more than a beat.
        """
        job, config = self._job, self._job.config
        beats = job.beats(job.d_in, job.x_type.bytes)
        groups = max(beats, job.d_in // config.quantiser_lanes)
        tree = 2 + (config.port_bytes // 2).bit_length() - 1
        count = len(job.passes[n].tokens)
        rows: list[Read] = []
        awaited = job.events[n].awaited if n and config.y_banks > 1 else None
        left = -1  # last group of the row that left last
        lookup = cycle + 1
        for row in range(count + 2):
            if row >= 2:
                yield rows[row - 2]
                left = max(rows[row - 2].last + tree, left + 1) + groups - 1
            if row < count:
                token = max(lookup + 1, left + 1)
                request = token + 2 + job.steps_in.bit_length()
                if row and awaited is not None:
                    turn = lookup + PACE * beats
                    while request < turn and awaited.cycle + 2 > request:
                        yield request
                        request = min(request + POLL_CYCLES, turn)
                yield request
                rows.append(self._port.read(request, beats))
                lookup = request + 1
        # Three registers, the quantiser, the count of rows, the pulse.
        self._schedule.set(job.events[n].x_loaded, left + 3 + QUANTISER_CYCLES + 2)
