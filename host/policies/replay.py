"""A system of policies, sent through a trace.

Layer by layer: the route is known; guesses that it does not hold are cancelled; what is resident,
or was guessed and has arrived, is a hit; placement says who computes what; the layer takes what
:func:`~moeaccel.host.policies.placement.chains` says; residency takes experts in, and those that
did not come with the call anyway are promoted, in the background; while the layer and what lies
between two layers take their time, the link moves guesses and then promotions, in 1/16 of an image,
behind the call's own moves and y. An expert that is on its way is no hit. Background moves keep the
cards' memory busy, and the next call pays for it.

Guesses go to a buffer of 2 top_k experts, taken from the budget, and stay there until their layer
has been computed. The policy's own time to decide is not in the figures.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeaccel.host.policies.costs import LayerCosts
from moeaccel.host.policies.errors import BudgetTooSmall, PolicyFailed
from moeaccel.host.policies.link import CHUNKS, Background, Move
from moeaccel.host.policies.placement import Plan, Work, chains, placement
from moeaccel.host.policies.placement.base import ALL
from moeaccel.host.policies.placement.measured import MeasuredScan
from moeaccel.host.policies.placement.scan import best_split
from moeaccel.host.policies.prefetch import Ahead, Prefetch, prefetch
from moeaccel.host.policies.rerouting import Rerouting
from moeaccel.host.policies.residency import (
    Belady,
    Pinned,
    Promoted,
    Residency,
    SecondMiss,
    residency,
)
from moeaccel.host.policies.routing import routing
from moeaccel.host.policies.systems import System
from moeaccel.host.traces import RoutingTrace, Step

__all__ = ["Outcome", "replay", "slots_of"]

_FEW = 16  # experts
_SAMPLED = 7  # one call in so many is compared with the optimum


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a replay found.

    Parameters
    ----------
    system : :class:`System`
    tokens, steps, decode_steps : :class:`int`
        Decode steps are those without tokens of a prompt.
    hits, uses, moved : integer and float, (n_layers,)
        Experts that were used and on the torch device; that were used; images that a call waited
        for. An expert counts once a call.
    background, wasted : :class:`float`
        Images that were moved behind calls; those of them that no call used.
    layer_seconds, waits : float, (n_layers,)
        Of calls; of those, waiting for a move.
    decode_seconds : :class:`float`
        Of the calls of decode steps.
    seconds : :class:`float`
        With what lies between the layers.
    to_optimum : :class:`float`
        How much longer calls take than with the best split of the same residents, as a share; of
        every 7th call.
    mass : :class:`float`
        Share of the routers' weight that was computed, 1 where routes are what they were.
    slots : :class:`int`
        Resident experts, over all layers, buffers included.
    image_bytes : :class:`int`
    """

    system: System
    tokens: int
    steps: int
    decode_steps: int
    hits: np.ndarray
    uses: np.ndarray
    moved: np.ndarray
    background: float
    wasted: float
    layer_seconds: np.ndarray
    waits: np.ndarray
    decode_seconds: float
    seconds: float
    to_optimum: float
    mass: float
    slots: int
    image_bytes: int

    @property
    def hit_rate(self) -> float:
        """Hits over uses; 0 without uses."""
        return float(self.hits.sum() / max(1, self.uses.sum()))

    @property
    def link_bytes_per_token(self) -> float:
        """Images over the link, in calls and behind them."""
        return float((self.moved.sum() + self.background) * self.image_bytes / self.tokens)

    @property
    def seconds_per_token(self) -> float:
        """All seconds over all tokens."""
        return self.seconds / self.tokens

    @property
    def moe_seconds_per_token(self) -> float:
        """Seconds of the layers' calls over all tokens."""
        return float(self.layer_seconds.sum() / self.tokens)


def slots_of(gpu_bytes: int, costs: LayerCosts, n_layers: int, *, buffers: int = 0,
             given: int | str = "") -> list[int]:
    """Return how many experts of each layer a budget holds, evenly.

    Parameters
    ----------
    gpu_bytes : :class:`int`
        Memory of the torch device for experts; 0 for none.
    costs : :class:`LayerCosts`
    n_layers : :class:`int`
    buffers : :class:`int`
        Experts that are taken off.
    given : :class:`str`, optional
        `gpu_bytes` as they were written, for the message.

    Raises
    ------
    BudgetTooSmall
        If it is neither 0 nor enough for one expert.
    """
    if gpu_bytes < 0 or 0 < gpu_bytes < costs.resident_bytes:
        written = repr(given) if isinstance(given, str) and given else f"{gpu_bytes:,}"
        raise BudgetTooSmall(f"gpu_bytes must be 0 or at least {costs.resident_bytes:,}, one "
                             f"expert, not {written}")
    experts = max(0, min(gpu_bytes // costs.resident_bytes, n_layers * costs.n_experts) - buffers)
    each, more = divmod(experts, n_layers)
    return [each + (layer < more) for layer in range(n_layers)]


def replay(system: System, trace: RoutingTrace, costs: LayerCosts, *, gpu_bytes: int,
           truth: LayerCosts | None = None, profile: np.ndarray | None = None,
           seed: int = 0) -> Outcome:
    """Send a trace through a system.

    Parameters
    ----------
    system : :class:`System`
    trace : :class:`RoutingTrace`
    costs : :class:`LayerCosts`
        As the policies believe them.
    gpu_bytes : :class:`int`
        Memory of the torch device for experts, decoded.
    truth : :class:`LayerCosts`, optional
        What things take; as believed when left out.
    profile : (n_layers, n_experts), optional
        Popularity for policies that pin experts or begin with them; those that pin take the trace's
        own when it is left out, which no one knows beforehand.
    seed : :class:`int`
        Of stand-ins for predictors and logits.

    Raises
    ------
    BudgetTooSmall
        If the budget does not hold one expert.
    ForeignTrace
        If the trace is of another model than the costs.
    PolicyFailed
        If a policy raises, or gives what cannot be done.
    """
    trace.expect(n_layers=trace.n_layers, n_experts=costs.n_experts, top_k=trace.top_k)
    run = _Run(system, trace, costs, gpu_bytes, truth or costs, profile, seed)
    is_prompt = np.zeros(int(trace.step[-1]) + 1, bool)
    is_prompt[trace.step[trace.is_prefill]] = True
    for step in trace.steps():
        run.step(step, prompt=bool(is_prompt[step.index]))
    return run.outcome()


@dataclass
class _Totals:
    hits: list[float]  # of each layer: quicker than arrays, one number at a time
    uses: list[float]
    moved: list[float]
    layer_seconds: list[float]
    waits: list[float]
    steps: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    seconds: float = 0.0
    sampled: float = 0.0
    optimum: float = 0.0


class _Run:
    """The state of a replay."""

    def __init__(self, system: System, trace: RoutingTrace, costs: LayerCosts, gpu_bytes: int,
                 truth: LayerCosts, profile: np.ndarray | None, seed: int) -> None:
        self.system, self.trace, self.truth = system, trace, truth
        self.random = np.random.default_rng(seed)
        layers, experts = trace.n_layers, trace.n_experts
        size: dict[str, Any] = {"n_layers": layers, "n_experts": experts}
        buffers = 2 * trace.top_k if system.prefetch is not None else 0
        self.slots = slots_of(gpu_bytes, costs, layers, buffers=buffers)
        self.total_slots = sum(self.slots) + buffers
        self.place = placement(system.placement.name)(costs, **system.placement.options)
        self.keep = self._residency(size, costs, profile)
        self.free_moves = isinstance(self.keep, Belady)
        self.guesser: Prefetch | None = None
        if system.prefetch is not None:
            self.guesser = prefetch(system.prefetch.name)(
                **size, top_k=trace.top_k, seed=seed, **system.prefetch.options)
        self.routing: Rerouting | None = None
        if system.routing is not None:
            self.routing = Rerouting(
                routing(system.routing.name)(n_layers=layers, **system.routing.options), experts,
                self.random)
        self.link = Background()
        self.buffers = buffers
        self.staged = np.zeros((layers, experts), bool)
        self.pending = np.zeros((layers, experts), bool)  # promotions on their way
        self.n_pending = [0] * layers
        self.early = np.zeros((layers, experts), bool)  # guesses on their way, or staged
        self.n_staged = 0
        self.contending = self.last_seconds = 0.0
        self.calls = 0
        self.credit = np.zeros(layers)
        self.totals = _Totals([0.0] * layers, [0.0] * layers, [0.0] * layers, [0.0] * layers,
                              [0.0] * layers)

    def _residency(self, size: dict[str, Any], costs: LayerCosts,
                   profile: np.ndarray | None) -> Residency | None:
        part = self.system.residency
        if part is None or (not any(self.slots) and part.name != "everything"):
            return None
        kind = residency(part.name)
        if issubclass(kind, Belady):
            return kind(future=self.trace.uses(), slots=self.slots)
        if issubclass(kind, Pinned):
            counts = self.trace.popularity().counts if profile is None else profile
            return kind(popularity=counts, slots=self.slots)
        options = kind.fitting(costs) | part.options
        if profile is not None and issubclass(kind, Promoted):
            options["popularity"] = profile
        if self.system.second_miss is not None:
            options["admission"] = SecondMiss(**size, **self.system.second_miss)
        return kind(**size, slots=self.slots, **options)

    # -- a forward pass ----------------------------------------------------------------------------
    def step(self, step: Step, *, prompt: bool) -> None:
        """Send one forward pass through all layers; `prompt`: whether it has tokens of a prompt."""
        tokens, layers = len(step.ids), self.trace.n_layers
        uses = self.trace.counts(step.ids)
        new = bool((step.position == 0).any())
        if self.keep is not None and new:
            self.keep.begin_request()
        if self.guesser is not None:
            self.guesser.begin_pass(new_request=new)
            self.ahead = Ahead(uses.__getitem__, experts=_busiest(uses).__getitem__)
        if self.routing is not None:
            self.routing.begin_pass(step)
        self._earn()
        between = self.truth.between(tokens)
        seconds = 0.0
        for layer in range(layers):
            try:
                seconds += self._layer(layer, step, uses, tokens, between) + between
            except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError,
                    ValueError) as error:
                raise PolicyFailed(
                    f"policies of {self.system.name} must plan layer {self.trace.layers[layer]} of "
                    f"step {step.index}, but raised {type(error).__name__}: {error}; use another "
                    "policy, or report the trace") from error
        if self.routing is not None:
            self.routing.end_pass()
        totals = self.totals
        totals.steps += 1
        if not prompt:
            totals.decode_steps += 1
            totals.decode_seconds += seconds - layers * between
        self.last_seconds = seconds
        totals.seconds += seconds
        if isinstance(self.place, MeasuredScan) and self.place.wants_move and not len(self.link):
            self.link.promotions.append(Move(0, -1, guess=False))

    def _earn(self) -> None:
        """Give each layer its part of what may be promoted in a step."""
        per_step = self.system.per_step
        if per_step is None:
            per_step = self.last_seconds / self.truth.move if self.system.near_data else 0
        if not self.place.useful:
            per_step = 0
        waiting = len(self.link.promotions)
        each = max(0.0, per_step - waiting) / self.trace.n_layers
        np.minimum(self.credit + each, max(1.0, each), out=self.credit)

    def _layer(self, layer: int, step: Step, of_pass: np.ndarray, tokens: int,
               between: float) -> float:
        totals, truth, place = self.totals, self.truth, self.place
        routed = uses = of_pass[layer]
        resident = None
        if self.keep is not None:
            resident = self.keep.resident[layer]
            if self.n_pending[layer]:
                resident = resident & ~self.pending[layer]
        weights = later = None
        if self.routing is not None:
            uses, later, weights = self.routing.route(layer, resident, uses)
        available = resident if resident is not None else self.staged[layer]
        partial: list[Move] = []
        if self.guesser is not None:
            if self.link.guesses:
                partial = self.link.take(layer, lambda expert: uses[expert] > 0)
            self.early[layer] = False
            if self.n_staged:
                available = available | self.staged[layer]
        work = Work.of(uses, available, tokens)
        plan = place.place(work)
        share = self._share(work, partial, weights)
        found = chains(truth, work, plan, weights=share, contending=self.contending,
                       behind=truth.move / CHUNKS if len(self.link) else 0.0)
        place.measured(work, plan, found)
        self.calls += 1
        if self.calls % _SAMPLED == 0:
            r, k = best_split(truth, work)
            best = chains(truth, work, Plan(slice(r), slice(k)), weights=share)
            totals.sampled += found.total
            totals.optimum += best.total
        totals.hits[layer] += len(work.resident_experts)
        totals.uses[layer] += len(work)
        moved = found.moves / truth.move
        totals.moved[layer] += moved
        totals.layer_seconds[layer] += found.total
        if found.n_moved:
            totals.waits[layer] += max(0.0, found.total - found.device)
        backlog = self._deferred(later, tokens, found.total + between)
        if self.guesser is not None:
            self._guess(layer, routed)
        if self.keep is not None:
            before = self.routing is not None and self.routing.policy.within_residents
            self._admit(layer, step, routed if before else uses, work, plan, of_work=not before)
        if self.n_staged:
            gone = np.count_nonzero(self.staged[layer])
            if gone:
                self.staged[layer] = False
                self.n_staged -= gone
        self.contending = backlog
        if len(self.link):
            idle = found.total + between - found.moves - truth.up * tokens
            before = self.link.moved
            for move in self.link.advance(max(0.0, idle) / truth.move, self._wanted):
                self._arrive(move)
            carried = self.link.moved - before
            if carried:
                self.contending += carried * truth.contend
                place.measured_move(carried, carried * truth.move)
        return found.total

    # -- parts of a layer --------------------------------------------------------------------------
    @staticmethod
    def _share(work: Work, partial: list[Move], weights: np.ndarray | None) -> np.ndarray | None:
        if weights is None and not partial:
            return None
        share = np.ones(len(work.other_experts)) if weights is None else weights[work.other_experts]
        if partial:
            others = work.other_experts.tolist()
            for move in partial:
                if move.expert in others:
                    share[others.index(move.expert)] = move.left
        return share

    def _deferred(self, later: np.ndarray | None, tokens: int, seconds: float) -> float:
        """Return what the device still has to do when the next layer begins."""
        if later is None:
            return 0.0
        costs = self.truth
        device_of, _ = costs.tables(tokens)
        work = (costs.device_call + costs.row * min(tokens, int(later.sum()))
                + float(device_of[later[later > 0]].sum()))
        return max(0.0, self.contending + work - seconds)

    def _guess(self, layer: int, uses: np.ndarray) -> None:
        assert self.guesser is not None
        guesses = self.link.guesses
        coming = self.guesser.guess(layer, uses, self.ahead)
        room = self.buffers - len(guesses) - self.n_staged
        if room <= 0:
            return
        for at, experts in coming:
            early = self.early[at]
            here = early if self.keep is None else early | self.keep.resident[at]
            if len(experts) <= _FEW:  # quicker than arrays
                flags = here.data
                new = [expert for expert in experts.tolist() if not flags[expert]][:room]
            else:
                new = experts[~here[experts]][:room].tolist()
            if not new:
                continue
            early[new] = True
            guesses += [Move(at, expert, True) for expert in new]
            room -= len(new)
            if room <= 0:
                return

    def _admit(self, layer: int, step: Step, uses: np.ndarray, work: Work, plan: Plan, *,
               of_work: bool) -> None:
        keep = self.keep
        assert keep is not None
        mass = None
        if keep.wants_mass and step.weights is not None:
            ids = step.ids[:, layer].ravel()
            mass = np.bincount(ids[ids >= 0], step.weights[:, layer].ravel()[ids >= 0],
                               minlength=len(uses))
        if self.free_moves:
            keep.use(layer, uses, mass=mass)
            return
        arrived = None
        if not (of_work and plan.moved is ALL):  # else all that was not there has arrived
            arrived = work.other_experts[plan.moved]
            if self.n_staged:
                arrived = np.concatenate((arrived, self.staged[layer].nonzero()[0]))
        room = None if keep.at_once else int(self.credit[layer])
        new = keep.use(layer, uses, mass=mass, arrived=arrived, room=room)
        for expert in new.tolist():
            if not self.pending[layer, expert]:
                self.pending[layer, expert] = True
                self.n_pending[layer] += 1
                self.link.promotions.append(Move(layer, expert, guess=False))
        self.credit[layer] -= len(new)

    def _wanted(self, move: Move) -> bool:
        if move.guess or move.expert < 0:
            return True
        assert self.keep is not None
        if self.keep.resident[move.layer, move.expert]:
            return True
        self._no_longer_pending(move)
        return False

    def _no_longer_pending(self, move: Move) -> None:
        self.pending[move.layer, move.expert] = False
        self.n_pending[move.layer] -= 1

    def _arrive(self, move: Move) -> None:
        if move.guess:
            self.staged[move.layer, move.expert] = True
            self.n_staged += 1
        elif move.expert >= 0:
            self._no_longer_pending(move)

    def outcome(self) -> Outcome:
        """Return what was found."""
        t, routes = self.totals, self.routing
        return Outcome(
            system=self.system, tokens=len(self.trace), steps=t.steps,
            decode_steps=t.decode_steps, decode_seconds=t.decode_seconds,
            hits=np.array(t.hits, np.int64), uses=np.array(t.uses, np.int64),
            moved=np.array(t.moved), background=self.link.moved, wasted=self.link.wasted,
            layer_seconds=np.array(t.layer_seconds), waits=np.array(t.waits), seconds=t.seconds,
            to_optimum=t.sampled / t.optimum - 1 if t.optimum else 0.0,
            mass=routes.kept / routes.mass if routes is not None and routes.mass else 1.0,
            slots=self.total_slots,
            image_bytes=self.truth.image_bytes)


def _busiest(uses: np.ndarray) -> list[np.ndarray]:
    """Return the experts of each layer that are used, those with the most tokens first."""
    layers, experts = uses.nonzero()
    experts = experts[np.lexsort((-uses[layers, experts], layers))]
    ends = np.searchsorted(layers, np.arange(len(uses) + 1)).tolist()
    return [experts[begin:end] for begin, end in itertools.pairwise(ends)]
