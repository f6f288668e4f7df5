"""The array's steps: the sections of each pass, as their operands and places are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from moeaccel.cycles.combiner import COMBINER_CYCLES
from moeaccel.cycles.hidden_buffer import elements_cycle, ready_cycles
from moeaccel.cycles.job import Job
from moeaccel.cycles.result_serialiser import ADDER_CYCLES, Results, element_cycles
from moeaccel.cycles.schedule import NEVER, Event, Schedule
from moeaccel.cycles.tile_buffer import TileBuffer, Words

ARRAY_CYCLES = 17
"""DotArray: from a step to its sums. Decoding (3), two multipliers (3 each), 5 levels of the tree,
two shifts, the sum."""


class Sequencer:
    """Starts steps, and counts the cycles in which it does not.

    Parameters
    ----------
    job : :class:`Job`
    schedule : :class:`Schedule`
    tiles : :class:`TileBuffer`

    Attributes
    ----------
    busy, starved_weights, starved_activations, stalled_output : :class:`int`
    waits : list of (int, int)
        From which cycle to which one x, h or room for sums was waited for; the last wait may be one
        that has no end yet.
    """

    def __init__(self, job: Job, schedule: Schedule, tiles: TileBuffer) -> None:
        self._job = job
        self._schedule = schedule
        self._tiles = tiles
        self.waits: list[tuple[int, int]] = []
        self.busy = self.starved_weights = self.starved_activations = self.stalled_output = 0

    def run(self) -> Iterator[None]:
        """Run the sections of each pass; yields where something is not known yet."""
        job, config = self._job, self._job.config
        per_group, overlaps = job.per_group, config.hidden_banks > 1
        results = Results(config)
        groups = []
        for now in job.passes:
            count = len(now.tokens)
            groups.append([
                min(count, begin + per_group) for begin in range(0, count, per_group)])
        h_there = [0] * len(job.passes)  # all elements of h have come, and h may be quantised
        elements_there = 0  # of the latest pass
        for index, (n, part) in enumerate(job.order):
            now, events, through = job.passes[n], job.events[n], groups[n]
            sections = job.experts[now.expert]
            slots = np.diff([0, *through]).tolist()
            ready = [0] * len(slots)
            last = part + 1 == len(sections)
            if not part:  # the pass begins, unless it has been taken ahead of what was owed
                while not events.handed.known:
                    yield
                cycle = max(events.handed.cycle + 1, results.end + 1)
                if not now.same:
                    yield from self._wait_for(events.x_loaded, cycle)
                    cycle = max(cycle, events.x_loaded.cycle + 1)
                if overlaps:
                    cycle = max(cycle, elements_there)
                self.starved_activations += cycle - max(events.handed.cycle, results.end)
                results.end = cycle
            else:
                if (single := self._single_behind(index)) is not None:  # it is taken before
                    while not job.events[single].handed.known:
                        yield
                    results.end = max(results.end, job.events[single].handed.cycle)
                elif overlaps and index + 1 == len(job.order):
                    results.end += 1  # no pass comes any more
                wait = 1 if overlaps else 2  # until it is begun, or the hidden buffer and it
                results.end += wait
                self.starved_activations += wait
            if last:
                free = 0
                before = self._in_y_bank(n)
                if before is not None:
                    retired = job.events[before].retired
                    yield from self._wait_for(retired, results.end)
                    free = retired.cycle + 1
                ready = [free] * len(slots)
                if part:
                    hidden = ready_cycles(config, h_there[n], sections[part].k, through)
                    ready = [max(free, cycle) for cycle in hidden]
            yield from self._section(self._tiles.sections[index], results, slots, ready)
            if last:
                self._schedule.set(events.issued, results.end)
                self._schedule.set(
                    events.in_y, results.taken + COMBINER_CYCLES - 1
                    + element_cycles(config, biased=results.biased))
                if not part or not overlaps:
                    self._schedule.set(events.x_free, events.in_y.cycle)
            else:
                elements_there = h_there[n] = elements_cycle(
                    config, results.taken, biased=results.biased)
                self._schedule.set(events.x_free, elements_there - 1)
            self._await(index, results, h_there)
        while True:
            yield

    def _wait_for(self, event: Event, cycle: int) -> Iterator[None]:
        """Wait until it is known when something happens that is needed from ``cycle`` on."""
        if not event.known:
            self.waits.append((cycle, NEVER))
            while not event.known:
                yield
            self.waits.pop()
        if event.cycle > cycle:
            self.waits.append((cycle, event.cycle))

    def waiting(self, cycle: int) -> bool:
        """Return whether steps wait for x, h or room for sums, as far as it is known."""
        return any(begin < cycle <= end for begin, end in self.waits[-8:])

    def _single_behind(self, index: int) -> int | None:
        """Return the pass with one section that follows a section which was owed, if one does."""
        order, job = self._job.order, self._job
        if job.config.hidden_banks == 1 or not order[index][1] or index + 1 == len(order):
            return None
        n = order[index + 1][0]
        return n if len(job.experts[job.passes[n].expert]) == 1 else None

    def _await(self, index: int, results: Results, h_there: list[int]) -> None:
        """Tell when the next pass can be taken, if it can be behind this section."""
        job = self._job
        n, part = job.order[index]
        after = job.order[index + 1] if index + 1 < len(job.order) else None
        single = len(job.experts[job.passes[n].expert]) == 1
        cycle = results.end + 1
        if job.config.hidden_banks == 1:
            if not single and not part:
                return
            ready = n + 1
        else:
            if after is not None and after[1] and not part and after[0] < n:
                return  # what is owed comes first
            # h of the latest pass with two sections is quantised from now on.
            ready = max(m for m, _ in job.order[: index + 1]) + 1
            latest = ready - 1
            owes = len(job.experts[job.passes[latest].expert]) == 2
            if owes and (latest, 1) not in job.order[: index + 1]:
                h_there[latest] = max(h_there[latest], cycle + 1)
                cycle += 1
            elif self._single_behind(index) is not None:
                return  # it has been taken
        if ready < len(job.events) and not job.events[ready].awaited.known:
            self._schedule.set(job.events[ready].awaited, cycle)

    def _in_y_bank(self, n: int) -> int | None:
        """Return the pass that must have retired before sums of pass ``n`` come, if any."""
        if self._job.config.y_banks > 1 and not self._job.passes[n].same:
            return self._job.x_user(n)
        return n - 1 if n else None

    def _section(self, words: Words, results: Results, slots: list[int], ready: list[int]
                 ) -> Iterator[None]:
        """Start the steps of a section: for each tile, for each group.

        A group of a tile starts when the one before has, when its operands are there and when a
        result has a place; it takes a step a cycle, in the first group as words come.
        """
        steps, tiles, rows = words.steps, words.tiles, words.section.tile_rows
        short = tiles * rows - words.section.channel_rows  # rows that the last tile has not
        at_once = self._job.config.results_per_cycle
        places = self._job.config.result_places
        count, most = len(slots), -(-rows // at_once) * max(slots)
        # Results leave as fast as they come and there is always room for them; at first, results
        # of the section before may be in the way.
        free_running = steps >= most and (places - 1) * steps > ARRAY_CYCLES + 1 + most
        words.busy = steps * count
        words.settled = min(tiles, -(-places // count)) if free_running else tiles
        arrived, began, ended = words.arrived, words.began, words.ended
        taken = deque(results.history, places)
        end = results.end
        # Rows without biases wait until the adder is empty.
        passes = results.taken + ADDER_CYCLES if results.biased and not words.section.biased else -1
        for tile in range(words.settled):
            while len(arrived) <= tile:
                yield
            for group, slot_count in enumerate(slots):
                size = slot_count * -(
                    -(rows - short if tile + 1 == tiles else rows) // at_once)
                start = end + 1
                if tile == 0 and ready[group] > start:
                    self.starved_activations += ready[group] - start
                    self.waits.append((start - 1, ready[group]))
                    start = ready[group]
                if group == 0 and began[tile] >= start:
                    self.starved_weights += began[tile] + 1 - start
                    start = began[tile] + 1
                if taken[0] + 1 >= start:  # a place that becomes free is seen a cycle later
                    self.stalled_output += taken[0] + 2 - start
                    start = taken[0] + 2
                end = start + steps - 1
                if group == 0 and arrived[tile] >= end:
                    self.starved_weights += arrived[tile] + 1 - end
                    end = arrived[tile] + 1
                taken.append(max(end + 1 + ARRAY_CYCLES, taken[-1], passes) + size)
            ended.append(end)
            words.taken.append(taken[-1])
        settled_end = end
        later_groups = (count - 1) * steps
        while (tile := len(ended)) < tiles:
            if len(arrived) == tile:
                yield
                continue
            end = max(max(ended[-1], began[tile]) + steps, arrived[tile] + 1) + later_groups
            ended.append(end)
            left = rows - short if tile + 1 == tiles else rows
            words.taken.append(end + 1 + ARRAY_CYCLES + slots[-1] * -(-left // at_once))
        end = ended[-1]
        self.busy += words.busy * tiles
        if tiles > words.settled:
            self.starved_weights += end - settled_end - words.busy * (tiles - words.settled)
            taken.extend(words.taken[-1] - i * steps for i in reversed(range(places)))
        results.end = end
        results.history = list(taken)
        results.biased = words.section.biased
