"""Pairs become passes: sorted, then prepared one ahead of the one that runs."""

from __future__ import annotations

import numpy as np

from moeaccel.cycles.activation_loader import ActivationLoader
from moeaccel.cycles.combiner import Combiner
from moeaccel.cycles.expert_table import ExpertTable
from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import MemoryPort
from moeaccel.cycles.schedule import Event, Process, Read, Schedule
from moeaccel.cycles.tile_buffer import TileBuffer
from moeaccel.cycles.weight_streamer import WeightStreamer


class Dispatcher:
    """Sorts the pairs, then prepares a pass while another runs.

    Parameters
    ----------
    job, schedule, port, streamer, tiles, loader, combiner, table
        The blocks that it tells what to do.

    Attributes
    ----------
    finished : :class:`int`
        Cycle in which the completion starts.
    """

    def __init__(self, job: Job, schedule: Schedule, port: MemoryPort, streamer: WeightStreamer,
                 tiles: TileBuffer, loader: ActivationLoader, combiner: Combiner,
                 table: ExpertTable) -> None:
        self._job = job
        self._schedule = schedule
        self._port = port
        self._streamer = streamer
        self._tiles = tiles
        self._loader = loader
        self._combiner = combiner
        self._table = table
        self.finished = 0

    def run(self, start: int) -> Process:
        """Dispatch a job that is accepted in ``start``."""
        job = self._job
        weights: Read | None = None
        if job.gemm:
            cycle = start + 8  # prepare, clear the count, rewind, fetch the first id
        else:
            beats = job.beats(job.ids.size, 4)
            yield start + 3
            ids = self._port.read(start + 3, beats)
            yield ids
            # The counts are cleared meanwhile; then weights are asked for, and the walk begins.
            request = max(start + 5 + job.num_experts, ids.last + 1) + 1
            yield request
            weights = self._port.read(request, beats)
            cycle = request + 5
        cycle = self._sort(cycle)

        banks = job.config.slot_banks
        last_load: Event | None = None
        resident: tuple[int, ...] = ()
        for n, (now, events) in enumerate(zip(job.passes, job.events, strict=True)):
            if not n or now.expert != job.passes[n - 1].expert:
                offered = self._table.offered[now.expert]
                yield offered
                cycle = max(cycle, offered.cycle)
                self._schedule.set(self._table.taken[now.expert], cycle)
                cycle += 1
            if n >= banks:  # as many as there are slot tables
                retired = job.events[n - banks].retired
                yield retired
                cycle = max(cycle, retired.cycle + 1)
            yield cycle
            sections = job.experts[now.expert]
            self._streamer.request(cycle, sum(section.words for section in sections))
            for section in sections:  # one waits in the tile buffer while one is parsed
                cycle += 1
                if self._tiles.sections:
                    loaded = self._tiles.sections[-1].loaded
                    yield loaded
                    cycle = max(cycle, loaded.cycle + 1)
                self._tiles.announce(section, cycle)
            cycle += 1 + _compare_cycles(now.tokens, resident)
            resident = now.tokens
            if weights is not None:
                yield weights
                cycle = max(cycle, weights.last + 1)
            cycle += 1 + 4 * len(now.tokens) + 4  # the slot table
            if not now.same:
                if last_load is not None:
                    yield last_load
                    cycle = max(cycle, last_load.cycle)
                user = job.x_user(n)
                if user is not None and banks > 2:  # of what was in the bank of x
                    yield job.events[user].in_y
                    cycle = max(cycle, job.events[user].in_y.cycle + 2)
                yield cycle
                last_load = events.x_loaded
                self._schedule.start(cycle, self._loader.load(n, cycle))
                cycle += 1
            self._schedule.set(events.offered, cycle)
            if n:
                issued = job.events[n - 1].issued
                yield issued
                cycle = max(cycle, issued.cycle + 1)
            self._schedule.set(events.handed, cycle)
            cycle += 2
        if job.events:
            retired = job.events[-1].retired
            yield retired
            cycle = retired.cycle
        elif weights is not None:
            yield weights
            cycle = max(cycle, weights.last + 1)
        # The engine sees that all is idle and pulses its done; the completion starts.
        self.finished = max(cycle + 1, self._combiner.free) + 3

    def _sort(self, cycle: int) -> int:
        """Return when a counting sort is over: 3 cycles for each pair, 2 an expert, 4, 3 a pair.

        A token without an expert waits until the row of zeros before it is written.
        """
        job = self._job
        tokens, top_k = job.ids.shape
        counted = 0
        for token in job.plan.zeros:
            cycle = self._combiner.zero_row(cycle + 3 * top_k * (token + 1 - counted))
            counted = token + 1
        cycle += 3 * top_k * (tokens - counted)
        self._table.start(cycle)  # while positions are made of the counts, and pairs get theirs
        return cycle + 2 * job.num_experts + 4 + 3 * top_k * tokens


def _compare_cycles(tokens: tuple[int, ...], resident: tuple[int, ...]) -> int:
    """Return the cycles to find out whether a pass has the tokens of the one before."""
    slots = len(tokens)
    if slots != len(resident):
        return 1
    wrong = np.flatnonzero(np.not_equal(tokens, resident))
    return min([2 * slots + 1, *(2 * wrong[:1] + 5).tolist()])
