"""Pairs become passes: sorted, then prepared one ahead of the one that runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from moeaccel.cycles.activation_loader import ActivationLoader
from moeaccel.cycles.combiner import Combiner
from moeaccel.cycles.expert_buffer import REQUEST_CYCLES, STORED_CYCLES, ExpertBuffer
from moeaccel.cycles.expert_table import ExpertTable
from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import MemoryPort
from moeaccel.cycles.schedule import Event, Process, Read, Schedule
from moeaccel.cycles.tile_buffer import TileBuffer
from moeaccel.cycles.weight_streamer import WeightStreamer
from moeaccel.image import Section

KNOWN_CYCLES = 5
"""PairSort: from a pair's first cycle to where its expert counts."""
RANKED_CYCLES = 6
"""PairSort: from the last pair's third cycle to where the first expert of several tokens counts."""
POLL_CYCLES = 2
"""How often it is looked whether a request can be made."""


class Dispatcher:
    """Sorts the pairs, then prepares a pass while another runs.

    Parameters
    ----------
    job, schedule, port, streamer, tiles, loader, combiner, table, buffer
        The blocks that it tells what to do.

    Attributes
    ----------
    finished : :class:`int`
        Cycle in which the completion starts.
    """

    def __init__(self, job: Job, schedule: Schedule, port: MemoryPort, streamer: WeightStreamer,
                 tiles: TileBuffer, loader: ActivationLoader, combiner: Combiner,
                 table: ExpertTable, buffer: ExpertBuffer) -> None:
        self._job = job
        self._schedule = schedule
        self._port = port
        self._streamer = streamer
        self._tiles = tiles
        self._loader = loader
        self._combiner = combiner
        self._table = table
        self._buffer = buffer
        self._announced = [Event() for _ in job.events]  # the last section of a pass's turn
        self.finished = 0

    def run(self, start: int) -> Process:
        """Dispatch a job that is accepted in ``start``."""
        job = self._job
        weights: Read | None = None
        if job.gemm or job.held:
            cycle = start + 1
        else:
            beats = job.beats(job.ids.size, 4)
            yield start + 3
            ids = self._port.read(start + 3, beats)
            yield ids
            # Weights are asked for, and sorting begins.
            cycle = ids.last + 2
            if job.loads is not None:  # there are none
                yield from self._prefetch(self._sort(cycle), job.loads)
                return
            yield cycle
            weights = self._port.read(cycle, beats)
        cycle = self._sort(cycle)

        banks = job.config.slot_banks
        if banks > 2:
            self._schedule.start(start, self._announce())
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
            if banks > 2:
                if n:
                    yield self._announced[n - 1]
                    cycle = max(cycle, self._announced[n - 1].cycle + 1)
                yield cycle
                self._schedule.set(events.told, cycle)
                cycle += 1
            else:
                yield cycle
                sections = job.experts[now.expert]
                self._buffer.request(n, cycle, sum(section.words for section in sections))
                for section in sections:
                    cycle += 1
                    yield from self._section(section, cycle)
                    cycle = self._tiles.sections[-1].accepted
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
                    yield job.events[user].x_free
                    cycle = max(cycle, job.events[user].x_free.cycle + 2)
                yield cycle
                last_load = events.x_loaded
                self._schedule.start(cycle, self._loader.load(n, cycle))
                cycle += 1
            self._schedule.set(events.offered, cycle)
            if n:
                yield events.awaited
                cycle = max(cycle, events.awaited.cycle)
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

    def _prefetch(self, cycle: int, loads: Sequence[int]) -> Process:
        """Ask for what is missing of experts, from ``cycle`` on, as entries come."""
        job, streamer = self._job, self._streamer
        told = job.config.slot_banks > 2  # whoever announces passes asks, a cycle later
        asked = last = 0
        for expert, beats, begin in zip(job.plan.experts, loads, job.buffered, strict=True):
            offered = self._table.offered[expert]
            yield offered
            cycle = max(cycle, offered.cycle)
            self._schedule.set(self._table.taken[expert], cycle)
            # The buffer is free when the request before is the streamer's, which holds one more.
            cycle = max(cycle + 1 + told, asked)
            yield cycle
            while len(streamer.loaded) < streamer.requests - 1:
                cycle += 1
                yield cycle
            asked = cycle + REQUEST_CYCLES
            if beats:
                streamer.fill(asked, beats, begin)
                asked += 1
            cycle += 2 - told
        while len(streamer.loaded) < streamer.requests or streamer.left:
            cycle += 1
            yield cycle
        if streamer.beats:
            # Each request is taken up a cycle behind the last beat of the one before.
            last = streamer.last_beat + STORED_CYCLES + streamer.requests - 1
        self.finished = max(cycle, asked, last) + 3

    def _section(self, section: Section, cycle: int) -> Process:
        """Announce a section from ``cycle`` on; one waits while the tile buffer parses one."""
        if self._tiles.sections:
            loaded = self._tiles.sections[-1].loaded
            yield loaded
            cycle = max(cycle, loaded.cycle + 1)
        self._tiles.announce(section, cycle)

    def _announce(self) -> Process:
        """Ask for weights and announce sections while passes are prepared, in their order.

        With two banks of h each section is asked for by itself; what is owed at the end comes when
        the last pass has been handed out.
        """
        job, order = self._job, self._job.order
        apart = job.config.hidden_banks > 1
        at = cycle = 0
        for n, (events, announced) in enumerate(zip(job.events, self._announced, strict=True)):
            yield events.told
            cycle = max(cycle, events.told.cycle)
            begin = at
            while at < len(order) and order[at][0] <= n and (not apart or order[at] != (n, 1)):
                at += 1
            yield from self._tell(order[begin:at], cycle, apart)
            cycle = self._tiles.sections[-1].accepted + 1
            self._schedule.set(announced, cycle - 1)
        if at < len(order):
            yield job.events[-1].handed
            yield from self._tell(order[at:], max(cycle, job.events[-1].handed.cycle + 3), apart)

    def _tell(self, items: tuple[tuple[int, int], ...], cycle: int, apart: bool) -> Process:
        """Ask for the weights of sections and announce them, from the cycle after that on."""
        job, streamer = self._job, self._streamer
        sections = [job.experts[job.passes[n].expert][part] for n, part in items]
        for i, section in enumerate(sections):
            if apart or not i:
                cycle += 1
                before = streamer.requests - (job.config.buffer_slots > 0)  # which holds one
                yield cycle
                poll = cycle
                while len(streamer.loaded) < before:  # another request waits
                    poll += POLL_CYCLES
                    yield poll
                if before > 0:
                    cycle = max(cycle, streamer.loaded[before - 1] + 1)
                if apart:
                    first = job.experts[job.passes[items[i][0]].expert][0]
                    self._buffer.request(
                        items[i][0], cycle, section.words, first.words * items[i][1])
                else:
                    self._buffer.request(
                        items[i][0], cycle, sum(section.words for section in sections))
            cycle += 1
            yield from self._section(section, cycle)
            cycle = self._tiles.sections[-1].accepted

    def _sort(self, cycle: int) -> int:
        """Return when a sort that starts in ``cycle`` is over.

        It takes 3 cycles for each pair, and once more unless all is in its place by then, behind 2
        for each expert or, of several tokens, 4. A token without an expert waits until the row of
        zeros before it is written.
        """
        job, plan = self._job, self._job.plan
        tokens, top_k = job.ids.shape
        cycle += 3
        begin = cycle
        for token in range(tokens):
            cycle += 3 * top_k
            if token in plan.zeros:
                cycle = self._combiner.zero_row(cycle) if job.loads is None else cycle + 1
        count = len(plan.experts)
        first = {now.expert: now.pairs[0] for now in reversed(plan.passes)}
        rank = {expert: n for n, expert in enumerate(sorted(first, key=first.__getitem__))}
        if tokens == 1:
            known = [begin + 3 * first[expert] + KNOWN_CYCLES for expert in rank]
        else:  # a walk over experts with several pairs, and one over those with one
            pairs: Counter[int] = Counter()
            for now in plan.passes:
                pairs[now.expert] += len(now.pairs)
            known = [
                cycle + RANKED_CYCLES + 2 * (rank[expert] + count * (pairs[expert] == 1))
                for expert in plan.experts]
        self._table.start(known)
        if plan.pairs > count or (tokens > 1 and count):
            cycle += 3 + (4 if tokens > 1 else 2) * count + 3 * job.ids.size
        return cycle + 3


def _compare_cycles(tokens: tuple[int, ...], resident: tuple[int, ...]) -> int:
    """Return the cycles to find out whether a pass has the tokens of the one before."""
    slots = len(tokens)
    if slots != len(resident):
        return 1
    wrong = np.flatnonzero(np.not_equal(tokens, resident))
    return min([2 * slots + 1, *(2 * wrong[:1] + 5).tolist()])
