"""Recording the routes of a transformers model while it runs."""

from __future__ import annotations

import contextlib
import inspect
import re
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.traces.errors import InvalidTrace
from moeaccel.host.traces.trace import RoutingTrace

__all__ = ["Recording", "record"]


class Recording:
    """The routes seen so far; :func:`record` makes one."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._name = getattr(getattr(model, "config", None), "name_or_path", "") or (
            type(model).__name__)
        # Modules that transformers' experts interface dispatches; their forward gets x, ids,
        # weights, whatever implementation computes them and whatever the router's rule is.
        self.modules: dict[str, Any] = {
            path: module for path, module in model.named_modules()
            if hasattr(module, "_is_expert_parallel")}
        if not self.modules:
            raise UnsupportedExperts(
                f"{type(model).__name__} must send its experts through transformers' experts "
                "interface, but no module does; its routes cannot be seen from outside")
        sizes = {int(module.num_experts) for module in self.modules.values()}
        if len(sizes) != 1:
            raise UnsupportedExperts(
                f"{type(model).__name__} must have as many experts in every layer, not "
                f"{sorted(sizes)}")
        self._n_experts = sizes.pop()
        numbers = [int(found[-1]) if (found := re.findall(r"\.(\d+)(?=\.|$)", path)) else -1
                   for path in self.modules]
        self._layers = numbers if numbers == sorted(set(numbers)) and min(numbers) >= 0 else list(
            range(len(numbers)))
        self._signature = inspect.signature(model.forward)
        self._requests: weakref.WeakKeyDictionary[Any, np.ndarray] = weakref.WeakKeyDictionary()
        self._n_requests = 0
        self._routes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tokens: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._cache: Any = None
        self._rows = np.arange(0)
        self._parts: list[tuple[np.ndarray, ...]] = []

    def trace(self) -> RoutingTrace:
        """Return what was recorded.

        Raises
        ------
        InvalidTrace
            If no forward pass was seen.
        """
        if not self._parts:
            raise InvalidTrace("a recording must have a forward pass, but the model did not run "
                               "inside `with record(model)`")
        ids, weights, request, position = (np.concatenate(part)
                                           for part in zip(*self._parts, strict=True))
        step = np.repeat(np.arange(len(self._parts)), [len(part[0]) for part in self._parts])
        return RoutingTrace(ids=ids, weights=weights, request=request, position=position, step=step,
                            n_experts=self._n_experts, layers=tuple(self._layers),
                            model=self._name, source="recorded from transformers")

    # -- hooks -------------------------------------------------------------------------------------
    def _begin(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out which tokens of which requests a pass is about to compute."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        text = given.get("input_ids")
        text = given.get("inputs_embeds") if text is None else text
        if text is None:
            raise InvalidTrace("a recorded pass must have input_ids or inputs_embeds")
        rows, columns = text.shape[:2]
        self._cache = given.get("past_key_values")
        past = int(self._cache.get_seq_length()) if self._cache is not None else 0
        request = self._requests.get(self._cache) if past else None
        if request is None or len(request) != rows:
            request = np.arange(self._n_requests, self._n_requests + rows)
            self._n_requests += rows
        mask, position = given.get("attention_mask"), given.get("position_ids")
        real = np.ones((rows, columns), bool)
        where = np.broadcast_to(np.arange(past, past + columns), real.shape)
        if isinstance(mask, torch.Tensor) and mask.shape == (rows, past + columns):
            seen = mask.cpu().numpy() != 0
            real, where = seen[:, -columns:], np.cumsum(seen, axis=1)[:, -columns:] - 1
        elif isinstance(position, torch.Tensor) and position.shape[-1] == columns and (
                position.ndim == 2):
            where = np.broadcast_to(position.cpu().numpy(), real.shape)
        self._routes.clear()
        self._rows = request
        self._tokens = np.repeat(request, columns), where.ravel(), real.ravel()
        if self._cache is not None:
            self._requests[self._cache] = request

    def _route(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what one layer's experts were called with."""
        if self._tokens is None:
            return
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = dict(zip(names, args, strict=False)) | kwargs
        ids, weights = given["top_k_index"], given["top_k_weights"]
        if path in self._routes or ids.numel() != len(self._tokens[0]) * ids.shape[-1]:
            raise InvalidTrace(
                f"{path} must be called once a pass, with its {len(self._tokens[0])} tokens, not "
                f"{'again' if path in self._routes else ''} with {tuple(ids.shape)}")
        self._routes[path] = ids.detach(), weights.detach()

    def _end(self, _: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Put the layers of a pass together."""
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return
        missing = [path for path in self.modules if path not in self._routes]
        if missing:
            raise InvalidTrace(f"every layer must be called in a recorded pass, but {missing[0]} "
                               "was not")
        request, position, real = tokens
        width = max(ids.shape[-1] for ids, _ in self._routes.values())
        all_ids = np.full((len(real), len(self.modules), width), -1, np.int64)
        all_weights = np.zeros(all_ids.shape, np.float32)
        for layer, path in enumerate(self.modules):
            ids, weights = self._routes[path]
            top_k = ids.shape[-1]
            all_ids[:, layer, :top_k] = ids.reshape(-1, top_k).cpu().numpy()
            all_weights[:, layer, :top_k] = weights.reshape(-1, top_k).float().cpu().numpy()
        # Ids outside are slots that another rank computes.
        outside = (all_ids < 0) | (all_ids >= self._n_experts)
        all_ids[outside], all_weights[outside] = -1, 0
        self._parts.append((all_ids[real], all_weights[real], request[real], position[real]))
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._cache is None:
            self._requests[cache] = self._rows
        self._routes.clear()


@contextlib.contextmanager
def record(model: torch.nn.Module) -> Iterator[Recording]:
    """Record the routes of every forward pass of a model inside the block.

    Every row of a batch is a request: a new one when there is no cache or an empty one, else the
    one that the cache was made for. Padding, by a two-dimensional attention mask, is left out.
    Rows that a search over beams exchanges are not followed. The experts may run anywhere,
    ``experts_implementation="moeaccel"`` included.

    Parameters
    ----------
    model : :class:`torch.nn.Module`
        A model of transformers whose experts go through its experts interface.

    Yields
    ------
    :class:`Recording`
        Its :meth:`~Recording.trace` may be taken at any time.

    Raises
    ------
    UnsupportedExperts
        If no module of the model goes through the interface.
    """
    recording = Recording(model)
    hooks = [model.register_forward_pre_hook(recording._begin, with_kwargs=True),
             model.register_forward_hook(recording._end)]
    for path, module in recording.modules.items():
        hooks.append(module.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: recording._route(path, args, kwargs),
            with_kwargs=True))
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()
