"""Requests for weights, and what the chip has of them."""

from __future__ import annotations

from moeaccel.cycles.job import Job
from moeaccel.cycles.weight_streamer import WeightStreamer

REQUEST_CYCLES = 4
"""ExpertBuffer: from a request to the one that it makes of it."""
STORED_CYCLES = 4
"""BeatBuffer: from the last beat of what is brought to where all know that it is there."""


class ExpertBuffer:
    """Hands requests of passes to the streamer, which is asked for less where beats are held.

    Parameters
    ----------
    job : :class:`Job`
        Whose ``buffered`` says how many, for each pass.
    streamer : :class:`WeightStreamer`
    """

    def __init__(self, job: Job, streamer: WeightStreamer) -> None:
        self._job = job
        self._streamer = streamer
        self._there = job.config.buffer_slots > 0

    def request(self, n: int, cycle: int, words: int, begin: int = 0) -> None:
        """Ask for words of pass ``n``'s image from word ``begin`` on; it is taken in ``cycle``."""
        job, per_word = self._job, self._job.config.beats_per_word
        buffered = job.buffered[n] if job.buffered else 0
        held = min(max(0, buffered - begin * per_word), words * per_word)
        self._streamer.request(
            cycle + REQUEST_CYCLES * self._there, words, begin, held=held)
