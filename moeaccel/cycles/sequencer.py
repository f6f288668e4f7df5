"""The array's steps: the sections of each pass, as their operands and places are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from moeaccel.cycles.combiner import COMBINER_CYCLES
from moeaccel.cycles.hidden_buffer import ready_cycles
from moeaccel.cycles.job import Job
from moeaccel.cycles.result_serialiser import ADDER_CYCLES, RESULTS, Results, element_cycles
from moeaccel.cycles.schedule import Schedule
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
    stands : tuple of int, optional
        It waits for sums of that pass to leave, from that cycle on.
    """

    def __init__(self, job: Job, schedule: Schedule, tiles: TileBuffer) -> None:
        self._job = job
        self._schedule = schedule
        self._tiles = tiles
        self.stands: tuple[int, int] | None = None
        self.busy = self.starved_weights = self.starved_activations = self.stalled_output = 0

    def run(self) -> Iterator[None]:
        """Run the sections of each pass; yields where something is not known yet."""
        job, config = self._job, self._job.config
        per_group = job.per_group
        results = Results()
        index = 0
        for n, (now, events) in enumerate(zip(job.passes, job.events, strict=True)):
            while not events.handed.known:
                yield
            count = len(now.tokens)
            through = [min(count, begin + per_group) for begin in range(0, count, per_group)]
            slots = np.diff([0, *through]).tolist()
            cycle = events.handed.cycle + 1
            if not now.same:
                while not events.x_loaded.known:
                    yield
                cycle = max(cycle, events.x_loaded.cycle + 1)
            self.starved_activations += cycle - events.handed.cycle
            results.end = cycle
            sections = job.experts[now.expert]
            for down, section in enumerate(sections, start=2 - len(sections)):
                ready = [0] * len(slots)
                if down:
                    free = 0
                    before = self._in_y_bank(n)
                    if before is not None:
                        retired = job.events[before].retired
                        while not retired.known:
                            self.stands = before, results.end
                            yield
                        self.stands = None
                        free = retired.cycle + 1
                    ready = [free] * len(slots)
                    if len(sections) > 1:
                        hidden = ready_cycles(config, results.taken, section.k, through,
                                              biased=results.biased)
                        ready = [max(free, cycle) for cycle in hidden]
                        results.end += 2  # the hidden buffer is started
                        self.starved_activations += 2
                words = self._tiles.sections[index]
                index += 1
                yield from self._section(words, results, slots, ready)
            self._schedule.set(events.issued, results.end)
            self._schedule.set(
                events.in_y, results.taken + COMBINER_CYCLES - 1
                + element_cycles(config, biased=results.biased))
        while True:
            yield

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
        count, most = len(slots), rows * max(slots)
        # Results leave as fast as they come and there is always room for them; at first, results
        # of the section before may be in the way.
        free_running = steps >= most and (RESULTS - 1) * steps > ARRAY_CYCLES + 1 + most
        words.busy = steps * count
        words.settled = min(tiles, -(-RESULTS // count)) if free_running else tiles
        arrived, began, ended = words.arrived, words.began, words.ended
        taken = deque(results.history, RESULTS)
        end = results.end
        # Rows without biases wait until the adder is empty.
        passes = results.taken + ADDER_CYCLES if results.biased and not words.section.biased else -1
        for tile in range(words.settled):
            while len(arrived) <= tile:
                yield
            for group, slot_count in enumerate(slots):
                size = slot_count * (rows - short if tile + 1 == tiles else rows)
                start = end + 1
                if tile == 0 and ready[group] > start:
                    self.starved_activations += ready[group] - start
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
            words.taken.append(end + 1 + ARRAY_CYCLES + slots[-1] * left)
        end = ended[-1]
        self.busy += words.busy * tiles
        if tiles > words.settled:
            self.starved_weights += end - settled_end - words.busy * (tiles - words.settled)
            taken.extend(words.taken[-1] - i * steps for i in reversed(range(RESULTS)))
        results.end = end
        results.history = list(taken)
        results.biased = words.section.biased
