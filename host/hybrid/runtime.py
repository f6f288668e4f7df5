"""The call of a hybrid layer, and what all layers of a model share.

A call of a layer, in this order: the placement says which experts the torch device computes; the
others are submitted to the accelerator, with the tokens that have any; images that the plan moves
start to move; residents are computed, then what has moved; the accelerator's result is awaited, and
both are added. Behind it the residency policy says who stays, and what comes in.

Nothing is done before the plan is made, and a resident is one when its weights are there: after an
error, whatever it was, the next call finds everything as it was.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.host.errors import HostError, InvalidOption, UnsupportedExperts
from moeaccel.host.hybrid.counters import Counters, table
from moeaccel.host.hybrid.exact import Exact
from moeaccel.host.hybrid.grouped import Grouped
from moeaccel.host.hybrid.images import image_bytes, read_expert
from moeaccel.host.hybrid.lanes import Lane, lane_for
from moeaccel.host.hybrid.places import Places, bring_home
from moeaccel.host.layers import Experts
from moeaccel.host.policies.costs import LayerCosts, Machine, machine
from moeaccel.host.policies.errors import PolicyError, PolicyFailed, UnsupportedPolicy
from moeaccel.host.policies.placement import placement
from moeaccel.host.policies.placement.base import ALL, Chains, Placement, Plan, Work
from moeaccel.host.policies.replay import slots_of
from moeaccel.host.policies.residency import Residency, residency
from moeaccel.host.policies.residency.belady import Belady
from moeaccel.host.policies.residency.everything import Everything
from moeaccel.host.policies.residency.least_stale import LeastStale
from moeaccel.host.policies.residency.pinned import Pinned
from moeaccel.host.policies.systems import System, system
from moeaccel.host.sizes import size_of
from moeaccel.host.tensors import indices
from moeaccel.image import ExpertShape
from moeaccel.zoo import model

__all__ = ["Hybrid", "ResidentMath"]

ResidentMath = Literal["bf16", "exact"]
"""How the torch device computes: in bfloat16, or with the accelerator's integers."""

_MATH: dict[str, Callable[[Experts, torch.device], Any]] = {"bf16": Grouped, "exact": Exact}


class _Layer:
    """What one layer has on the torch device."""

    def __init__(self, index: int, experts: Experts, math: Any, slots: int) -> None:
        self.index = index
        self.of = weakref.ref(experts)
        self.math = math
        self.held = math.hold(slots)
        self.slot = np.full(experts.num_experts, -1, np.int32)
        self.free = list(range(slots))
        self.counters = Counters(index)


class Hybrid:
    """Runs the layers of one model on both sides.

    Parameters
    ----------
    policy : :class:`str` or :class:`System`
        One of :data:`moeaccel.host.policies.systems.SYSTEMS`; of it placement and residency, while
        what it prefetches is not moved early. It leaves routes as they are.
    gpu_bytes : :class:`int` or :class:`str`
        Memory of the torch device for experts, evenly over the layers, as :func:`size_of` reads it,
        a share being one of what all experts take there; 0: none. Where a policy has
        one pool for all layers, a layer has room for the most that it ever held.
    resident_math : ``"bf16"`` or ``"exact"``
        In bfloat16 y is close to the accelerator's; exact, it has its bits
        (:mod:`moeaccel.host.hybrid.exact`).
    on : :class:`Machine`, optional
        What policies believe; a GPU or the CPU, whichever x is on, and Alveo U55Cs when left out.
    single_copy : :class:`bool`
        Residents have no image in the accelerator's memory, whose room is free for others, and all
        of them are computed on the torch device: residency alone decides where an image lives. It
        moves whole, as it is, and comes back when an expert leaves
        (:mod:`moeaccel.host.hybrid.places`). Else the accelerator keeps every image.
    profile : (n_layers, n_experts), optional
        How popular experts are, for policies that pin them.
    lane : callable, optional
        Makes the stream of moves of a device.

    Raises
    ------
    UnknownPolicy
        If there is no such policy.
    UnsupportedPolicy
        If it changes routes, or knows what comes.
    InvalidOption
        For another value that is none of these.
    """

    def __init__(self, policy: str | System = "moeaccel", *, gpu_bytes: int | str = 0,
                 resident_math: ResidentMath = "bf16", on: Machine | None = None,
                 profile: NDArray[Any] | None = None, single_copy: bool = False,
                 lane: Callable[[torch.device], Lane] = lane_for) -> None:
        self.system = policy if isinstance(policy, System) else system(policy)
        part = self.system.residency
        knows = part is not None and issubclass(residency(part.name), Belady)
        if knows or not self.system.lossless:
            raise UnsupportedPolicy(
                f"policy must leave routes as they are, and not know what comes, but "
                f"{self.system.name} {'knows' if knows else 'changes them'}; "
                "moeaccel bench policies replays it")
        self.gpu_bytes = size_of("gpu_bytes", gpu_bytes)
        if resident_math not in get_args(ResidentMath):
            raise InvalidOption(f"resident_math must be one of {', '.join(_MATH)}, not "
                                f"{resident_math!r}")
        if not isinstance(single_copy, bool):
            raise InvalidOption(f"single_copy must be True or False, not {single_copy!r}")
        self.single_copy = single_copy
        self.resident_math = resident_math
        self._on, self._profile, self._lane_for = on, profile, lane
        self._lock = threading.RLock()
        self._layers: list[_Layer] = []
        self._by_experts: weakref.WeakKeyDictionary[Experts, _Layer] = weakref.WeakKeyDictionary()
        self._shape: tuple[int, ExpertShape] | None = None
        self._costs: LayerCosts | None = None
        self._place: Placement | None = None
        self._keep: Residency | None = None
        self._slots: list[int] = []
        self._lane: Lane | None = None

    # -- what is asked of it -----------------------------------------------------------------------
    @property
    def counters(self) -> list[Counters]:
        """What happened in each layer, in the order of their first calls."""
        return [dataclasses.replace(layer.counters) for layer in self._layers]

    def table(self) -> str:
        """Return the counters as a table."""
        return table(self.counters)

    def residents(self, experts: Experts) -> list[int]:
        """Return which experts of a layer are on the torch device."""
        layer = self._by_experts.get(experts)
        return [] if layer is None else np.nonzero(layer.slot >= 0)[0].tolist()

    def __call__(self, experts: Experts, x: torch.Tensor, ids: torch.Tensor,
                 weights: torch.Tensor, *, layers: int, shared: int = 0) -> torch.Tensor:
        """Return y of a layer, (T, d_model), like x.

        Parameters
        ----------
        experts : :class:`Experts`
            The layer, in the accelerator's memory.
        x, ids, weights : tensor
            As :meth:`Experts.submit` takes them.
        layers : :class:`int`
            How many layers the model has at most: what the memory is dealt to.
        shared : :class:`int`
            How many such experts the torch device computes for every token beside the call: work
            that a plan has to count with.

        Raises
        ------
        BudgetTooSmall
            If ``gpu_bytes`` is not 0 and less than one expert.
        PolicyFailed
            If a policy raises, or gives what cannot be done; another one can be set.
        PolicyError
            For a layer of another model.
        """
        with self._lock:
            layer = self._layer(experts, x, layers, shared)
            return self._run(layer, experts, x, ids, weights)

    # -- a call ------------------------------------------------------------------------------------
    def _run(self, layer: _Layer, experts: Experts, x: torch.Tensor, ids: torch.Tensor,
             weights: torch.Tensor) -> torch.Tensor:
        assert self._place is not None and self._lane is not None
        chosen = indices("ids", ids, experts.num_experts)
        uses = np.bincount(chosen[chosen >= 0], minlength=experts.num_experts)
        self._settle(layer, experts)
        self._fill(layer, experts)
        work, plan, on_torch, moved = self._plan(layer, uses, len(x))
        count = layer.counters
        theirs = np.where(on_torch[chosen] | (chosen < 0), -1, chosen)
        rows = np.nonzero((theirs >= 0).any(axis=1))[0]
        begin = time.perf_counter()
        handle = None
        if len(rows):
            handle = experts.submit(*self._sent(layer, x, theirs, weights, rows))
        move_s, arrived = 0.0, None
        if len(moved):
            start = time.perf_counter()
            arrived = self._lane.move(lambda: self._brought(layer, experts, moved))
            move_s = time.perf_counter() - start
        start = time.perf_counter()
        own = self._computed(layer, x, weights, chosen, on_torch, moved, arrived)
        torch_s = time.perf_counter() - start
        start = time.perf_counter()
        answer = None if handle is None else experts.sync(handle)
        end = time.perf_counter()
        y = layer.math.join(x, own, rows, answer)
        total = time.perf_counter() - begin
        count.calls += 1
        count.tokens += len(x)
        count.hits += len(work.resident_experts)
        count.misses += len(work.other_experts)
        count.on_torch += int((on_torch & (uses > 0)).sum())
        count.on_device += int((~on_torch & (uses > 0)).sum())
        count.rows += len(rows)
        count.moved += len(moved)
        count.move_s += move_s
        count.torch_s += torch_s
        count.wait_s += end - start
        found = Chains(device=end - begin if handle is not None else 0.0, torch=torch_s + move_s,
                       total=total, computing=torch_s, moves=move_s, n_moved=len(moved))
        self._stay(layer, experts, uses, work, plan, found, moved, arrived)
        return y

    def _plan(self, layer: _Layer, uses: NDArray[Any], tokens: int
              ) -> tuple[Work, Plan, NDArray[np.bool_], NDArray[np.int64]]:
        """Return the work, the plan, which experts the torch device computes, and which move."""
        assert self._place is not None
        resident = layer.slot >= 0
        try:
            work = Work.of(uses, resident, tokens)
            plan = self._place.place(work)
            moved = np.asarray(work.other_experts[plan.moved])
            on_torch = np.zeros(len(uses), bool)
            if self.single_copy:
                plan = Plan(ALL, plan.moved)
            on_torch[work.resident_experts[plan.resident]] = True
            on_torch[moved] = True
        except HostError:
            raise
        except Exception as error:
            raise self._failed(layer, "plan", error) from error
        return work, plan, on_torch, moved

    def _failed(self, layer: _Layer, what: str, error: Exception) -> PolicyFailed:
        return PolicyFailed(
            f"policies of {self.system.name} must {what} layer {layer.index}, but raised "
            f"{type(error).__name__}: {error}; nothing was lost, set another policy and go on")

    @staticmethod
    def _sent(layer: _Layer, x: torch.Tensor, theirs: NDArray[np.int32], weights: torch.Tensor,
              rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the accelerator gets: tokens that have an expert there."""
        if len(rows) == len(x):
            return layer.math.input(x), torch.from_numpy(theirs), weights
        at = torch.from_numpy(rows).to(x.device)
        return (layer.math.input(x.index_select(0, at)), torch.from_numpy(theirs[rows]),
                weights.index_select(0, at))

    def _computed(self, layer: _Layer, x: torch.Tensor, weights: torch.Tensor,
                  chosen: NDArray[np.int32], on_torch: NDArray[np.bool_],
                  moved: NDArray[np.int64], arrived: Any) -> Any:
        """Return the torch device's part: residents first, while others still move."""
        assert self._lane is not None
        own = None
        slots = np.where(on_torch, layer.slot, -1)
        mine = np.where(chosen >= 0, slots[chosen], -1)
        if (mine >= 0).any():
            own = layer.math.compute(x, mine, weights, layer.held)
        if len(moved):
            self._lane.ready()
            place = np.full(len(layer.slot), -1, np.int32)
            place[moved] = np.arange(len(moved))
            part = layer.math.compute(x, np.where(chosen >= 0, place[chosen], -1), weights,
                                      arrived)
            own = part if own is None else own + part
        return own

    # -- what is there -----------------------------------------------------------------------------
    def _settle(self, layer: _Layer, experts: Experts) -> None:
        """Where images have one copy: let residents be away from the accelerator, and no others."""
        if not self.single_copy:
            return
        places = Places.of(experts)
        places.settle(experts)
        for expert in np.nonzero(layer.slot >= 0)[0].tolist():
            places.take(experts, expert)
        for expert in places.away:
            if layer.slot[expert] < 0:
                places.give_back(experts, expert)

    def _brought(self, layer: _Layer, experts: Experts, which: NDArray[np.int64]) -> Any:
        """Return room with some experts in it."""
        held = layer.math.hold(len(which))
        for slot, expert in enumerate(which.tolist()):
            layer.math.put(held, slot, read_expert(experts, expert))
            layer.counters.bytes_moved += image_bytes(experts, expert)
        return held

    def _admit(self, layer: _Layer, experts: Experts, expert: int) -> None:
        """Put an expert into a free slot; it is there when that is done."""
        slot = layer.free[-1]
        layer.math.put(layer.held, slot, read_expert(experts, expert))
        layer.counters.bytes_moved += image_bytes(experts, expert)
        layer.counters.promoted += 1
        layer.slot[expert] = layer.free.pop()

    def _leave(self, layer: _Layer, expert: int) -> None:
        """Free the slot of a resident."""
        layer.free.append(int(layer.slot[expert]))
        layer.slot[expert] = -1

    def _fill(self, layer: _Layer, experts: Experts) -> None:
        """Make what is there what the residency policy says: leave first, then come in."""
        if self._keep is None:
            return
        wanted = self._keep.resident[layer.index]
        for expert in np.nonzero((layer.slot >= 0) & ~wanted)[0].tolist():
            self._leave(layer, expert)
        for expert in np.nonzero((layer.slot < 0) & wanted)[0].tolist():
            if not layer.free and isinstance(self._keep, LeastStale):
                self._grow(layer)
            if not layer.free:
                raise PolicyFailed(
                    f"policies of {self.system.name} must keep at most "
                    f"{self._slots[layer.index]} experts of layer {layer.index}, but keep "
                    f"{int(wanted.sum())}; set another policy")
            self._admit(layer, experts, expert)
        self._settle(layer, experts)
        layer.counters.residents = int((layer.slot >= 0).sum())

    @staticmethod
    def _grow(layer: _Layer) -> None:
        """Make room for one more, where a policy has one pool for all layers."""
        layer.held = layer.math.grown(layer.held)
        layer.free.append(len(layer.slot) - (layer.slot < 0).sum())

    def _stay(self, layer: _Layer, experts: Experts, uses: NDArray[Any], work: Work, plan: Plan,
              found: Chains, moved: NDArray[np.int64], arrived: Any) -> None:
        """Hear what the call took, and decide who stays and what comes in behind it."""
        assert self._place is not None
        keep, at = self._keep, layer.index
        before = None if keep is None else keep.resident[at].copy()
        try:
            self._place.measured(work, plan, found)
            if keep is not None:
                room = None if keep.at_once else self._room()
                keep.use(at, uses, arrived=moved, room=room)
        except HostError:
            raise
        except Exception as error:
            if keep is not None:
                keep.resident[at] = before
            raise self._failed(layer, "look back on", error) from error
        if keep is None:
            return
        wanted = keep.resident[at]
        for slot, expert in enumerate(moved.tolist()):
            if wanted[expert] and layer.slot[expert] < 0:
                self._keep_moved(layer, expert, slot, arrived, wanted)
        self._fill(layer, experts)

    def _keep_moved(self, layer: _Layer, expert: int, slot: int, arrived: Any,
                    wanted: NDArray[np.bool_]) -> None:
        """Let an expert that has moved for the call stay, without moving it again."""
        if not layer.free:
            gone = np.nonzero((layer.slot >= 0) & ~wanted)[0]
            if len(gone):
                self._leave(layer, int(gone[0]))
            elif isinstance(self._keep, LeastStale):
                self._grow(layer)
            else:
                return
        place = layer.free[-1]
        if isinstance(arrived, list):
            layer.held[place] = arrived[slot]
        else:
            for kept, came in zip(layer.held, arrived, strict=True):
                kept[place] = came[slot]
        layer.slot[expert] = layer.free.pop()

    def _room(self) -> int:
        """Return how many experts may come in behind one call of a layer."""
        if not self.system.near_data:
            return 0
        assert self._place is not None
        if not self._place.useful:
            return 0
        per_step = self.system.per_step
        return 1 if per_step is None else max(1, per_step // len(self._slots))

    # -- layers ------------------------------------------------------------------------------------
    def _layer(self, experts: Experts, x: torch.Tensor, layers: int, shared: int) -> _Layer:
        """Return what a layer has, making it at its first call."""
        found = self._by_experts.get(experts)
        if found is not None:
            return found
        if experts.shared_shapes:
            raise UnsupportedExperts(
                f"a hybrid layer must have no shared experts on the device, which every token "
                f"needs, but {len(experts.shared_shapes)}; leave them to the torch device")
        shape = experts.num_experts, experts.shapes[0]
        if self._shape is None:
            self._begin(experts, x.device, layers, shared)
        elif shape != self._shape:
            raise PolicyError(
                f"layers of a hybrid model must be alike, {self._shape[0]} experts of "
                f"{self._shape[1].d_model} by {self._shape[1].d_expert}, not {shape[0]} of "
                f"{shape[1].d_model} by {shape[1].d_expert}; call use_device() before another "
                "model runs")
        index = next((n for n, layer in enumerate(self._layers) if layer.of() is None),
                     len(self._layers))
        if index >= len(self._slots):
            raise PolicyError(
                f"a model must have at most {len(self._slots)} layers of experts, as its "
                "configuration says, but one more was called; call use_device() before another "
                "model runs")
        bring_home(experts)  # what another policy had away from the accelerator
        made = _Layer(index, experts, _MATH[self.resident_math](experts, x.device),
                      self._slots[index])
        if index == len(self._layers):
            self._layers.append(made)
        else:
            self._layers[index] = made
        self._by_experts[experts] = made
        return made

    def _begin(self, experts: Experts, device: torch.device, layers: int, shared: int) -> None:
        """Make the policies, at the first call."""
        shape = experts.shapes[0]
        believed = self._on or machine("cpu" if device.type == "cpu" else "h100")
        known = model("olmoe-1b-7b")  # of its kind; what counts is replaced
        this = dataclasses.replace(
            known, name="the model", layers=layers, moe_layers=layers, d_model=shape.d_model,
            n_experts=experts.num_experts, shared=None,
            expert=dataclasses.replace(known.expert, d_expert=shape.d_expert))
        name = shape.format.name
        costs = dataclasses.replace(believed.holding(this, name).layer(
            this, weight_format_name=name, activation_bits=8 * experts._planes), n_shared=shared)
        everything = layers * experts.num_experts * costs.resident_bytes
        slots = slots_of(self.gpu_bytes.of(everything), costs, layers, given=self.gpu_bytes.given)
        part = self.system.residency
        keep: Residency | None = None
        if part is not None:
            kind = residency(part.name)
            size: dict[str, Any] = {"n_layers": layers, "n_experts": experts.num_experts}
            if issubclass(kind, Everything):
                slots = [experts.num_experts] * layers
            options = kind.fitting(costs) | part.options
            if issubclass(kind, Pinned):
                popularity = (np.ones((layers, experts.num_experts))
                              if self._profile is None else self._profile)
                keep = kind(popularity=popularity, slots=slots)
            elif any(slots):
                keep = kind(**size, slots=slots, **options)
        self._place = placement(self.system.placement.name)(costs, **self.system.placement.options)
        self._keep, self._slots, self._costs = keep, slots, costs
        self._lane = self._lane_for(device)
        self._shape = experts.num_experts, shape
