"""Weights in the chip, write side: words as the ring has room, tile by tile."""

from __future__ import annotations

import functools
import math

import numpy as np

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles.schedule import NEVER, Event, Schedule
from moeaccel.cycles.weight_streamer import Place, WeightStreamer
from moeaccel.image import STEPS_PER_PATTERN_WORD, Section

ROW_EXPONENTS = 29
"""TileBuffer: tiles whose row exponents are stored before the next word waits."""


@functools.lru_cache(maxsize=64)
def _tile_words(section: Section) -> tuple[list[int], list[int]]:
    """Return the first and the last weight word of each tile, counted from the section's start."""
    tile = np.arange(section.tiles)
    rows = tile // section.tiles_per_row_word + 1
    per_word = section.entries_per_scale_word
    weights = section.weight_words
    first = rows + tile * section.groups // per_word + 1 + tile * weights
    last = rows + ((tile + 1) * section.groups - 1) // per_word + (tile + 1) * weights
    if section.pattern_words:
        first += tile * section.steps // STEPS_PER_PATTERN_WORD + 1
        last += ((tile + 1) * section.steps - 1) // STEPS_PER_PATTERN_WORD + 1
    return first.tolist(), last.tolist()


class Words:
    """A section in the weight stream: where it begins, and by tile what becomes of it.

    Parameters
    ----------
    section : :class:`Section`
    accepted : :class:`int`
        Cycle in which the tile buffer takes its shape.
    before : :class:`Words`, optional
        The section ahead of it.

    Attributes
    ----------
    first_word, first_step, first_tile : :class:`int`
        In the whole stream.
    weights, held : :class:`int`
        Weight words of a tile; cycles that the parser has each of them longer than others.
    period : :class:`int`
        After so many tiles row and scale words come at the same places again.
    settled : :class:`int`
        From this tile on results leave as fast as they come.
    busy : :class:`int`
        Steps of a tile, for all groups.
    loaded : :class:`Event`
        The parser takes it up.
    turn : :class:`int`
        Cycle in which its first word may be accepted.
    began, arrived, parsed : list of :class:`int`
        Cycles in which a tile's first and last step are accepted, and in which the parser is
        through with its last word.
    waited : list of (int, int)
        How long these two waited, ``beats_per_word - 1`` cycles at most: meanwhile the next word is
        put together, which follows so much sooner.
    ended, taken : list of :class:`int`
        Cycles in which its last step is started, its last element leaves the serialiser's FIFO.
    """

    def __init__(self, section: Section, accepted: int, before: Words | None) -> None:
        self.section = section
        self.accepted = accepted
        self.steps, self.tiles = section.steps, section.tiles
        self.weights, self.held = section.weight_words, section.format.steps_per_word - 1
        self.first, self.last = _tile_words(section)
        per_word = section.entries_per_scale_word
        self.period = math.lcm(
            section.tiles_per_row_word, per_word // math.gcd(per_word, section.groups),
            STEPS_PER_PATTERN_WORD // math.gcd(STEPS_PER_PATTERN_WORD, section.steps)
            if section.pattern_words else 1)
        self.settled, self.busy = NEVER, 0
        self.first_word = self.first_step = self.first_tile = 0
        if before is not None:
            self.first_word = before.first_word + before.section.words
            self.first_step = before.first_step + before.tiles * before.steps
            self.first_tile = before.first_tile + before.tiles
        self.loaded = Event()
        self.turn = 0
        self.began: list[int] = []
        self.arrived: list[int] = []
        self.parsed: list[int] = []
        self.waited: list[tuple[int, int]] = []
        self.ended: list[int] = []
        self.taken: list[int] = []


class TileBuffer:
    """Words from the streamer to the ring, which the array frees.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    schedule : :class:`Schedule`
    streamer : :class:`WeightStreamer`

    Attributes
    ----------
    sections : list of :class:`Words`
        All that were announced.
    """

    def __init__(self, config: AcceleratorConfig, schedule: Schedule, streamer: WeightStreamer
                 ) -> None:
        self._config = config
        self._schedule = schedule
        self._streamer = streamer
        streamer.moves_on = self.moves_on
        self._spacing = config.beats_per_word
        # From a word's last beat to the parser: FIFO (2 cycles), the gearbox, and a register.
        self._delay = 3 if self._spacing == 1 else 4
        self.sections: list[Words] = []
        self._credit, self._credit_ring = Place(), Place()
        self._parser, self._ring, self._exponents = Place(), Place(), Place()
        self._arrived, self._before = 0, -1  # last step of the tile before, its word
        self._waited = 0  # how long it did, see Words

    def announce(self, section: Section, cycle: int) -> None:
        """Tell the parser in ``cycle`` what comes next."""
        self.sections.append(
            Words(section, cycle, self.sections[-1] if self.sections else None))
        if len(self.sections) == 1:
            self._load()

    def moves_on(self, word: int) -> int:
        """Return the cycle from which beats are taken of the word after the next, or NEVER.

        One word waits for the parser, another is put together: that begins when the one before it
        moves on, as this one is accepted, unless it is not complete yet. Beats that come later are
        for the caller to know. Words must be asked for in ascending order.
        """
        place, spacing = self._credit, self._spacing
        while place.section < len(self.sections):
            words = self.sections[place.section]
            at = word - words.first_word
            while place.tile < len(words.last) and at > words.last[place.tile]:
                place.tile += 1
            if place.tile < len(words.last):
                break
            place.section, place.tile = place.section + 1, 0
        else:
            return NEVER
        tile = place.tile
        if not words.loaded.known or tile > len(words.arrived):
            return NEVER
        before, origin, waited = 0, words.turn, 0
        if tile:
            before, origin, waited = (
                words.last[tile - 1], words.parsed[tile - 1], words.waited[tile - 1][1])
        first, last = words.first[tile], words.last[tile]
        ahead = min(at, first) - before
        if ahead:
            origin, waited = origin + ahead * spacing - waited, 0
        if at < first:  # row and scale words
            return origin + spacing - 1 - waited
        steps = words.steps
        step = words.first_step + tile * steps - self._config.tile_words
        if tile < len(words.arrived):
            cycle, waited = words.began[tile], words.waited[tile][0]
        else:  # the parser is in the middle of this tile
            cycle = max(origin, self._exponent_room(words.first_tile + tile - ROW_EXPONENTS),
                        self._ring_room(self._credit_ring, step)[0])
            waited = min(self._most_waited(words), cycle - origin)
        into = 0
        if at > first:
            into = (at - first) * (words.weights - 1) // max(1, last - first) * (words.held + 1)
            room, there = self._ring_room(
                self._credit_ring, step + into, into, at - first, words.held)
            there = max(there, cycle + (at - first) * spacing - waited,
                        cycle + at - first + words.held * into // 2)
            cycle = max(there, room)
            waited = min(self._most_waited(words), cycle - there)
        moves = cycle + max(words.held, spacing - 1 - waited)
        if words.held and into + 1 < steps:  # its second step must have a place, too
            moves = max(moves, self._ring_room(self._credit_ring, step + into + 1)[0])
        return moves

    def _most_waited(self, words: Words) -> int:
        """Return how much sooner than others a word can follow one that waited."""
        return max(0, self._spacing - 1 - words.held)

    def _ring_room(self, place: Place, step: int, into: int = 0, span: int = 0, held: int = 0
                   ) -> tuple[int, int]:
        """Return the cycle from which a step's place in the ring is free, or NEVER, and one before
        which its word is not there.

        Places are freed one a cycle in the last group of a tile. Where another tile's begin among
        the ``into`` steps before this one, ``span`` words ago, they may be what this one waits
        for. With ``held`` a word has two steps.
        """
        if step < 0:
            return 0, 0
        while True:
            words = self.sections[place.section]
            steps = words.steps
            tile, at = divmod(step - words.first_step, steps)
            if tile < 0:
                place.section -= 1
            elif tile >= words.tiles:
                place.section += 1
            elif tile >= len(words.ended):
                return NEVER, 0
            else:
                break
        begin = words.ended[tile] - (steps - 1) + 3
        if 0 < at <= into:
            per_word, waits = held + 1, into - at
            apart = (into // per_word - waits // per_word) * span // max(1, into // per_word)
            if apart:
                # The first of the words behind the one that waited was put together meanwhile.
                there = begin + (apart - 1) * self._spacing + 1
                return begin + at, there + held * (1 - waits % 2 + into % 2)
        return begin + at, 0

    def _exponent_room(self, tile: int) -> int:
        """Return the cycle from which the FIFO of row exponents has room once ``tile`` is done."""
        if tile < 0:
            return 0
        place = self._exponents
        while True:
            words = self.sections[place.section]
            at = tile - words.first_tile
            if at < words.tiles:
                return words.taken[at] + 1 if at < len(words.taken) else NEVER
            place.section += 1

    def _load(self) -> None:
        """Take up the next section when the one before has ended."""
        words = self.sections[self._parser.section]
        loaded = max(words.accepted, self._arrived) + 1
        words.turn = max(loaded + 1, self._arrived + self._spacing - self._waited)
        self._arrived, self._before, self._waited = words.turn, 0, 0
        self._schedule.set(words.loaded, loaded)

    def next_tile(self) -> int:
        """Return the cycle of the next tile's last beat, or NEVER if it cannot be accepted yet."""
        place = self._parser
        if place.section >= len(self.sections):
            return NEVER
        words = self.sections[place.section]
        if not words.loaded.known:
            self._load()
        tile = place.tile
        last_beat = (words.first_word + words.last[tile] + 1) * self._spacing - 1
        if self._streamer.beats <= last_beat:
            return NEVER
        steps = words.steps
        step = words.first_step + tile * steps - self._config.tile_words + steps - 1
        exponents = words.first_tile + tile - ROW_EXPONENTS
        if self._exponent_room(exponents) == NEVER or (
                self._ring_room(self._ring, step)[0] == NEVER):
            return NEVER
        return self._streamer.beat_cycle(place, last_beat)

    def accept(self) -> None:
        """Accept a tile: when its words are there, in turn, with room in ring and FIFO.

        Words come at most one each ``beats_per_word`` cycles, the parser has those of two steps for
        two, and within a tile's last group the array frees one a cycle: a tile's first and last
        step say it all.
        """
        place, spacing, delay = self._parser, self._spacing, self._delay
        words = self.sections[place.section]
        held = words.held
        tile = place.tile
        first, last = words.first[tile], words.last[tile]
        steps = words.steps
        step = words.first_step + tile * steps - self._config.tile_words
        beat = (words.first_word + first + 1) * spacing - 1
        there = max(
            self._arrived + (first - self._before) * spacing - self._waited,
            self._streamer.beat_cycle(place, beat) + delay)
        began = max(
            there,
            self._exponent_room(words.first_tile + tile - ROW_EXPONENTS),
            self._ring_room(self._ring, step)[0])
        waited = waited_first = min(self._most_waited(words), began - there)
        span, blank = last - first, 0
        arrived = began
        if span or held:
            blank = held * (steps % 2)  # half of the tile's last word is empty
            room, behind = self._ring_room(
                self._ring, step + steps - 1, steps - 1, span, held)
            follows = span * spacing - waited if span else 0
            there = max(began + follows + held, began + span + held * words.weights, behind + blank,
                        self._streamer.beat_cycle(place, beat + span * spacing) + delay + held)
            arrived = max(there, room + blank)
            waited = min(spacing - 1, arrived - there + held + (0 if span else waited))
        self._arrived, self._before, self._waited = arrived, last, waited
        words.waited.append((waited_first, waited))
        words.began.append(began)
        words.arrived.append(arrived - blank)
        words.parsed.append(arrived)
        place.tile += 1
        if place.tile == words.tiles:
            place.section, place.tile = place.section + 1, 0

    def skip(self, limit: int) -> None:
        """Pass over tiles up to cycle ``limit``, when nothing else happens before it.

        Where port or array were busy in every cycle for longer than the FIFO reaches, they remain
        so to the section's end, and tiles repeat; only where bursts begin and end differs.
        """
        place = self._parser
        if place.section >= len(self.sections):
            return
        words, tile = self.sections[place.section], place.tile
        if tile % words.period or tile < words.settled + 2 * words.period:
            return
        reach = self._config.read_ahead_beats + self._config.max_burst_beats
        period = words.period * -(-reach // (words.steps * words.period * self._spacing))
        if tile <= words.settled + 2 * period or len(words.ended) < tile:
            return
        beats = (words.first[tile] - words.first[tile - period]) * self._spacing
        length = words.ended[-1] - words.ended[-1 - period]
        parsed = beats // self._spacing + words.held * words.weights * period
        if length not in (max(beats, parsed), period * words.busy):
            return
        for cycles in (words.began, words.arrived, words.ended):
            last, middle, first = cycles[-1], cycles[-1 - period], cycles[-1 - 2 * period]
            if last - middle != length or middle - first != length:
                return
        begin = (words.first_word + words.first[tile - 1]) * self._spacing
        count = min((limit - words.ended[-1]) // length, (words.tiles - tile) // period,
                    self._streamer.repeats(begin, beats)) - 1
        if count < 1:
            return
        for cycles in (words.began, words.arrived, words.parsed, words.ended, words.taken):
            pattern = cycles[-period:]
            cycles.extend([cycle + i * length for i in range(1, count + 1) for cycle in pattern])
        words.waited.extend(words.waited[-period:] * count)
        place.tile += count * period
        self._before = words.last[place.tile - 1]
        self._arrived = words.parsed[-1]
        self._streamer.skip(begin, count * beats, count * length)
