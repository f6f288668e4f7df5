"""What routers decided, token by token."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from moeaccel.host.traces.errors import ForeignTrace, InvalidTrace, TornTrace
from moeaccel.host.traces.files import read_tensors, take, write_tensors
from moeaccel.host.traces.popularity import PopularityProfile

__all__ = ["Phase", "RoutingTrace", "Step"]

KIND, VERSION = "moeaccel.routing_trace", "1"

Phase = Literal["all", "prefill", "decode"]
"""Which tokens: those of prompts, computed several at a time, or those computed one by one."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The tokens of one forward pass.

    Parameters
    ----------
    index : :class:`int`
        Number of the pass.
    ids : integer, (tokens, layers, top_k)
    weights : float, (tokens, layers, top_k), optional
    request, position : int32, (tokens,)
    """

    index: int
    ids: np.ndarray
    weights: np.ndarray | None
    request: np.ndarray
    position: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """The routed experts of every token and layer.

    Tokens stand in the order in which they were computed. Arrays are kept in the narrowest type of
    the file format and cannot be written to.

    Parameters
    ----------
    ids : integer, (tokens, layers, top_k)
        Expert of each slot, -1 where it is not used; none twice in one layer of a token.
    weights : float, (tokens, layers, top_k), optional
        What the outputs were multiplied with; float16, else float32.
    request, position : integer, (tokens,)
        Which request a token belongs to, and where in it; positions of a request ascend.
    step : integer, (tokens,)
        Number of the forward pass that computed the token; does not descend.
    n_experts : :class:`int`
    layers : :class:`tuple` of :class:`int`
        Number of each layer in the model, ascending.
    model, source : :class:`str`
        Which model; where the trace comes from.

    Raises
    ------
    InvalidTrace
        If an array has a wrong shape, type or value.
    """

    ids: np.ndarray
    weights: np.ndarray | None = None
    request: np.ndarray
    position: np.ndarray
    step: np.ndarray
    n_experts: int
    layers: tuple[int, ...]
    model: str = "unknown"
    source: str = "unknown"

    def __post_init__(self) -> None:
        ids = np.asarray(self.ids)
        if ids.ndim != 3 or not ids.size or ids.dtype.kind not in "iu":
            raise InvalidTrace("ids must be integers (tokens, layers, top_k) with a token, not "
                               f"{ids.dtype.name} {ids.shape}")
        if not 1 <= self.n_experts < 1 << 31:
            raise InvalidTrace(f"n_experts must be at least 1, not {self.n_experts!r}")
        if ids.min() < -1 or ids.max() >= self.n_experts:
            raise InvalidTrace(f"ids must be -1 (unused) to {self.n_experts - 1}, not {ids.min()} "
                               f"to {ids.max()}")
        ids = _frozen(ids, np.int16 if self.n_experts <= 1 << 15 else np.int32)
        ordered = np.sort(ids, axis=2)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if twice.any():
            token, layer, _ = np.argwhere(twice)[0]
            raise InvalidTrace("an expert must come once in a layer of a token, but token "
                               f"{token} has {ids[token, layer].tolist()} in row {layer}")
        set_field = object.__setattr__
        set_field(self, "ids", ids)
        set_field(self, "weights", self._checked_weights())
        layers = tuple(int(layer) for layer in self.layers)
        if len(layers) != ids.shape[1] or list(layers) != sorted(set(layers)):
            raise InvalidTrace(f"layers must be {ids.shape[1]} ascending numbers, not {layers}")
        set_field(self, "layers", layers)
        for name in ("request", "position", "step"):
            values = np.asarray(getattr(self, name))
            if values.shape != ids.shape[:1] or values.dtype.kind not in "iu":
                raise InvalidTrace(f"{name} must be integers ({len(ids)},), not "
                                   f"{values.dtype.name} {values.shape}")
            if values.min() < 0 or values.max() >= 1 << 31:
                raise InvalidTrace(f"{name} must be 0 to 2^31 - 1, not {values.min()} to "
                                   f"{values.max()}")
            set_field(self, name, _frozen(values, np.int32))
        if (np.diff(self.step) < 0).any():
            raise InvalidTrace("tokens must be in the order of their steps, but step "
                               f"descends at token {int(np.argmax(np.diff(self.step) < 0)) + 1}")
        order = np.argsort(self.request, kind="stable")
        falls = ((np.diff(self.request[order]) == 0) & (np.diff(self.position[order]) <= 0))
        if falls.any():
            token = int(order[np.argmax(falls) + 1])
            raise InvalidTrace("positions of a request must ascend, but token "
                               f"{token} is again position {int(self.position[token])} of request "
                               f"{int(self.request[token])}")

    def _checked_weights(self) -> np.ndarray | None:
        if self.weights is None:
            return None
        weights = np.asarray(self.weights)
        if weights.shape != self.ids.shape or weights.dtype.kind != "f":
            raise InvalidTrace(f"weights must be floats {self.ids.shape}, as ids are, not "
                               f"{weights.dtype.name} {weights.shape}")
        weights = _frozen(weights, np.float16 if weights.dtype == np.float16 else np.float32)
        if not np.isfinite(weights).all():
            raise InvalidTrace("weights must be finite, but token "
                               f"{int(np.argwhere(~np.isfinite(weights))[0][0])} has others")
        return weights

    @classmethod
    def of_requests(cls, routes: Sequence[tuple[np.ndarray, np.ndarray | None]], *,
                    prompts: Sequence[int] | None = None, n_experts: int,
                    layers: Sequence[int] | None = None, model: str = "unknown",
                    source: str = "unknown") -> RoutingTrace:
        """Return the trace of requests that were computed one after the other.

        Parameters
        ----------
        routes : sequence of (ids, weights)
            Of each request, (tokens, layers, top_k); weights of all or of none.
        prompts : sequence of :class:`int`, optional
            How many first tokens of each request went in one step; 1 when left out.
        n_experts, model, source
            See :class:`RoutingTrace`.
        layers : sequence of :class:`int`, optional
            Counted from 0 when left out.

        Raises
        ------
        InvalidTrace
            If there is no request, or the requests do not go together.
        """
        shapes = {ids.shape[1:] for ids, _ in routes if ids.ndim == 3}
        if len(shapes) != 1 or any(ids.ndim != 3 for ids, _ in routes):
            raise InvalidTrace("requests must have routes (tokens, layers, top_k) with the same "
                               f"layers and top_k, not {[ids.shape for ids, _ in routes][:5]}")
        found = [weights for _, weights in routes if weights is not None]
        if len(found) not in (0, len(routes)):
            raise InvalidTrace(f"all requests or none must have weights, not {len(found)} of "
                               f"{len(routes)}")
        lengths = [len(ids) for ids, _ in routes]
        position = np.concatenate([np.arange(length) for length in lengths])
        prompt = np.repeat(np.maximum(prompts if prompts is not None else 1, 1)
                           * np.ones(len(routes), np.int64), lengths)
        return cls(ids=np.concatenate([ids for ids, _ in routes]),
                   weights=np.concatenate(found) if found else None,
                   request=np.repeat(np.arange(len(routes)), lengths), position=position,
                   step=np.cumsum((position == 0) | (position >= prompt)) - 1,
                   n_experts=n_experts, model=model, source=source,
                   layers=tuple(layers if layers is not None else range(shapes.pop()[0])))

    # -- size --------------------------------------------------------------------------------------
    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids)

    @property
    def n_layers(self) -> int:
        """Layers with routed experts."""
        return self.ids.shape[1]

    @property
    def top_k(self) -> int:
        """Slots of a token in a layer."""
        return self.ids.shape[2]

    @cached_property
    def requests(self) -> np.ndarray:
        """Numbers of the requests, ascending."""
        return np.unique(self.request)

    @cached_property
    def is_prefill(self) -> np.ndarray:
        """Bool (tokens,): first of a request, or not alone in its request's step."""
        key = self.request.astype(np.int64) << 32 | self.step
        _, back, count = np.unique(key, return_inverse=True, return_counts=True)
        return (count[back] > 1) | (self.position == 0)

    def __eq__(self, other: object) -> bool:
        """Whether everything is equal, types included."""
        if not isinstance(other, RoutingTrace):
            return NotImplemented
        return (_same(self.ids, other.ids) and _same(self.weights, other.weights)
                and all(_same(getattr(self, name), getattr(other, name))
                        for name in ("request", "position", "step"))
                and (self.n_experts, self.layers, self.model, self.source)
                == (other.n_experts, other.layers, other.model, other.source))

    __hash__ = None  # type: ignore[assignment]

    # -- parts -------------------------------------------------------------------------------------
    def select(self, *, requests: Iterable[int] | None = None, layers: Iterable[int] | None = None,
               steps: range | None = None) -> RoutingTrace:
        """Return a part; numbers of requests, layers and steps stay as they are.

        Parameters
        ----------
        requests, layers : iterable of :class:`int`, optional
            Numbers of requests, numbers of layers in the model; all when left out.
        steps : :class:`range`, optional

        Raises
        ------
        InvalidTrace
            If a number is not in the trace, or nothing is left.
        """
        keep = np.ones(len(self), bool)
        if requests is not None:
            wanted = np.array(list(requests), np.int64)
            if unknown := sorted(set(wanted.tolist()) - set(self.requests.tolist())):
                raise InvalidTrace(f"requests must be in the trace, but {unknown[:5]} are not; it "
                                   f"has {len(self.requests)}, {self.requests[0]} to "
                                   f"{self.requests[-1]}")
            keep &= np.isin(self.request, wanted)
        if steps is not None:
            keep &= np.isin(self.step, np.array(steps, np.int64))
        columns = list(range(self.n_layers))
        if layers is not None:
            chosen = sorted(set(layers))
            if unknown := [layer for layer in chosen if layer not in self.layers]:
                raise InvalidTrace(f"layers must be in the trace, but {unknown[:5]} are not; it "
                                   f"has {list(self.layers)}")
            columns = [self.layers.index(layer) for layer in chosen]
        if not keep.any() or not columns:
            raise InvalidTrace("a part of a trace must have a token and a layer, but nothing is "
                               f"left of {len(self)} tokens")
        return replace(
            self, ids=self.ids[keep][:, columns],
            weights=None if self.weights is None else self.weights[keep][:, columns],
            request=self.request[keep], position=self.position[keep],
            step=self.step[keep], layers=tuple(self.layers[i] for i in columns))

    def sequences(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each request's number and ids, (tokens, layers, top_k), in order of position."""
        order = np.argsort(self.request, kind="stable")
        starts = np.searchsorted(self.request[order], self.requests)
        for number, rows in zip(self.requests, np.split(order, starts[1:]), strict=True):
            yield int(number), self.ids[rows]

    def segments(self, tokens: int) -> np.ndarray:
        """Return whole pieces of requests, (pieces, tokens, layers, top_k); rests are left out.

        Raises
        ------
        InvalidTrace
            If no request has as many tokens.
        """
        pieces = [ids[start : start + tokens] for _, ids in self.sequences()
                  for start in range(0, len(ids) - tokens + 1, tokens)]
        if not pieces:
            longest = max(len(ids) for _, ids in self.sequences())
            raise InvalidTrace(f"a request must have {tokens} tokens, but the longest has "
                               f"{longest}")
        return np.stack(pieces)

    # -- in the order of computing -----------------------------------------------------------------
    def steps(self, phase: Phase = "all") -> Iterator[Step]:
        """Yield the forward passes, with their prompt tokens, their decode tokens, or both.

        Passes without such tokens are left out.
        """
        rows = self._rows(phase)
        number = self.step[rows]
        for part in np.split(rows, np.flatnonzero(np.diff(number)) + 1) if len(rows) else []:
            yield Step(index=int(self.step[part[0]]), ids=self.ids[part],
                       weights=None if self.weights is None else self.weights[part],
                       request=self.request[part], position=self.position[part])

    def uses(self, phase: Phase = "all") -> Iterator[np.ndarray]:
        """Yield for each forward pass how many tokens each expert has, int64 (layers, experts)."""
        for step in self.steps(phase):
            yield self.counts(step.ids)

    def _rows(self, phase: Phase) -> np.ndarray:
        match phase:
            case "all":
                return np.arange(len(self))
            case "prefill":
                return np.flatnonzero(self.is_prefill)
            case "decode":
                return np.flatnonzero(~self.is_prefill)
            case _:
                raise InvalidTrace(f'phase must be "all", "prefill" or "decode", not {phase!r}')

    def counts(self, ids: np.ndarray) -> np.ndarray:
        """Return how many tokens each expert has, int64 (layers, experts), of some tokens' ids."""
        flat = ids + np.arange(self.n_layers)[:, None] * self.n_experts
        size = self.n_layers * self.n_experts
        return np.bincount(flat[ids >= 0], minlength=size).reshape(self.n_layers, -1)

    def popularity(self) -> PopularityProfile:
        """Return how often each expert was used."""
        return PopularityProfile(counts=self.counts(self.ids), layers=self.layers,
                                 model=self.model, source=self.source)

    def rebatch(self, batch: int, *, prompt: int = 0) -> RoutingTrace:
        """Return the same tokens as continuous batching would compute them.

        Parameters
        ----------
        batch : :class:`int`
            Requests at a time; when one ends, the next takes its place in the next step.
        prompt : :class:`int`
            First tokens of a request that go in one step together; the others follow one by one.

        Raises
        ------
        InvalidTrace
            If a number is out of range.
        """
        if batch < 1 or prompt < 0:
            raise InvalidTrace(f"batch must be at least 1 and prompt at least 0, not {batch} and "
                               f"{prompt}")
        free = [0] * batch
        step = np.empty(len(self), np.int64)
        for number in self.requests:
            rows = np.flatnonzero(self.request == number)
            offset = np.maximum(np.arange(len(rows)) - max(prompt, 1) + 1, 0)
            first = heapq.heappop(free)
            step[rows] = first + offset
            heapq.heappush(free, first + int(offset[-1]) + 1)
        order = np.lexsort((self.position, self.request, step))
        return replace(self, ids=self.ids[order], request=self.request[order],
                       weights=None if self.weights is None else self.weights[order],
                       position=self.position[order], step=step[order])

    def expect(self, *, n_layers: int, n_experts: int, top_k: int) -> None:
        """Make sure that the trace is of a model of this shape.

        Raises
        ------
        ForeignTrace
            If it is of another.
        """
        found = (self.n_layers, self.n_experts, self.top_k)
        if found != (n_layers, n_experts, top_k):
            raise ForeignTrace(
                f"the trace must be of a model with {n_layers} layers of {n_experts} experts, "
                f"top-{top_k}, but {self.model} has {found[0]} of {found[1]}, top-{found[2]}; "
                "record or generate one of this model")

    # -- files -------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as a safetensors file; the format is on the package's page.

        Raises
        ------
        TornTrace
            If the file cannot be written.
        """
        tensors = {"ids": self.ids, "request": self.request, "position": self.position,
                   "step": self.step}
        if self.weights is not None:
            tensors["weights"] = self.weights
        write_tensors(path, tensors, {
            "format": KIND, "version": VERSION, "model": self.model, "source": self.source,
            "experts": str(self.n_experts), "top_k": str(self.top_k),
            "layers": json.dumps(self.layers)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTrace:
        """Read what :meth:`save` wrote.

        Raises
        ------
        TornTrace
            If the file cannot be read, is cut off or damaged, or does not hold what it says.
        ForeignTrace
            If it is something else.
        """
        metadata, tensors = read_tensors(path, kind=KIND, version=VERSION)
        try:
            layers = tuple(int(layer) for layer in json.loads(metadata["layers"]))
            n_experts, top_k = int(metadata["experts"]), int(metadata["top_k"])
            model, source = metadata["model"], metadata["source"]
        except (KeyError, TypeError, ValueError) as error:
            raise TornTrace(f"{path} must have model, source, experts, top_k and layers in its "
                            f"header, but: {error!r}") from error
        ids = take(path, tensors, "ids", shape=(None, len(layers), top_k), kinds="int16 int32")
        weights = None
        if "weights" in tensors:
            weights = take(path, tensors, "weights", shape=ids.shape, kinds="float16 float32")
        request, position, step = (take(path, tensors, name, shape=(len(ids),), kinds="int32")
                                   for name in ("request", "position", "step"))
        try:
            return cls(ids=ids, weights=weights, request=request, position=position, step=step,
                       n_experts=n_experts, layers=layers, model=model, source=source)
        except InvalidTrace as error:
            raise TornTrace(f"{path} must hold a trace, but: {error}") from error


def _frozen(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Return a copy, or the array itself where it is already frozen and of the type."""
    if array.dtype != dtype or array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, dtype, order="C")
        array.flags.writeable = False
    return array


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and np.array_equal(a, b)
