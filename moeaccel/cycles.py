"""The cycle model: how many clock cycles a command takes behind an ideal memory.

It follows the hardware block by block; each block is a *cycle function*, from the cycles in which
something goes in to the cycles in which something comes out. Nothing is followed step by step: the
array advances by tiles, the weight stream by bursts, everything else by rows and passes, and where
tiles repeat they are passed over, so that a prefill layer of real size takes two seconds. Cycle 0
is the first one of the fetch of the submission.

::

    command --> dispatcher --+-- x loads -----------------------------------+
                             +-- images ---> bursts --> words --> ring --> array --> h --> array
                             +-- passes --------------------------------^                    |
                                                  y <-- drains <-- y buffer <----------------+

What waits for what: a burst for room in the beat FIFO; a word for room in the ring and in the FIFO
of row exponents; a step for its word, its x or h and a place for its result; a pass for its x; its
down section for the y buffer; a drain for the next pass to be known; the dispatcher for the parser
and for the pass before the last. Reads share the port in the order of their requests, and wait
while something is written.

Of several channels, channel 0 is followed: all read the same weights in step, and only channel 0
moves anything else.

The memory is ideal (``MemoryModel.ideal``): it never refuses, has a fixed latency and one port for
reads and writes. Accuracy, held by tests/system/test_cycles.py: 1 % or 16 cycles of the RTL;
typically it is exact. What is not: bursts of two readers in the same cycles, row and scale words
where the ring is full, and writes of every other cycle, which are taken eight beats at a time.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import BLOCK, MEMORY_LATENCY_CYCLES, AcceleratorConfig
from moeaccel.image import HEADER_BYTES, ExpertShape, Section
from moeaccel.interface.commands import ENTRY_BYTES

# -- pipeline depths, as the blocks document them (tests hold them to the RTL's own constants)
ARRAY_CYCLES = 17
"""DotArray: from a step to its sums. Decoding (3), two multipliers (3 each), 5 levels of the tree,
two shifts, the sum."""
RESULTS = 4
"""ResultSerialiser: results that may be under way or waiting behind the array."""
SERIALISER_CYCLES = 6
"""ResultSerialiser: from a result to its first element, but for the normaliser."""
ACTIVATION_CYCLES = 25
"""ActivationUnit: from up to h. Position, table and output (7), three multipliers, each with 3 to
round."""
QUANTISER_CYCLES = 9
"""BlockQuantiser: from the last elements of a block to the lane buffer."""
COMBINER_CYCLES = 15
"""RowSums: from an output to its place in the y buffer."""
SUMS_READ_CYCLES = 3
"""RowSums: from an address to the sums."""
FLOAT_CYCLES = 10
"""Combiner: from a sum to float32."""
ROW_EXPONENTS = 29
"""TileBuffer: tiles whose row exponents are stored before the next word waits."""

# -- steps between blocks
READ_CYCLES = 6
"""From a reader's request to its first beat, but for the latency: splitter, grant, choice and AR,
and two registers behind R."""
WRITE_CYCLES = 2
"""From the last beat on W to the writer's ``done``, but for the latency: B is counted, ``done``."""
GRANT_CYCLES = 3
"""WeightStreamer: between bursts, to measure one, see that it fits and grant it."""
CREDIT_CYCLES = 3
"""WeightStreamer: from a beat that leaves the FIFO to the grant that waited for it."""

Pairs = NDArray[np.integer]
_Process: TypeAlias = "Generator[int | _Event | _Read, None, None]"

_NEVER = 1 << 62
"""The cycle of what is not known yet."""


@dataclass(frozen=True)
class Prediction:
    """What a command is predicted to take; ``cycles`` is the completion's field.

    The five counters add up to ``cycles``; the device counts idle cycles between commands, too.

    Parameters
    ----------
    cycles, busy, starved_weights, starved_activations, stalled_output, idle : :class:`int`
    bytes_read_weights, bytes_read_other, bytes_written : :class:`int`
    """

    cycles: int = 0
    busy: int = 0
    starved_weights: int = 0
    starved_activations: int = 0
    stalled_output: int = 0
    idle: int = 0
    bytes_read_weights: int = 0
    bytes_read_other: int = 0
    bytes_written: int = 0

    def __add__(self, other: Prediction) -> Prediction:
        names = self.__dataclass_fields__
        return Prediction(**{name: getattr(self, name) + getattr(other, name) for name in names})


def expert_cycles(
    config: AcceleratorConfig,
    shape: ExpertShape,
    ids: Pairs,
    num_experts: int,
    *,
    planes: int,
    latency: int = MEMORY_LATENCY_CYCLES,
) -> int:
    """Return the predicted cycles of EXPERTS, see :func:`predict_experts`."""
    return predict_experts(config, shape, ids, num_experts, planes=planes, latency=latency).cycles


def linear_cycles(
    config: AcceleratorConfig, section: Section, tokens: int, *, planes: int,
    latency: int = MEMORY_LATENCY_CYCLES
) -> int:
    """Return the predicted cycles of GEMM, see :func:`predict_linear`."""
    return predict_linear(config, section, tokens, planes=planes, latency=latency).cycles


def predict_experts(
    config: AcceleratorConfig,
    shape: ExpertShape,
    ids: Pairs,
    num_experts: int,
    *,
    planes: int,
    latency: int = MEMORY_LATENCY_CYCLES,
) -> Prediction:
    """Predict EXPERTS.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    shape : :class:`ExpertShape`
    ids : integer array, (T, K)
        Those outside [0, num_experts) are skipped. What exceeds the limits of one command is cut
        as the driver does it; the result is the sum.
    num_experts : :class:`int`
        Of the layer.
    planes : :class:`int`
        1 (``a8``) or 2 (``a16``).
    latency : :class:`int`
        Of the ideal memory, reads and writes, cycles.
    """
    ids = np.asarray(ids, np.int64)
    tokens, top_k = ids.shape
    total = Prediction()
    if tokens and top_k:
        most = min(config.max_tokens, config.max_assignments // top_k)
        for begin in range(0, tokens, most):
            job = _Job(
                config, (shape.gate_up, shape.down), ids[begin : begin + most], num_experts,
                planes, latency)
            total += _Machine(job).run()
    return total


def predict_linear(
    config: AcceleratorConfig, section: Section, tokens: int, *, planes: int,
    latency: int = MEMORY_LATENCY_CYCLES
) -> Prediction:
    """Predict GEMM with ``tokens`` rows of x; see :func:`predict_experts`."""
    total = Prediction()
    most = min(config.max_tokens, config.max_assignments)
    for begin in range(0, tokens, most):
        ids = np.zeros((min(most, tokens - begin), 1), np.int64)
        total += _Machine(_Job(config, (section,), ids, 1, planes, latency)).run()
    return total


def element_cycles(config: AcceleratorConfig) -> int:
    """Return the cycles from a result of the array to its first element.

    It is normalised in a stage for each shift, two for one beyond 16, one for the last two, and two
    to round.
    """
    shifts = (config.joined_bits - 2).bit_length()
    return SERIALISER_CYCLES + shifts + (shifts > 5) - 1 + 2


# -- what is to be done
@dataclass(frozen=True)
class _Job:
    """A command: one section (GEMM) or two (EXPERTS)."""

    config: AcceleratorConfig
    sections: tuple[Section, ...]
    ids: Pairs
    num_experts: int
    planes: int
    latency: int

    @property
    def linear(self) -> bool:
        return len(self.sections) == 1

    @property
    def per_group(self) -> int:
        """Tokens of a group."""
        return self.config.token_lanes // self.planes

    @property
    def d_in(self) -> int:
        return self.sections[0].k

    @property
    def d_out(self) -> int:
        return self.sections[-1].rows

    def beats(self, elements: int, size: int = 4) -> int:
        """Beats of so many elements of ``size`` bytes."""
        return -(-elements * size // self.config.port_bytes)


@dataclass
class _Pass:
    """One expert over at most as many tokens as there are slots.

    Parameters
    ----------
    experts : :class:`int`
        Entries of the expert table that the dispatcher reads before it.
    tokens : list of :class:`int`
        By slot.
    same : :class:`bool`
        The tokens of the pass before, in the same slots.
    compare : :class:`int`
        Cycles to find that out.
    first, last : list of :class:`bool`
        By slot: no partial sum of the token is in memory; none will be.
    is_last : :class:`bool`
        The command's last pass.
    """

    experts: int
    tokens: list[int]
    same: bool = False
    compare: int = 1
    first: list[bool] = field(default_factory=list)
    last: list[bool] = field(default_factory=list)
    is_last: bool = False


def _passes(job: _Job) -> list[_Pass]:
    """Return the passes of a command, as the dispatcher makes them."""
    flat = job.ids.reshape(-1)
    valid = (flat >= 0) & (flat < job.num_experts)
    token_of = np.nonzero(valid)[0] // job.ids.shape[1]
    expert_of = flat[valid]
    order = np.argsort(expert_of, kind="stable")
    tokens = token_of[order].tolist()
    counts = np.bincount(expert_of, minlength=job.num_experts).tolist()
    total = np.bincount(token_of, minlength=len(job.ids)).tolist()
    done = [0] * len(job.ids)
    capacity = job.config.max_slots // job.planes

    passes: list[_Pass] = []
    resident: list[int] = []
    resident_first: list[bool] = []
    position, walked = 0, 0
    for count in counts:
        walked += 1
        for begin in range(0, count, capacity):
            slots = min(capacity, count - begin)
            now = _Pass(walked, tokens[position : position + slots])
            walked, position = 0, position + slots
            if slots == len(resident):
                wrong = next((i for i in range(slots) if now.tokens[i] != resident[i]), None)
                now.same = wrong is None
                now.compare = 2 * slots + 1 if wrong is None else min(2 * slots + 1, 2 * wrong + 5)
            for slot, token in enumerate(now.tokens):
                now.first.append(resident_first[slot] if now.same else done[token] == 0)
                done[token] += 1
                now.last.append(done[token] == total[token])
            resident, resident_first = now.tokens, now.first
            passes.append(now)
    if passes:
        passes[-1].is_last = True
    return passes


@functools.lru_cache(maxsize=64)
def _tile_words(section: Section) -> tuple[list[int], list[int]]:
    """Return the first and the last weight word of each tile, counted from the section's start."""
    tile = np.arange(section.tiles)
    rows = tile // section.tiles_per_row_word + 1
    per_word = section.entries_per_scale_word
    first = rows + tile * section.groups // per_word + 1 + tile * section.steps
    last = rows + ((tile + 1) * section.groups - 1) // per_word + (tile + 1) * section.steps
    return first.tolist(), last.tolist()


# -- events
class _Event:
    """Something that happens once, in a cycle that may become known ahead of it."""

    def __init__(self) -> None:
        self.cycle = _NEVER
        self.waiting: list[_Process] = []

    @property
    def known(self) -> bool:
        return self.cycle < _NEVER


class _Read:
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


class _Schedule:
    """Processes in the order of their cycles; one waits for a cycle, an event or a read's end."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, _Process, _Read | None]] = []
        self._sequence = 0

    @property
    def next(self) -> int:
        """Cycle of the process whose turn it is."""
        return self._heap[0][0] if self._heap else _NEVER

    def start(self, cycle: int, process: _Process, read: _Read | None = None) -> None:
        """Let a process run from ``cycle`` on."""
        self._sequence += 1
        heapq.heappush(self._heap, (cycle, self._sequence, process, read))

    def set(self, event: _Event, cycle: int) -> None:
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
        elif isinstance(wanted, _Read):
            self.start(max(cycle, wanted.last), process, wanted)
        elif wanted is not None and wanted.known:
            self.start(max(cycle, wanted.cycle), process)
        elif wanted is not None:
            wanted.waiting.append(process)


# -- memory port
class _Port:
    """The port as its clients see it: beats of one request after another, one a cycle.

    Calls must come in the order of their cycles.
    """

    def __init__(self, latency: int) -> None:
        self._latency = latency
        self._free = 0
        self._pending: deque[_Read] = deque()
        self.bursts: list[_Read] = []
        """Reads of weights in their order; one that writes interrupt becomes two."""
        self.beats_read = 0
        self.beats_written = 0
        self.writes = 0

    def read(self, cycle: int, beats: int, beat: int = -1) -> _Read:
        """Return the read of a request that is accepted in ``cycle``; ``beat``: of weights."""
        first = max(cycle + READ_CYCLES + self._latency, self._free)
        self._free = first + beats
        self.beats_read += beats
        read = _Read(beat, first, first + beats - 1)
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
        self.writes += 1
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
                rest = _Read(read.beat + cycle - read.first, free, read.last + beats)
                read.last = cycle - 1
                self._pending.insert(self._pending.index(read) + 1, rest)
                at = len(self.bursts) - 1
                while self.bursts[at] is not read:
                    at -= 1
                self.bursts.insert(at + 1, rest)
                read = rest
            free = read.last + 1
        self._free = max(self._free, free)


# -- weight streamer and tile buffer, write side
class _Words:
    """A section in the weight stream: where it begins, and by tile what becomes of it.

    Parameters
    ----------
    section : :class:`Section`
    accepted : :class:`int`
        Cycle in which the tile buffer takes its shape.
    before : :class:`_Words`, optional
        The section ahead of it.

    Attributes
    ----------
    first_word, first_step, first_tile : :class:`int`
        In the whole stream.
    period : :class:`int`
        After so many tiles row and scale words come at the same places again.
    settled : :class:`int`
        From this tile on results leave as fast as they come.
    busy : :class:`int`
        Steps of a tile, for all groups.
    loaded : :class:`_Event`
        The parser takes it up.
    turn : :class:`int`
        Cycle in which its first word may be accepted.
    began, arrived : list of :class:`int`
        Cycles in which a tile's first and last step are accepted.
    ended, taken : list of :class:`int`
        Cycles in which its last step is started, its last element leaves the serialiser's FIFO.
    """

    def __init__(self, section: Section, accepted: int, before: _Words | None) -> None:
        self.section = section
        self.accepted = accepted
        self.steps, self.tiles = section.steps, section.tiles
        self.first, self.last = _tile_words(section)
        per_word = section.entries_per_scale_word
        self.period = math.lcm(
            section.tiles_per_row_word, per_word // math.gcd(per_word, section.groups))
        self.settled, self.busy = _NEVER, 0
        self.first_word = self.first_step = self.first_tile = 0
        if before is not None:
            self.first_word = before.first_word + before.section.words
            self.first_step = before.first_step + before.tiles * before.steps
            self.first_tile = before.first_tile + before.tiles
        self.loaded = _Event()
        self.turn = 0
        self.began: list[int] = []
        self.arrived: list[int] = []
        self.ended: list[int] = []
        self.taken: list[int] = []


class _Place:
    """Where a reader of the stream is, so that it finds the next place nearby."""

    def __init__(self) -> None:
        self.section = self.tile = self.burst = 0


class _Stream:
    """Weights from memory to the ring: bursts as the FIFO has room, words as the ring has.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    schedule : :class:`_Schedule`
    port : :class:`_Port`
    """

    def __init__(self, config: AcceleratorConfig, schedule: _Schedule, port: _Port) -> None:
        self._config = config
        self._schedule = schedule
        self._port = port
        self._bursts = port.bursts
        self._spacing = config.beats_per_word
        # From a word's last beat to the parser: FIFO (2 cycles), the gearbox, and a register.
        self._delay = 3 if self._spacing == 1 else 4
        self.sections: list[_Words] = []
        self.beats = 0
        self._requests: deque[tuple[int, int]] = deque()
        self._left = self._room = 0  # beats of the request, of its burst
        self._request_beat = 0  # its first
        self._grant = -GRANT_CYCLES
        self._credit, self._credit_ring = _Place(), _Place()
        self._parser, self._ring, self._exponents = _Place(), _Place(), _Place()
        self._arrived, self._before = 0, -1  # last step of the tile before, its word

    def request(self, cycle: int, words: int) -> None:
        """Ask for the words of an image; the request is accepted in ``cycle``."""
        self._requests.append((cycle, words * self._spacing))

    def announce(self, section: Section, cycle: int) -> None:
        """Tell the parser in ``cycle`` what comes next."""
        self.sections.append(
            _Words(section, cycle, self.sections[-1] if self.sections else None))
        if len(self.sections) == 1:
            self._load()

    # -- bursts
    def grant(self) -> int:
        """Return the cycle of the next burst's grant, or _NEVER if something must happen first."""
        if not self._left:
            if not self._requests:
                return _NEVER
            # Four cycles to take up a request, unless one is under way.
            accepted, self._left = self._requests.popleft()
            self._request_beat = self.beats
            self._grant = max(self._grant, accepted + 4 - GRANT_CYCLES)
            burst = self._config.max_burst_beats
            header = max(HEADER_BYTES, self._config.word_bytes)
            self._room = burst - header // self._config.port_bytes % burst
        cycle = self._grant + GRANT_CYCLES
        # Room in the FIFO for all of the burst: once the beat in the way of its last has left.
        beat = self.beats + min(self._left, self._room) - self._config.read_ahead_beats - 1
        if beat < 0:
            return cycle
        left = self._beat_cycle(self._credit, beat) + 1
        # A beat leaves the FIFO's memory when the one before it is taken: the first of a word with
        # the word before it (a word of one beat: itself), the others one a cycle from there. A word
        # is taken when the parser accepts the one before it.
        word, part = divmod(beat - 1, self._spacing)
        word -= 1 + (self._spacing > 1)
        if word >= 0:
            left = max(left, self._accepted(word) + part)
        return max(cycle, left + CREDIT_CYCLES)

    def issue(self, grant: int) -> None:
        """Request the next burst, one cycle after its grant."""
        beats = min(self._left, self._room)
        self._port.read(grant + 1, beats, self.beats)
        self.beats += beats
        self._left -= beats
        self._room = self._config.max_burst_beats
        self._grant = grant

    def _beat_cycle(self, place: _Place, beat: int) -> int:
        """Return the cycle in which a beat comes from the port."""
        bursts = self._bursts
        at = place.burst
        while bursts[at].beat > beat:
            at -= 1
        while at + 1 < len(bursts) and bursts[at + 1].beat <= beat:
            at += 1
        place.burst = at
        return bursts[at].first + beat - bursts[at].beat

    def _accepted(self, word: int) -> int:
        """Return the cycle in which a word is accepted if its beats are there, or _NEVER.

        Words must be asked for in ascending order.
        """
        place = self._credit
        while place.section < len(self.sections):
            words = self.sections[place.section]
            at = word - words.first_word
            while place.tile < len(words.last) and at > words.last[place.tile]:
                place.tile += 1
            if place.tile < len(words.last):
                break
            place.section, place.tile = place.section + 1, 0
        else:
            return _NEVER
        tile = place.tile
        if not words.loaded.known or tile > len(words.arrived):
            return _NEVER
        turn = words.turn if tile == 0 else words.arrived[tile - 1] + self._spacing
        first, last = words.first[tile], words.last[tile]
        ahead = min(at, first) - (0 if tile == 0 else words.last[tile - 1] + 1)
        turn += ahead * self._spacing
        if at < first:  # row and scale words
            return turn
        steps = words.steps
        step = words.first_step + tile * steps - self._config.tile_words
        if tile < len(words.arrived):
            began = words.began[tile]
        else:  # the parser is in the middle of this tile
            began = max(turn, self._exponent_room(words.first_tile + tile - ROW_EXPONENTS),
                        self._ring_room(self._credit_ring, step))
        into = (at - first) * (steps - 1) // max(1, last - first)
        return max(began + (at - first) * self._spacing,
                   self._ring_room(self._credit_ring, step + into, into, at - first))

    # -- words
    def _ring_room(self, place: _Place, step: int, into: int = 0, span: int = 0) -> int:
        """Return the cycle from which a step's place in the ring is free, or _NEVER.

        Places are freed one a cycle in the last group of a tile. Where another tile's begin among
        the ``into`` steps before this one, ``span`` words ago, they may be what this one waits
        for.
        """
        if step < 0:
            return 0
        while True:
            words = self.sections[place.section]
            steps = words.steps
            tile, at = divmod(step - words.first_step, steps)
            if tile < 0:
                place.section -= 1
            elif tile >= words.tiles:
                place.section += 1
            elif tile >= len(words.ended):
                return _NEVER
            else:
                break
        begin = words.ended[tile] - (steps - 1) + 3
        if 0 < at <= into:
            return begin + max(at, at * span // into * self._spacing)
        return begin + at

    def _exponent_room(self, tile: int) -> int:
        """Return the cycle from which the FIFO of row exponents has room once ``tile`` is done."""
        if tile < 0:
            return 0
        place = self._exponents
        while True:
            words = self.sections[place.section]
            at = tile - words.first_tile
            if at < words.tiles:
                return words.taken[at] + 1 if at < len(words.taken) else _NEVER
            place.section += 1

    def _load(self) -> None:
        """Take up the next section when the one before has ended."""
        words = self.sections[self._parser.section]
        loaded = max(words.accepted, self._arrived) + 1
        words.turn = max(loaded + 1, self._arrived + self._spacing)
        self._arrived, self._before = words.turn - self._spacing, -1
        self._schedule.set(words.loaded, loaded)

    def next_tile(self) -> int:
        """Return the cycle of the next tile's last beat, or _NEVER if it cannot be accepted yet."""
        place = self._parser
        if place.section >= len(self.sections):
            return _NEVER
        words = self.sections[place.section]
        if not words.loaded.known:
            self._load()
        tile = place.tile
        last_beat = (words.first_word + words.last[tile] + 1) * self._spacing - 1
        if self.beats <= last_beat:
            return _NEVER
        steps = words.steps
        step = words.first_step + tile * steps - self._config.tile_words + steps - 1
        exponents = words.first_tile + tile - ROW_EXPONENTS
        if self._exponent_room(exponents) == _NEVER or self._ring_room(self._ring, step) == _NEVER:
            return _NEVER
        return self._beat_cycle(place, last_beat)

    def accept(self) -> None:
        """Accept a tile: when its words are there, in turn, with room in ring and FIFO.

        Words come at most one each ``beats_per_word`` cycles, and within a tile's last group the
        array frees one a cycle: a tile's first and last step say it all.
        """
        place, spacing, delay = self._parser, self._spacing, self._delay
        words = self.sections[place.section]
        tile = place.tile
        first, last = words.first[tile], words.last[tile]
        steps = words.steps
        step = words.first_step + tile * steps - self._config.tile_words
        beat = (words.first_word + first + 1) * spacing - 1
        began = max(
            self._arrived + (first - self._before) * spacing,
            self._exponent_room(words.first_tile + tile - ROW_EXPONENTS),
            self._ring_room(self._ring, step),
            self._beat_cycle(place, beat) + delay)
        span = last - first
        self._arrived = arrived = max(
            began + span * spacing,
            self._ring_room(self._ring, step + steps - 1, steps - 1, span),
            self._beat_cycle(place, beat + span * spacing) + delay)
        self._before = last
        words.began.append(began)
        words.arrived.append(arrived)
        place.tile += 1
        if place.tile == words.tiles:
            place.section, place.tile, self._before = place.section + 1, 0, -1

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
        if length not in (beats, period * words.busy):
            return
        for cycles in (words.began, words.arrived, words.ended):
            last, middle, first = cycles[-1], cycles[-1 - period], cycles[-1 - 2 * period]
            if last - middle != length or middle - first != length:
                return
        begin = (words.first_word + words.first[tile - 1]) * self._spacing
        count = min((limit - words.ended[-1]) // length, (words.tiles - tile) // period,
                    (self._left - reach) // beats) - 1
        if count < 1 or begin < self._request_beat or not self._port.only_weights:
            return
        for cycles in (words.began, words.arrived, words.ended, words.taken):
            pattern = cycles[-period:]
            cycles.extend([cycle + i * length for i in range(1, count + 1) for cycle in pattern])
        place.tile += count * period
        self._before = words.last[place.tile - 1]
        self._arrived = words.arrived[-1]
        later, further = count * length, count * beats
        oldest = min(begin, self.beats - reach)
        for read in reversed(self._bursts):
            if read.beat + read.last - read.first < oldest:
                break
            read.beat += further
            read.first += later
            read.last += later
        self._port.skip(later, further)
        self.beats += further
        self._left -= further
        self._grant += later


# -- the machine
class _Machine:
    """One command in an idle machine."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._schedule = _Schedule()
        self._port = _Port(job.latency)
        self._stream = _Stream(job.config, self._schedule, self._port)
        self._passes = _passes(job)
        count = len(self._passes)
        self._offered = [_Event() for _ in range(count)]  # the dispatcher has prepared the pass
        self._handed = [_Event() for _ in range(count)]  # the sequencer has taken it
        self._x_loaded = [_Event() for _ in range(count)]
        self._issued = [_Event() for _ in range(count)]  # its last step has started
        self._in_y = [_Event() for _ in range(count)]  # its last output is in the y buffer
        self._retired = [_Event() for _ in range(count)]
        self._finished = 0
        self._combiner_free = 0
        self._busy = self._starved_weights = self._starved_activations = self._stalled_output = 0
        self._element_cycles = element_cycles(job.config) - 1

    def run(self) -> Prediction:
        """Return the prediction."""
        schedule, stream = self._schedule, self._stream
        schedule.start(0, self._commands())
        for n in range(len(self._passes)):
            schedule.start(0, self._retire(n))
        array = self._compute()
        while True:
            tile, grant = stream.next_tile(), stream.grant()
            process = schedule.next
            if process == tile == grant == _NEVER:
                return self._prediction()
            if process <= min(tile, grant + 1):
                schedule.resume()
            elif tile <= grant + 1:
                stream.accept()
                next(array)
                stream.skip(process)
            else:
                stream.issue(grant)
            next(array)  # it goes as far as what is known carries it

    def _prediction(self) -> Prediction:
        port, width = self._port, self._job.config.port_bytes
        weights = self._stream.beats
        active = (self._busy + self._starved_weights + self._starved_activations
                  + self._stalled_output)
        return Prediction(
            cycles=self._finished,
            busy=self._busy,
            starved_weights=self._starved_weights,
            starved_activations=self._starved_activations,
            stalled_output=self._stalled_output,
            idle=self._finished - active,
            bytes_read_weights=weights * width * self._job.config.channels,
            bytes_read_other=(port.beats_read - weights) * width,
            bytes_written=port.beats_written * width + ENTRY_BYTES,
        )

    # -- command processor
    def _commands(self) -> _Process:
        """Fetch submission and layer, check them, derive sizes, start the job.

        From the submission's last beat 5 cycles to the request of the layer; from the layer's 9 and
        the bits of the largest factor of a size to the job.
        """
        job, port = self._job, self._port
        beats = job.beats(ENTRY_BYTES, 1)
        read = port.read(0, beats)
        yield read
        yield read.last + 5
        read = port.read(read.last + 5, beats)
        yield read
        factors = (*(section.steps for section in job.sections), job.d_out // BLOCK,
                   job.ids.shape[1], job.num_experts - 1)
        start = read.last + 9 + max(factors).bit_length()
        yield start
        self._schedule.start(start, self._dispatch(start))

    # -- dispatcher
    def _dispatch(self, start: int) -> _Process:
        """Sort the pairs, then prepare a pass while another runs."""
        job, stream = self._job, self._stream
        weights: _Read | None = None
        if job.linear:
            cycle = start + 8  # prepare, clear the count, rewind, fetch the first id
        else:
            beats = job.beats(job.ids.size)
            yield start + 3
            ids = self._port.read(start + 3, beats)
            yield ids
            # The counts are cleared meanwhile; then weights are asked for, and the walk begins.
            request = max(start + 5 + job.num_experts, ids.last + 1) + 1
            yield request
            weights = self._port.read(request, beats)
            cycle = request + 5
        cycle = self._sort(cycle)

        last_load: _Event | None = None
        for n, now in enumerate(self._passes):
            cycle += 2 * now.experts  # a count is read, and looked at
            if n >= 2:  # one pass runs, one is prepared
                yield self._retired[n - 2]
                cycle = max(cycle, self._retired[n - 2].cycle + 1)
            yield cycle
            stream.request(cycle, sum(section.words for section in job.sections))
            for section in job.sections:  # one waits in the tile buffer while one is parsed
                cycle += 1
                if stream.sections:
                    loaded = stream.sections[-1].loaded
                    yield loaded
                    cycle = max(cycle, loaded.cycle + 1)
                stream.announce(section, cycle)
            cycle += 1 + now.compare
            if weights is not None:
                yield weights
                cycle = max(cycle, weights.last + 1)
            cycle += 1 + 4 * len(now.tokens) + 4  # the slot table
            if not now.same:
                if last_load is not None:
                    yield last_load
                    cycle = max(cycle, last_load.cycle)
                yield cycle
                last_load = self._x_loaded[n]
                self._schedule.start(cycle, self._load(n, cycle))
                cycle += 1
            self._schedule.set(self._offered[n], cycle)
            if n:
                yield self._issued[n - 1]
                cycle = max(cycle, self._issued[n - 1].cycle + 1)
            self._schedule.set(self._handed[n], cycle)
            cycle += 2
        if self._passes:
            yield self._retired[-1]
            cycle = self._retired[-1].cycle
        elif weights is not None:
            yield weights
            cycle = max(cycle, weights.last + 1)
        # The engine sees that all is idle and pulses its done; the completion starts.
        self._finished = max(cycle + 1, self._combiner_free) + 3

    def _sort(self, cycle: int) -> int:
        """Return when a counting sort is over: 3 cycles for each pair, 2 an expert, 4, 3 a pair.

        A token without an expert waits until the row of zeros before it is written.
        """
        job = self._job
        tokens, top_k = job.ids.shape
        without = ~((job.ids >= 0) & (job.ids < job.num_experts)).any(axis=1)
        counted = 0
        for token in np.nonzero(without)[0].tolist():
            cycle += 3 * top_k * (token + 1 - counted)
            counted = token + 1
            cycle = max(cycle, self._combiner_free) + 1
            self._combiner_free = self._write_row(self._row_address(cycle) + 1, last=True) + 1
        cycle += 3 * top_k * (tokens - counted)
        return cycle + 2 * job.num_experts + 4 + 3 * top_k * tokens

    # -- activation loader
    def _load(self, n: int, cycle: int) -> _Process:
        """Fetch and quantise the rows of a pass; the line buffer holds two.

        A row: 2 cycles to look up its token, a multiplication by the steps, the request. When its
        last beat is through the tree of maxima it leaves,
        ``quantiser_lanes`` elements a cycle.
        """
        job, config = self._job, self._job.config
        beats = job.beats(job.d_in)
        groups = job.d_in // config.quantiser_lanes
        tree = 2 + (config.port_bytes // 4).bit_length() - 1
        count = len(self._passes[n].tokens)
        rows: list[_Read] = []
        left = -1  # last group of the row that left last
        lookup = cycle + 1
        for row in range(count + 2):
            if row >= 2:
                yield rows[row - 2]
                left = max(rows[row - 2].last + tree, left + 1) + groups - 1
            if row < count:
                token = max(lookup + 1, left + 1)
                request = token + 2 + (job.d_in // BLOCK).bit_length()
                yield request
                rows.append(self._port.read(request, beats))
                lookup = request + 1
        # Three registers, the quantiser, the count of rows, the pulse.
        self._schedule.set(self._x_loaded[n], left + 3 + QUANTISER_CYCLES + 2)

    # -- sequencer, array, serialiser, activation unit, hidden buffer
    def _compute(self) -> Iterator[None]:
        """Run the sections of each pass; yields where something is not known yet."""
        job, config = self._job, self._job.config
        per_group = job.per_group
        results = _Results()
        index = 0
        for n, now in enumerate(self._passes):
            while not self._handed[n].known:
                yield
            count = len(now.tokens)
            through = [min(count, begin + per_group) for begin in range(0, count, per_group)]
            slots = np.diff([0, *through]).tolist()
            cycle = self._handed[n].cycle + 1
            if not now.same:
                while not self._x_loaded[n].known:
                    yield
                cycle = max(cycle, self._x_loaded[n].cycle + 1)
            self._starved_activations += cycle - self._handed[n].cycle
            results.end = cycle
            for down, section in enumerate(job.sections, start=2 - len(job.sections)):
                ready = [0] * len(slots)
                if down:
                    if n:
                        while not self._retired[n - 1].known:
                            yield
                        ready = [self._retired[n - 1].cycle + 1] * len(slots)
                    if not job.linear:
                        # Elements, h, and three registers until all of it is known to be there;
                        # then slot by slot through the quantiser.
                        tree = config.channels.bit_length() - 1
                        all_there = (
                            results.taken + self._element_cycles + ACTIVATION_CYCLES + 3 + tree)
                        groups = section.k // config.quantiser_lanes
                        ready = [
                            max(free, all_there + slot * groups + QUANTISER_CYCLES + 5)
                            for free, slot in zip(ready, through, strict=True)
                        ]
                        results.end += 2  # the hidden buffer is started
                        self._starved_activations += 2
                words = self._stream.sections[index]
                index += 1
                yield from self._section(words, results, slots, ready)
            self._schedule.set(self._issued[n], results.end)
            self._schedule.set(
                self._in_y[n], results.taken + self._element_cycles + COMBINER_CYCLES)
        while True:
            yield

    def _section(self, words: _Words, results: _Results, slots: list[int], ready: list[int]
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
        for tile in range(words.settled):
            while len(arrived) <= tile:
                yield
            for group, slot_count in enumerate(slots):
                size = slot_count * (rows - short if tile + 1 == tiles else rows)
                start = end + 1
                if tile == 0 and ready[group] > start:
                    self._starved_activations += ready[group] - start
                    start = ready[group]
                if group == 0 and began[tile] >= start:
                    self._starved_weights += began[tile] + 1 - start
                    start = began[tile] + 1
                if taken[0] + 1 >= start:  # a place that becomes free is seen a cycle later
                    self._stalled_output += taken[0] + 2 - start
                    start = taken[0] + 2
                end = start + steps - 1
                if group == 0 and arrived[tile] >= end:
                    self._starved_weights += arrived[tile] + 1 - end
                    end = arrived[tile] + 1
                taken.append(max(end + 1 + ARRAY_CYCLES, taken[-1]) + size)
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
        self._busy += words.busy * tiles
        if tiles > words.settled:
            self._starved_weights += end - settled_end - words.busy * (tiles - words.settled)
            taken.extend(words.taken[-1] - i * steps for i in reversed(range(RESULTS)))
        results.end = end
        results.history = list(taken)

    # -- combiner
    def _retire(self, n: int) -> _Process:
        """Retire a pass when its outputs are in the y buffer and the next pass is known.

        If that has other tokens, each slot's row goes to memory first, one after another.
        """
        job, now = self._job, self._passes[n]
        yield self._in_y[n]
        cycle = self._in_y[n].cycle + 1
        if not now.is_last:
            yield self._offered[n + 1]
            cycle = max(cycle, self._offered[n + 1].cycle)
        cycle += 1
        if now.is_last or not self._passes[n + 1].same:
            cycle = max(cycle, self._combiner_free)
            for first, last in zip(now.first, now.last, strict=True):
                cycle = self._row_address(cycle + 3)  # the slot table, two cycles
                if not first:
                    yield cycle
                    read = self._port.read(cycle, job.beats(job.d_out, 8))
                    yield read
                    cycle = read.last + 2 + SUMS_READ_CYCLES
                yield cycle
                cycle = self._write_row(cycle + 1, last=last)
            cycle += 1
        self._schedule.set(self._retired[n], cycle)

    def _row_address(self, cycle: int) -> int:
        """Return when a row's address is known whose token is multiplied from ``cycle`` on."""
        return cycle + 2 + (self._job.d_out // BLOCK).bit_length()

    def _write_row(self, cycle: int, *, last: bool) -> int:
        """Return when a row is written and acknowledged; the request is accepted in ``cycle``.

        Sums leave a word a cycle, or in two if a word makes two beats (integers) or half of one
        (float32); then their memories, conversion (of integers a register), the FIFO (2) and W's
        register.
        """
        job, config = self._job, self._job.config
        beats = job.beats(job.d_out, 4 if last else 8)
        words = job.d_out // config.quantiser_lanes
        first = cycle + 1 + SUMS_READ_CYCLES + (FLOAT_CYCLES if last else 1) + 2 + 1
        spacing = 1
        if last and beats < words:
            first, spacing = first + 1, 2
        self._schedule.start(first, self._write(first, beats, spacing))
        return first + (beats - 1) * spacing + job.latency + WRITE_CYCLES

    def _write(self, cycle: int, beats: int, spacing: int) -> _Process:
        """Put beats on the bus, a few at a time if they are not dense."""
        step = beats if spacing == 1 else 8
        for begin in range(0, beats, step):
            yield cycle + begin * spacing
            self._port.write(cycle + begin * spacing, min(step, beats - begin))


class _Results:
    """What the serialiser still has to do between sections: last step, and its last results."""

    def __init__(self) -> None:
        self.end = 0
        self.history = [-1] * RESULTS

    @property
    def taken(self) -> int:
        """Cycle in which the last element of the last result was chosen."""
        return self.history[-1]
