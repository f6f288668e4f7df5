"""Weights on their way: bursts as the FIFO has room."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles.memory_port import MemoryPort
from moeaccel.cycles.schedule import NEVER
from moeaccel.image import HEADER_BYTES

GRANT_CYCLES = 3
"""WeightStreamer: between bursts, to measure one, see that it fits and grant it."""
CREDIT_CYCLES = 3
"""WeightStreamer: from a beat that leaves the FIFO to the grant that waited for it."""


class Place:
    """Where a reader of the stream is, so that it finds the next place nearby."""

    def __init__(self) -> None:
        self.section = self.tile = self.burst = 0


class WeightStreamer:
    """Bursts of images, one after another, as the FIFO of beats has room.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    port : :class:`MemoryPort`

    Attributes
    ----------
    beats : :class:`int`
        Requested so far.
    requests : :class:`int`
        So far.
    loaded : list of int
        Cycles in which requests were taken up; until then the next one is not accepted.
    moves_on : callable
        Of the tile buffer, see :meth:`TileBuffer.moves_on`.
    """

    def __init__(self, config: AcceleratorConfig, port: MemoryPort) -> None:
        self._config = config
        self._port = port
        self._bursts = port.bursts
        self._spacing = config.beats_per_word
        self._reach = config.read_ahead_beats + config.max_burst_beats
        self.beats = 0
        self.moves_on: Callable[[int], int] = lambda word: NEVER
        self._requests: deque[tuple[int, int, int]] = deque()
        self.requests = 0
        self.loaded: list[int] = []
        self._left = self._room = 0  # beats of the request, of its burst
        self._request_beat = 0  # its first
        self._grant = -GRANT_CYCLES
        self._credit = Place()

    def request(self, cycle: int, words: int, begin: int = 0) -> None:
        """Ask for words of an image from word ``begin`` on; it is accepted in ``cycle``."""
        self.requests += 1
        self._requests.append((cycle, words * self._spacing, begin * self._spacing))

    def grant(self) -> int:
        """Return the cycle of the next burst's grant, or NEVER if something must happen first."""
        if not self._left:
            if not self._requests:
                return NEVER
            # Four cycles to take up a request, unless one is under way.
            accepted, self._left, begin = self._requests.popleft()
            self._request_beat = self.beats
            self.loaded.append(max(self._grant, accepted + 1))
            self._grant = max(self._grant, accepted + 4 - GRANT_CYCLES)
            burst = self._config.max_burst_beats
            header = max(HEADER_BYTES, self._config.word_bytes)
            self._room = burst - (header // self._config.port_bytes + begin) % burst
        cycle = self._grant + GRANT_CYCLES
        # Room in the FIFO for all of the burst: once the beat in the way of its last has left.
        beat = self.beats + min(self._left, self._room) - self._config.read_ahead_beats - 1
        if beat < 0:
            return cycle
        left = self.beat_cycle(self._credit, beat) + 1
        # A beat leaves the FIFO's memory when the one before it is taken: the first of a word with
        # the word before it (a word of one beat: itself), the others one a cycle from there.
        word, part = divmod(beat - 1, self._spacing)
        word -= 1 + (self._spacing > 1)
        if word >= 0:
            left = max(left, self.moves_on(word) + part)
        return max(cycle, left + CREDIT_CYCLES)

    def issue(self, grant: int) -> None:
        """Request the next burst, one cycle after its grant."""
        beats = min(self._left, self._room)
        self._port.read(grant + 1, beats, self.beats)
        self.beats += beats
        self._left -= beats
        self._room = self._config.max_burst_beats
        self._grant = grant

    def beat_cycle(self, place: Place, beat: int) -> int:
        """Return the cycle in which a beat comes from the port."""
        bursts = self._bursts
        at = place.burst
        while bursts[at].beat > beat:
            at -= 1
        while at + 1 < len(bursts) and bursts[at + 1].beat <= beat:
            at += 1
        place.burst = at
        return bursts[at].first + beat - bursts[at].beat

    # -- passing over what repeats
    def repeats(self, begin: int, beats: int) -> int:
        """Return how many times the same ``beats`` may be passed over from beat ``begin`` on."""
        if begin < self._request_beat or not self._port.only_weights:
            return 0
        return (self._left - self._reach) // beats

    def skip(self, begin: int, beats: int, later: int) -> None:
        """Pass over ``beats`` from beat ``begin`` on, which come ``later``."""
        oldest = min(begin, self.beats - self._reach)
        for read in reversed(self._bursts):
            if read.beat + read.last - read.first < oldest:
                break
            read.beat += beats
            read.first += later
            read.last += later
        self._port.skip(later, beats)
        self.beats += beats
        self._left -= beats
        self._grant += later
