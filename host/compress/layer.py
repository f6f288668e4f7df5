"""A layer that compression passes change: experts in float, the format of each, and its router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import hidden
from moeaccel.host.errors import InvalidOption, InvalidTensor
from moeaccel.image import Expert
from moeaccel.router.settings import RouterSettings

__all__ = ["Factors", "FloatExpert", "MoELayer", "Routing", "combine"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Factors:
    """An expert's matrices as products of rank r: ``gate_up @ into`` and ``out @ inside``.

    Parameters
    ----------
    into : float32 array, (r, H)
    gate_up : float32 array, (2 I, r) or (I, r)
    inside : float32 array, (r, I)
    out : float32 array, (H, r)
    """

    into: NDArray[np.float32]
    gate_up: NDArray[np.float32]
    inside: NDArray[np.float32]
    out: NDArray[np.float32]


@dataclass(frozen=True)
class FloatExpert:
    """An expert's weights in float.

    Parameters
    ----------
    gate_up : float32 array, (2 I, H), gate rows, then up rows; or (I, H), not gated
    down : float32 array, (H, I)
    activation : :class:`str`
    limit : :class:`float`, optional
    factors : :class:`Factors`, optional
        Of which the matrices are the products: what the device stores then
        (:mod:`moeaccel.host.compress.low_rank`).
    """

    gate_up: NDArray[np.float32]
    down: NDArray[np.float32]
    activation: str = "silu"
    limit: float | None = None
    factors: Factors | None = None

    @classmethod
    def of(cls, expert: Expert) -> FloatExpert:
        """Return what a quantised expert holds."""
        return cls(*expert.floats(), expert.activation, expert.limit)

    def changed(self, gate_up: NDArray[np.float32], down: NDArray[np.float32]) -> FloatExpert:
        """Return it with other weights, which are no products any more."""
        return replace(self, gate_up=gate_up, down=down, factors=None)

    @property
    def gated(self) -> bool:
        """Whether there are up rows."""
        return len(self.gate_up) != self.down.shape[1]

    @property
    def size(self) -> int:
        """Weights."""
        return self.gate_up.size + self.down.size

    def __call__(self, x: NDArray[np.floating]) -> Floats:
        """Return the outputs, (T, H)."""
        return self.hidden(x) @ self.down.T.astype(np.float64)

    def hidden(self, x: NDArray[np.floating]) -> Floats:
        """Return h, (T, I)."""
        with np.errstate(over="ignore"):
            return hidden(x.astype(np.float64) @ self.gate_up.T.astype(np.float64),
                          self.down.shape[1], self.activation, self.limit)


@dataclass(frozen=True)
class Routing:
    """Where tokens went.

    Parameters
    ----------
    rows : int64 array, (T, K)
        Rows of the router; -1: none.
    ids : int64 array, (T, K)
        Experts; -1: none.
    weights : float64 array, (T, K)
        0 where there is no expert.
    probabilities : float64 array, (T, R)
        Of all rows of the router, those that are masked at 0.
    """

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    weights: Floats
    probabilities: Floats

    @property
    def used(self) -> float:
        """Experts a token, on average."""
        return float((self.ids >= 0).sum(axis=1).mean())


@dataclass(frozen=True)
class MoELayer:
    """A router and its experts.

    Parameters
    ----------
    experts : sequence of :class:`FloatExpert`
        They may differ in width.
    router : float32 array, (R, H)
        Logits are ``x router^T``.
    top_k : :class:`int`
        Of a softmax over all rows that are not masked.
    renormalise : :class:`bool`
        Divide the chosen weights by their sum.
    weight_formats : sequence of :class:`str`
        One for each expert; what the device stores it in.
    expert_of : int64 array, (R,)
        Expert that each row of the router leads to. Several may lead to one: their weights add up.
        -1: none, the row is masked, as a bias of minus infinity does it before the choice.
    threshold : :class:`float`
        Experts are skipped whose weight is below ``threshold`` times that of the first. The rest is
        renormalised, if weights are.
    """

    experts: tuple[FloatExpert, ...]
    router: NDArray[np.float32]
    top_k: int
    renormalise: bool
    weight_formats: tuple[str, ...]
    expert_of: NDArray[np.int64]
    threshold: float = 0.0

    def __post_init__(self) -> None:
        count = len(self.experts)
        if (not count or len(self.weight_formats) != count
                or self.expert_of.shape != self.router.shape[:1]
                or not set(self.expert_of.tolist()) <= {-1, *range(count)}
                or not (self.expert_of >= 0).any()):
            raise InvalidTensor(
                f"layer must have a format for each of its {count} experts, and for each of "
                f"{self.router.shape[0]} rows of the router one of them or -1, not "
                f"{self.weight_formats} and {self.expert_of.tolist()}")

    @classmethod
    def of(cls, experts: Sequence[FloatExpert], router: NDArray[np.floating], top_k: int, *,
           renormalise: bool = True, weight_format: str = "int4_g32") -> MoELayer:
        """Return a layer whose router has a row for each expert."""
        return cls(tuple(experts), np.asarray(router, np.float32), top_k, renormalise,
                   (weight_format,) * len(experts), np.arange(len(experts), dtype=np.int64))

    def kept(self, experts: Sequence[int] | NDArray[np.integer]) -> MoELayer:
        """Return the layer with some of its experts, and rows of the router that lead to others
        masked."""
        chosen = [int(e) for e in experts]
        place = {e: i for i, e in enumerate(chosen)}
        return replace(
            self, experts=tuple(self.experts[e] for e in chosen),
            weight_formats=tuple(self.weight_formats[e] for e in chosen),
            expert_of=np.array([place.get(e, -1) for e in self.expert_of.tolist()], np.int64))

    def merged(self, groups: Sequence[Sequence[int]],
               experts: Sequence[FloatExpert]) -> MoELayer:
        """Return the layer with one expert in the place of each group."""
        group_of = {e: i for i, group in enumerate(groups) for e in group}
        return replace(
            self, experts=tuple(experts),
            weight_formats=tuple(self.weight_formats[group[0]] for group in groups),
            expert_of=np.array([group_of.get(e, -1) for e in self.expert_of.tolist()], np.int64))

    def route(self, x: NDArray[np.floating]) -> Routing:
        """Return where tokens, (T, H), go; ties to the lowest row."""
        return self.route_logits(x.astype(np.float64) @ self.router.T.astype(np.float64))

    def route_logits(self, logits: Floats) -> Routing:
        """Return where tokens go whose router gave these logits, (T, R)."""
        logits = np.where(self.expert_of >= 0, logits, -np.inf)
        top_k = min(self.top_k, int((self.expert_of >= 0).sum()))
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        rows = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        weights = np.take_along_axis(probabilities, rows, axis=1)
        skipped = weights < self.threshold * weights[:, :1]
        rows, weights = np.where(skipped, -1, rows), np.where(skipped, 0, weights)
        if self.renormalise:
            weights = weights / weights.sum(axis=1, keepdims=True)
        ids = np.where(rows >= 0, self.expert_of[rows], -1)
        for slot in range(1, top_k):  # one expert by two rows of the router
            for before in range(slot):
                same = (ids[:, slot] == ids[:, before]) & (ids[:, slot] >= 0)
                weights[:, before] += np.where(same, weights[:, slot], 0)
                weights[same, slot], ids[same, slot] = 0, -1
        return Routing(rows, ids, weights, probabilities)

    def router_of_device(self) -> tuple[NDArray[np.float32], RouterSettings]:
        """Return rows, (E, H), and settings of a router that does what this one does.

        Raises
        ------
        InvalidOption
            If several rows lead to one expert, which is merged: the host has to route then.
        """
        rows = np.flatnonzero(self.expert_of >= 0)
        rows = rows[np.argsort(self.expert_of[rows], kind="stable")]
        if not np.array_equal(self.expert_of[rows], np.arange(len(self.experts))):
            raise InvalidOption("experts must have a row of the router each for the device to "
                                "route, but some are merged; route() on the host")
        return self.router[rows], RouterSettings(
            experts=len(rows), top_k=min(self.top_k, len(rows)), score="softmax",
            renormalize="sum" if self.renormalise else "none",
            threshold=self.threshold or None)

    def outputs(self, x: NDArray[np.floating]) -> Floats:
        """Return what each expert makes of each token, (E, T, H)."""
        return np.stack([expert(x) for expert in self.experts])

    def __call__(self, x: NDArray[np.floating]) -> Floats:
        """Return y, (T, H), in float64."""
        routing = self.route(x)
        y = np.zeros((len(x), len(self.experts[0].down)))
        for e in np.unique(routing.ids[routing.ids >= 0]).tolist():
            weight = (routing.weights * (routing.ids == e)).sum(axis=1)
            tokens = np.flatnonzero((routing.ids == e).any(axis=1))
            y[tokens] += weight[tokens, None] * self.experts[e](x[tokens])
        return y

    def quantised(self, chosen: Sequence[int] | None = None) -> list[Expert]:
        """Return the experts, or some of them, as the device stores them: what ``load_quantised``
        takes; of those that are products, the products."""
        numbers = range(len(self.experts)) if chosen is None else chosen
        return [Expert.quantise(expert.gate_up, expert.down, self.weight_formats[e],
                                activation=expert.activation, limit=expert.limit)
                for e, expert in ((e, self.experts[e]) for e in numbers)]


def combine(routing: Routing, outputs: Floats) -> Floats:
    """Return y, (T, H), of outputs that are there already, (E, T, H)."""
    y = np.zeros(outputs.shape[1:])
    tokens = np.arange(outputs.shape[1])
    for slot in range(routing.ids.shape[1]):
        y += routing.weights[:, slot, None] * outputs[routing.ids[:, slot], tokens]
    return y
