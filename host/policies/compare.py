"""All systems on one trace, beside the bounds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeaccel.host.policies.costs import LayerCosts
from moeaccel.host.policies.placement import Placement, Work, chains
from moeaccel.host.policies.placement.measured import MeasuredScan
from moeaccel.host.policies.placement.monde import ALPHAS, MoNDE
from moeaccel.host.policies.placement.scan import best_split
from moeaccel.host.policies.replay import Outcome, replay
from moeaccel.host.policies.residency import DecayedLFU, Pinned
from moeaccel.host.policies.systems import SYSTEMS, Part, System
from moeaccel.host.traces import RoutingTrace

__all__ = ["Comparison", "against_monde", "bare_work", "call_seconds", "compare", "device_alone",
           "recent_works", "tuned"]

_SAMPLE = 256
"""Calls that MoNDE's alpha is tuned on, and that are looked at for :func:`device_alone` and
:func:`against_monde`."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One system beside the bound of hits.

    Parameters
    ----------
    outcome : :class:`Outcome`
    to_belady : :class:`float`
        Belady's hit rate with as much memory, less the system's.
    replay_seconds : :class:`float`
        Of processor time that the replay itself took, here.
    """

    outcome: Outcome
    to_belady: float
    replay_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        found = self.outcome
        system = found.system
        return {
            "policy": system.name, "title": system.title, "lossless": system.lossless,
            "hit_rate": found.hit_rate, "to_belady": self.to_belady,
            "link_bytes_per_token": found.link_bytes_per_token,
            "wasted_bytes_per_token": found.wasted * found.image_bytes / found.tokens,
            "seconds_per_token": found.seconds_per_token,
            "moe_seconds_per_token": found.moe_seconds_per_token, "to_optimum": found.to_optimum,
            "waits_seconds_per_token": float(found.waits.sum() / found.tokens),
            "routing_weight": found.mass, "resident_experts": found.slots,
            "replay_seconds": self.replay_seconds,
            "layers": {"hits": found.hits.tolist(), "uses": found.uses.tolist(),
                       "moved": found.moved.tolist(),
                       "seconds": found.layer_seconds.tolist(), "waits": found.waits.tolist()}}


def compare(trace: RoutingTrace, costs: LayerCosts, *, gpu_bytes: int,
            systems: Sequence[System] | None = None, profile: np.ndarray | None = None,
            seed: int = 0, progress: Callable[[str], None] | None = None) -> list[Comparison]:
    """Send a trace through systems, quickest first in the answer.

    Parameters
    ----------
    trace : :class:`RoutingTrace`
    costs : :class:`LayerCosts`
    gpu_bytes : :class:`int`
        Memory of the torch device for experts, decoded.
    systems : sequence of :class:`System`, optional
        All when left out.
    profile, seed
        See :func:`~moeaccel.host.policies.replay.replay`.
    progress : callable, optional
        Gets the name of each system before it runs.

    Raises
    ------
    BudgetTooSmall, ForeignTrace, PolicyFailed
        See :func:`~moeaccel.host.policies.replay.replay`.
    """
    options: dict[str, Any] = {"gpu_bytes": gpu_bytes, "profile": profile, "seed": seed}
    bound, bound_took = _timed(SYSTEMS["belady"], trace, costs, options)
    found = []
    for system in systems if systems is not None else SYSTEMS.values():
        if progress is not None:
            progress(system.name)
        outcome, took = (bound, bound_took) if system.name == "belady" else _timed(
            tuned(system, trace, costs), trace, costs, options)
        found.append(Comparison(outcome=outcome, to_belady=bound.hit_rate - outcome.hit_rate,
                                replay_seconds=took))
    return sorted(found, key=lambda row: row.outcome.seconds)


def _timed(system: System, trace: RoutingTrace, costs: LayerCosts, options: dict[str, Any]
           ) -> tuple[Outcome, float]:
    """Return what a replay found, and its processor time."""
    begin = time.process_time()
    found = replay(system, trace, costs, **options)
    return found, time.process_time() - begin


def tuned(system: System, trace: RoutingTrace, costs: LayerCosts) -> System:
    """Return a system with what its authors tune: MoNDE's alpha, on some calls of the trace."""
    if system.placement.name != MoNDE.name or "alpha" in system.placement.options:
        return system
    best = MoNDE.best(costs, _works(trace), alphas=ALPHAS)
    return dataclasses.replace(system, placement=Part(MoNDE.name, {"alpha": best.alpha}))


def device_alone(trace: RoutingTrace, costs: LayerCosts) -> dict[int, float]:
    """Return, by the tokens of a call, the share of the trace's calls for which all on the device
    is already the best split, without residents; of a sample."""
    found: dict[int, list[bool]] = {}
    for work in _works(trace):
        found.setdefault(work.tokens, []).append(best_split(costs, work) == (0, 0))
    return {tokens: float(np.mean(alone)) for tokens, alone in sorted(found.items())}


def against_monde(trace: RoutingTrace, costs: LayerCosts, slots: int) -> dict[str, float]:
    """Return how much longer MoNDE's split takes than ours, the geometric mean over calls: with
    its best alpha for them, with alpha 1, and with alpha 1 rounded up.

    MoNDE has no residents; ours are the ``slots`` experts of each layer that were used most of
    late.
    """
    calls = recent_works(trace, slots, _SAMPLE)
    bare = [bare_work(work) for work in calls]
    ours = MeasuredScan(costs)
    splits = {"best alpha": MoNDE.best(costs, bare), "alpha 1": MoNDE(costs),
              "rounded up": MoNDE(costs, ceil=True)}
    mine = call_seconds(costs, ours, calls)
    return {name: float(np.exp(np.mean(np.log(call_seconds(costs, split, bare) / mine))))
            for name, split in splits.items()}


def call_seconds(costs: LayerCosts, policy: Placement, calls: Sequence[Work]) -> np.ndarray:
    """Return what calls take under a placement, which hears what each took."""
    found = []
    for work in calls:
        plan = policy.place(work)
        taken = chains(costs, work, plan)
        policy.measured(work, plan, taken)
        found.append(taken.total)
    return np.array(found)


def recent_works(trace: RoutingTrace, slots: int, count: int) -> list[Work]:
    """Return some ``count`` calls behind the first step, of it where there is no other, and what is
    resident before each: the experts that were used most of late."""
    recent = DecayedLFU(n_layers=trace.n_layers, n_experts=trace.n_experts, slots=trace.n_experts)
    found: list[Work] = []
    steps = list(trace.steps())
    for index, step in enumerate(steps):
        resident = Pinned(popularity=recent.score, slots=slots).resident
        for layer, uses in enumerate(trace.counts(step.ids)):
            if index or len(steps) == 1:
                found.append(Work.of(uses, resident[layer], len(step.ids)))
            recent.use(layer, uses)
    return found[:: max(1, len(found) // count)]


def bare_work(work: Work) -> Work:
    """Return a call's work with nothing resident."""
    experts, tokens = (np.concatenate(pair) for pair in (
        (work.resident_experts, work.other_experts), (work.resident_tokens, work.other_tokens)))
    order = np.argsort(-tokens, kind="stable")
    none = np.zeros(0, int)
    return Work(none, none, experts[order], tokens[order], work.tokens)


def _works(trace: RoutingTrace) -> list[Work]:
    """Return some calls of a trace, nothing resident."""
    empty = np.zeros(trace.n_experts, bool)
    steps = list(trace.steps())
    return [Work.of(uses, empty, len(step.ids))
            for step in steps[:: max(1, len(steps) * trace.n_layers // _SAMPLE)]
            for uses in trace.counts(step.ids)]
