"""Routes that were made elsewhere, in the place of those of a model's routers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.host.errors import InvalidOption
from moeaccel.host.plugins.transformers.modules import Weights
from moeaccel.host.plugins.transformers.watch import identity
from moeaccel.host.process import Lock
from moeaccel.host.traces import ForeignTrace, InvalidTrace, RoutingTrace

__all__ = ["Routes"]


def _array(name: str, given: Any, kinds: str) -> NDArray[Any]:
    found = given.detach().cpu() if isinstance(given, torch.Tensor) else given
    if isinstance(found, torch.Tensor) and found.dtype is torch.bfloat16:
        found = found.float()
    array = np.asarray(found)
    if array.ndim != 3 or array.dtype.kind not in kinds:
        raise InvalidTrace(
            f"{name} of routes must be {'integers' if kinds == 'iu' else 'floats'} (tokens, "
            f"layers, top_k), not {array.dtype.name} {array.shape}")
    return array


class Routes:
    """Routes for the forward passes of one model, taken in order.

    A pass takes as many tokens as it has. A trace of several requests says which tokens went
    together, and passes must be those; one request may be cut into passes in any way, and so may
    arrays. -1 is a slot that is not used: y of a token without any is 0, as padding's may be.

    Parameters
    ----------
    given : :class:`RoutingTrace`, path of one, or pair of arrays
        ids, integer, (tokens, layers, top_k), as engines return ``routed_experts``, and weights,
        float of that shape. Where there are none, in a trace or for None, the routers' own are
        taken, which they have for what they chose themselves.

    Raises
    ------
    InvalidOption
        If it is none of these.
    InvalidTrace
        For arrays of a wrong shape, type or value.
    TornTrace, ForeignTrace
        If the file is no trace.
    """

    def __init__(self, given: Any) -> None:
        if isinstance(given, str | os.PathLike):
            given = RoutingTrace.load(given)
        self._lock = Lock()
        self._experts: int | None = None
        self._passes: list[int] | None = None  # tokens of each, where they are fixed
        if isinstance(given, RoutingTrace):
            self._ids: NDArray[Any] = given.ids
            self._weights = given.weights
            self._experts = given.n_experts
            if len(given.requests) > 1:
                self._passes = np.unique(given.step, return_counts=True)[1].tolist()
        elif isinstance(given, tuple | list) and len(given) == 2:
            self._ids = _array("ids", given[0], "iu")
            self._weights = None if given[1] is None else _array("weights", given[1], "f")
            if self._weights is not None and self._weights.shape != self._ids.shape:
                raise InvalidTrace(f"weights of routes must have the shape of ids, "
                                   f"{self._ids.shape}, not {self._weights.shape}")
        else:
            raise InvalidOption("routes must be a RoutingTrace, the path of one, or a pair (ids, "
                                "weights), (ids, None) for the routers' own weights, not "
                                f"{type(given).__name__}")
        self._seen: list[object] = []  # which layer is which
        self._next = self._pass = self._first = self._tokens = 0

    @property
    def tokens(self) -> tuple[int, int]:
        """How many were taken by passes that ended, and how many there are."""
        return self._first, len(self._ids)

    def take(self, of: Weights, ids: torch.Tensor, routing: torch.Tensor
             ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids and weights of a layer's call; layers are called in their order.

        Parameters
        ----------
        of : :class:`Weights`
        ids, routing : tensor, (T, top_k)
            The router's own.

        Raises
        ------
        ForeignTrace
            If the routes are of another model, or of other passes.
        InvalidTrace
            If they are used up, or a weight is asked for that the router has not.
        """
        with self._lock.held:
            layer = self._at(of, *ids.shape)
            part = slice(self._first, self._first + len(ids))
            chosen = torch.from_numpy(self._ids[part, layer].astype(np.int64)).to(ids.device)
            if self._weights is None:
                weights = _own(chosen, ids, routing, layer, self._first)
            else:
                weights = torch.from_numpy(self._weights[part, layer].astype(np.float32))
            self._next += 1
            if self._next == self._ids.shape[1]:
                self._next, self._pass = 0, self._pass + 1
                self._first += self._tokens
            return chosen, weights.to(routing.device)

    def _at(self, of: Weights, tokens: int, top_k: int) -> int:
        """Return which layer is called, having made sure that it goes with the routes."""
        count, layers, slots = self._ids.shape
        experts, layer = of.dims.experts, self._next
        if (self._experts or experts) != experts or slots != top_k or layers > of.layers:
            raise ForeignTrace(
                f"routes must be of a model with {experts} experts, top-{top_k}, in at most "
                f"{of.layers} layers, but are of {self._experts or 'any'} experts, top-{slots}, in "
                f"{layers}; record or generate a trace of this model")
        if (most := int(self._ids[:, layer].max(initial=-1))) >= experts:
            raise ForeignTrace(f"routes must name experts below {experts}, but name {most} in "
                               f"layer {layer}; record or generate a trace of this model")
        which = of.loaded_by or identity(of.gate_up)
        if layer == len(self._seen) and which not in self._seen:
            self._seen.append(which)
        if self._seen[layer : layer + 1] != [which]:
            raise ForeignTrace(
                f"routes must be of all layers of the model, but of {layers} layers number {layer} "
                "was to come and another one came; take a trace of this model, and set routes "
                "again after a pass that was broken off, or when weights are other tensors")
        if layer == 0:
            self._begin(tokens, count)
        elif tokens != self._tokens:
            raise ForeignTrace(f"every layer of a pass must have its {self._tokens} tokens, but "
                               f"layer {layer} has {tokens}; run the model without parts of passes")
        return layer

    def _begin(self, tokens: int, count: int) -> None:
        passes = self._passes
        if self._first + tokens > count or (passes is not None and self._pass >= len(passes)):
            raise InvalidTrace(
                f"routes must have all tokens that are computed, but of {count} there are "
                f"{count - self._first} left for a pass of {tokens}; set routes again to begin "
                "from the first")
        if passes is not None and passes[self._pass] != tokens:
            raise ForeignTrace(
                f"pass {self._pass} must have the {passes[self._pass]} tokens of its step in the "
                f"trace, not {tokens}; padded batches have more: run their requests one by one, or "
                "give arrays with -1 for padding")
        self._tokens = tokens


def _own(chosen: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor, layer: int,
         first: int) -> torch.Tensor:
    """Return the weights that a router gave to experts that it chose, 0 where none is named."""
    same = (chosen[:, :, None] == ids[:, None, :]) & (chosen[:, :, None] >= 0)
    missing = (chosen >= 0) & ~same.any(dim=2)
    if missing.any():
        token, slot = missing.nonzero()[0].tolist()
        raise InvalidTrace(
            f"routes without weights must name what the router chooses, but token {first + token} "
            f"has expert {int(chosen[token, slot])} in layer {layer} where the router has "
            f"{ids[token].tolist()}; give weights with the ids")
    return torch.where(same, routing[:, None, :].float(), 0.0).sum(dim=2)
