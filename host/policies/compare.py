"""All systems on one trace, beside the bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeaccel.host.policies.costs import LayerCosts
from moeaccel.host.policies.placement import Work
from moeaccel.host.policies.placement.monde import ALPHAS, MoNDE
from moeaccel.host.policies.placement.scan import best_split
from moeaccel.host.policies.replay import Outcome, replay
from moeaccel.host.policies.systems import SYSTEMS, Part, System
from moeaccel.host.traces import RoutingTrace

__all__ = ["Comparison", "compare", "device_alone", "tuned"]

_SAMPLE = 256
"""Calls that MoNDE's alpha is tuned on, and that are looked at for :func:`device_alone`."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One system beside the bound of hits.

    Parameters
    ----------
    outcome : :class:`Outcome`
    to_belady : :class:`float`
        Belady's hit rate with as much memory, less the system's.
    """

    outcome: Outcome
    to_belady: float

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
    bound = replay(SYSTEMS["belady"], trace, costs, **options)
    found = []
    for system in systems if systems is not None else SYSTEMS.values():
        if progress is not None:
            progress(system.name)
        outcome = bound if system.name == "belady" else replay(
            tuned(system, trace, costs), trace, costs, **options)
        found.append(Comparison(
            outcome=outcome, to_belady=bound.hit_rate - outcome.hit_rate))
    return sorted(found, key=lambda row: row.outcome.seconds)


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


def _works(trace: RoutingTrace) -> list[Work]:
    """Return some calls of a trace, nothing resident."""
    empty = np.zeros(trace.n_experts, bool)
    steps = list(trace.steps())
    return [Work.of(uses, empty, len(step.ids))
            for step in steps[:: max(1, len(steps) * trace.n_layers // _SAMPLE)]
            for uses in trace.counts(step.ids)]
