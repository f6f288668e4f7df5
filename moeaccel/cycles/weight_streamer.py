"""Weights on their way: bursts as the FIFO has room."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles.memory_port import MemoryPort
from moeaccel.cycles.schedule import NEVER, Read
from moeaccel.image import HEADER_BYTES

GRANT_CYCLES = 3
"""WeightStreamer: between bursts, to measure one, see that it fits and grant it."""
CREDIT_CYCLES = 3
"""WeightStreamer: from a beat that leaves the FIFO to the grant that waited for it."""
HELD_CYCLES = 2
"""BeatBuffer: from a request that is taken up to its first held beat, as if it came from the port:
two cycles ahead of where beats of memory and of the buffer meet."""


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
        Requested so far; those that an expert buffer has are counted when their turn comes.
    held : :class:`int`
        Of these, beats that the buffer had.
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
        self.beats = self.held = 0
        self.moves_on: Callable[[int], int] = lambda word: NEVER
        self._requests: deque[tuple[int, int, int, int, bool]] = deque()
        # Of memory's beats from that one on: how many held ones are ahead of them in the stream.
        self._ahead: deque[tuple[int, int]] = deque()
        self._held_before = 0
        self._fills = False
        self.requests = 0
        self.loaded: list[int] = []
        self._left = self._room = 0  # beats of the request, of its burst
        self._request_beat = 0  # its first
        self._grant = -GRANT_CYCLES
        self._credit = Place()

    def request(self, cycle: int, words: int, begin: int = 0, *, held: int = 0) -> None:
        """Ask for words of an image from word ``begin`` on; it is accepted in ``cycle``.

        The first ``held`` beats of them are in the expert buffer.
        """
        self._accept(cycle, words * self._spacing, begin * self._spacing, held, fills=False)

    def fill(self, cycle: int, beats: int, begin: int) -> None:
        """Bring beats of an image from beat ``begin`` on into the expert buffer."""
        self._accept(cycle, beats, begin, 0, fills=True)

    def _accept(self, cycle: int, beats: int, begin: int, held: int, *, fills: bool) -> None:
        self.requests += 1
        self._requests.append((cycle, beats, begin, held, fills))

    def take_up(self) -> None:
        """Take up the next request when all bursts of the one before are granted."""
        while self._requests and not self._left:
            # Four cycles to take up a request, unless one is under way.
            accepted, self._left, begin, held, self._fills = self._requests.popleft()
            self.loaded.append(max(self._grant, accepted + 1))
            self._grant = max(self._grant, accepted + 4 - GRANT_CYCLES)
            if held:
                first = self.loaded[-1] + HELD_CYCLES
                self._bursts.append(Read(self.beats, first, first + held - 1))
                self.beats += held
                self.held += held
                self._left -= held
                self._ahead.append((self.beats - self.held, self.held))
            self._request_beat = self.beats
            burst = self._config.max_burst_beats
            header = max(HEADER_BYTES, self._config.word_bytes)
            self._room = burst - (header // self._config.port_bytes + begin + held) % burst

    def _in_stream(self, beat: int) -> int:
        """Return where a beat of memory is in the stream; they must be asked for in their order."""
        while self._ahead and self._ahead[0][0] <= beat:
            self._held_before = self._ahead.popleft()[1]
        return beat + self._held_before

    def grant(self) -> int:
        """Return the cycle of the next burst's grant, or NEVER if something must happen first."""
        self.take_up()
        if not self._left:
            return NEVER
        cycle = self._grant + GRANT_CYCLES
        # Room in the FIFO for all of the burst: once the beat in the way of its last has left.
        beat = (self.beats - self.held + min(self._left, self._room)
                - self._config.read_ahead_beats - 1)
        if beat < 0:
            return cycle
        beat = self._in_stream(beat)
        left = self.beat_cycle(self._credit, beat) + 1
        if self._fills:  # it leaves as it comes
            return max(cycle, left + CREDIT_CYCLES)
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

    @property
    def left(self) -> int:
        """Beats of the request under way that are not requested yet."""
        return self._left

    @property
    def last_beat(self) -> int:
        """Cycle of the last beat that was requested."""
        return self._bursts[-1].last

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
