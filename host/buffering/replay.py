"""A routing trace through an expert buffer, with the cycles of the cycle model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeaccel.config import MEMORY_LATENCY_CYCLES, AcceleratorConfig
from moeaccel.cycles import predict_experts
from moeaccel.host.buffering.buffer import Counts, ExpertBuffer
from moeaccel.host.buffering.predictions import Prediction
from moeaccel.host.errors import InvalidOption
from moeaccel.host.traces import RoutingTrace
from moeaccel.image import ExpertShape
from moeaccel.plan import plan

__all__ = ["Call", "Outcome", "replay"]


@dataclass
class Call:
    """What one expert, and one call of a layer, cost on a device.

    Memory brings an image's words at ``beats_per_word`` cycles each; from a buffer comes one a
    cycle, and the array takes its steps for each group of tokens. Memory does not run ahead of a
    pass that comes from the buffer by more than its FIFO, which is small beside an expert: that is
    left out.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    shape : :class:`ExpertShape`
    planes, latency : :class:`int`
    """

    config: AcceleratorConfig
    shape: ExpertShape
    planes: int
    latency: int = MEMORY_LATENCY_CYCLES
    _known: dict[tuple[int, ...], int] = field(default_factory=dict)

    @property
    def words(self) -> int:
        """Array words of an expert on one channel."""
        return sum(section.words for section in self.shape.sections)

    @property
    def image_bytes(self) -> int:
        """Bytes of an expert's words, on all channels."""
        return self.words * self.config.word_bytes * self.config.channels

    @property
    def port_bytes(self) -> int:
        """Bytes that memory brings in a cycle, on all channels."""
        return self.config.port_bytes * self.config.channels

    def cycles(self, uses: np.ndarray) -> int:
        """Return the cycles of a call without a buffer, for the tokens of each expert.

        Which token goes to which expert is made up: experts in turn, those with most tokens first.
        """
        counts = np.sort(uses[uses > 0])[::-1]
        key = tuple(counts.tolist())
        if key not in self._known:
            tokens = int(counts[0])
            ids = np.full((tokens, len(counts)), -1)
            for expert, count in enumerate(counts):
                ids[:count, expert] = expert
            self._known[key] = predict_experts(
                self.config, self.shape, ids, len(counts), planes=self.planes,
                latency=self.latency).cycles
        return self._known[key]

    def saved(self, hit_bytes: int, tokens: int) -> float:
        """Return the cycles that bytes save which come from the buffer, for so many tokens."""
        lanes = self.config.token_lanes
        groups = -(-tokens * self.planes // lanes)
        steps = sum(section.tiles * section.steps for section in self.shape.sections)
        streamed = self.words * self.config.beats_per_word
        taken = max(self.words, steps * groups)
        return max(0.0, 1 - taken / streamed) * hit_bytes / self.port_bytes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a buffer did for a trace.

    Parameters
    ----------
    name : :class:`str`
        Of the prediction.
    counts : :class:`Counts`
    guessed, right : :class:`int`
        Experts that were predicted; those that were then used.
    cycles, saved : :class:`float`
        Of all calls without a buffer, as the cycle model has them; how many of them it saves.
    calls : :class:`int`
    """

    name: str
    counts: Counts
    guessed: int
    right: int
    cycles: float
    saved: float
    calls: int

    @property
    def accuracy(self) -> float:
        """Share of the predicted experts that were used."""
        return self.right / self.guessed if self.guessed else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the uses of which anything was there."""
        counts = self.counts
        return (counts.hits + counts.partial) / counts.uses if counts.uses else 0.0

    @property
    def speedup(self) -> float:
        """Cycles without the buffer over cycles with it."""
        return self.cycles / (self.cycles - self.saved) if self.cycles else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        counts = self.counts
        return {"prediction": self.name, "accuracy": self.accuracy, "hit_rate": self.hit_rate,
                "hits": counts.hits, "partial": counts.partial, "misses": counts.misses,
                "hit_bytes": counts.hit_bytes, "fetched_bytes": counts.fetched_bytes,
                "wasted_bytes": counts.wasted_bytes, "calls": self.calls, "cycles": self.cycles,
                "cycles_with_buffer": self.cycles - self.saved, "speedup": self.speedup}


def replay(trace: RoutingTrace, call: Call, *, slots: int, slot_bytes: int | None = None,
           gap: int | None = 0, prediction: type[Prediction] | None = None) -> Outcome:
    """Send the decode tokens of a trace through a buffer.

    Between the calls of two layers memory is idle for ``gap`` cycles: then what is predicted for
    the next layer is fetched. During a call memory is busy with the call.

    Parameters
    ----------
    trace : :class:`RoutingTrace`
    call : :class:`Call`
        What experts and calls cost.
    slots, slot_bytes : :class:`int`
        Of the buffer; a slot takes an image when its size is left out.
    gap : :class:`int`, optional
        Cycles; None: as many as it takes, as a PREFETCH of as many as there are slots does it.
    prediction : type of :class:`Prediction`, optional
        Without one nothing is fetched ahead, and what was used stays until its slot is needed.

    Raises
    ------
    InvalidOption
        If the trace has no decode token, or ``gap`` is negative.
    """
    if gap is not None and gap < 0:
        raise InvalidOption(f"gap must be at least 0 cycles, not {gap}")
    unit = call.config.word_bytes * call.config.channels
    size = call.image_bytes
    buffer = ExpertBuffer(slots, size if slot_bytes is None else slot_bytes, unit=unit)
    predictor = None if prediction is None else prediction(
        n_layers=trace.n_layers, n_experts=trace.n_experts, top_k=trace.top_k)
    guessed = right = calls = 0
    cycles = saved = 0.0
    guess: np.ndarray = np.zeros(0, np.int64)
    target = 0
    for uses, order, following, begins, layer in _calls(trace):
        if predictor is not None and begins is not None:
            predictor.begin_pass(new_request=begins)
        guessed += len(guess)
        if target == layer:  # else that one had no tokens, and no guess for it was right
            right += int((uses[guess] > 0).sum())
        cycles += call.cycles(uses)
        calls += 1
        for expert in order:
            held = buffer.use((layer, expert), size, keep=predictor is None)
            saved += call.saved(held, int(uses[expert]))
        guess = guess[:0]
        if predictor is not None:
            guess = predictor.following(
                layer, uses, None if following is None else lambda uses=following: uses)
            target = (layer + 1) % trace.n_layers
            ahead, budget = guess.tolist(), slots * size
            if gap is None:
                ahead = ahead[:slots]
            else:
                budget = gap * call.port_bytes
            buffer.fetch(((target, expert) for expert in ahead), size, budget)
    if not calls:
        raise InvalidOption("a trace for an expert buffer must have decode tokens; this one has "
                            "prompts alone")
    return Outcome(name="none" if predictor is None else predictor.name, counts=buffer.counts,
                   guessed=guessed, right=right, cycles=cycles, saved=saved, calls=calls)


def _calls(trace: RoutingTrace
           ) -> Iterator[tuple[np.ndarray, tuple[int, ...], np.ndarray | None, bool | None, int]]:
    """Yield for each call its uses, its experts as they come, the uses of the layer behind it,
    which may have none and is no call then, whether a request begins with it, None where not even
    a pass does, and its layer."""
    waiting: tuple[np.ndarray, tuple[int, ...], bool | None, int] | None = None
    requests: set[int] = set()
    for step in trace.steps("decode"):
        now = set(step.request.tolist())
        begins: bool | None = now != requests
        requests = now
        for layer, uses in enumerate(trace.counts(step.ids)):
            if waiting is not None:
                yield *waiting[:2], uses, *waiting[2:]
                waiting = None
            if not uses.any():
                continue
            waiting = uses, plan(step.ids[:, layer], trace.n_experts, 1).experts, begins, layer
            begins = None
    if waiting is not None:
        yield *waiting[:2], None, *waiting[2:]
