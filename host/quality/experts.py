"""Experts of any kind in a transformers model: whatever is called with (x, ids, weights)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations import moe

from moeaccel.activations import hidden
from moeaccel.host.compress.layer import FloatExpert
from moeaccel.host.errors import InvalidOption, UnsupportedExperts
from moeaccel.host.plugins.transformers.modules import Weights, look
from moeaccel.host.quality.activations import block_floats
from moeaccel.image import Expert

__all__ = ["NAME", "FastExperts", "Observed", "experts_modules", "float_experts", "observe",
           "use_layers"]

NAME = "moeaccel-study"
"""The ``experts_implementation`` whose experts are those of :func:`use_layers`."""

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of x, (T, H), ids and weights, (T, K); returns (T, H)."""

_layers: weakref.WeakKeyDictionary[torch.nn.Module, Call] = weakref.WeakKeyDictionary()


def _forward(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
             top_k_weights: torch.Tensor, **_: Any) -> torch.Tensor:
    """Run a layer's experts: what is registered with transformers."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids = top_k_index.reshape(len(x), -1)
    return _layers[module](x, ids, top_k_weights.reshape(ids.shape)).reshape(hidden_states.shape)


moe.ExpertsInterface.register(NAME, _forward)


def experts_modules(model: torch.nn.Module) -> list[tuple[torch.nn.Module, Weights]]:
    """Return the experts modules of a model, and what they hold.

    Raises
    ------
    UnsupportedExperts
        If there are none, or one does something that the device does not do.
    """
    found = []
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):  # goes through the experts interface
            weights, reason = look(module)
            if weights is None:
                raise UnsupportedExperts(str(reason))
            if weights.gate_up_bias is not None or weights.down_bias is not None:
                raise UnsupportedExperts(f"{type(module).__name__} must have no biases to be "
                                         "studied or compressed; the device itself takes them")
            found.append((module, weights))
    if not found:
        raise UnsupportedExperts(f"{type(model).__name__} must have experts behind transformers' "
                                 "experts interface, but has none")
    return found


@contextmanager
def use_layers(model: Any, layers: Sequence[Call]) -> Iterator[None]:
    """Let the experts of a model be these, one for each of :func:`experts_modules`."""
    modules = [module for module, _ in experts_modules(model)]
    if len(layers) != len(modules):
        raise InvalidOption(f"layers must be as many as the model has, {len(modules)}, not "
                            f"{len(layers)}")
    before = model.config._experts_implementation
    _layers.update(zip(modules, layers, strict=True))
    model.set_experts_implementation(NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        for module in modules:
            del _layers[module]


def float_experts(weights: Weights) -> list[FloatExpert]:
    """Return the experts that a module holds."""
    gate_up, down = weights.stacks
    return [FloatExpert(np.ascontiguousarray(gate_up[e].numpy()),
                        np.ascontiguousarray(down[e].numpy()), weights.activation, weights.limit)
            for e in range(len(down))]


class FastExperts:
    """A layer of experts in torch.

    Parameters
    ----------
    experts : sequence of :class:`FloatExpert` or :class:`moeaccel.image.Expert`
        In float, or quantised: then with the values that the device's integers and scales stand
        for.
    planes : :class:`int`
        1 (``a8``), 2 (``a16``), or 0: x and h stay float.
    """

    def __init__(self, experts: Sequence[FloatExpert | Expert], planes: int) -> None:
        self._planes = planes
        self._experts = [self._values(expert) for expert in experts]

    @staticmethod
    def _values(expert: FloatExpert | Expert) -> tuple[torch.Tensor, torch.Tensor, str,
                                                       float | None]:
        # Integers times significands have less than 24 bits: float32 is exact.
        gate_up, down = (expert.floats() if isinstance(expert, Expert)
                         else (expert.gate_up, expert.down))
        return (torch.from_numpy(gate_up), torch.from_numpy(down), expert.activation,
                expert.limit)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the experts' outputs; ids that there are not are skipped."""
        inputs = self._operand(x.float())
        y = torch.zeros(len(x), len(self._experts[0][1]))
        for e, (gate_up, down, activation, limit) in enumerate(self._experts):
            tokens, slots = torch.nonzero(ids == e, as_tuple=True)
            if not len(tokens):
                continue
            rows = (inputs if len(tokens) == len(x) else inputs[tokens]) @ gate_up.T
            with np.errstate(over="ignore"):  # exp of a far negative gate: 1 / infinity is 0
                h = torch.from_numpy(hidden(rows.numpy(), down.shape[1], activation, limit))
            out = self._operand(h.float()) @ down.T
            y.index_add_(0, tokens, out * weights[tokens, slots, None].float())
        return y.to(x.dtype)

    def _operand(self, values: torch.Tensor) -> torch.Tensor:
        return block_floats(values, self._planes) if self._planes else values


@dataclass(frozen=True)
class Observed:
    """What a layer was asked.

    Parameters
    ----------
    x : float32 array, (T, H)
    ids : int64 array, (T, K)
    weights : float32 array, (T, K)
    """

    x: NDArray[np.float32]
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]


def observe(layers: Sequence[Call]) -> tuple[list[Call], dict[int, Observed]]:
    """Return layers that write down what they are asked, and where: the last call of each, by its
    place among them."""
    seen: dict[int, Observed] = {}

    def one(index: int, layer: Call) -> Call:
        def call(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            seen[index] = Observed(x.float().numpy().copy(), ids.numpy().astype(np.int64),
                                   weights.float().numpy().copy())
            return layer(x, ids, weights)
        return call

    return [one(index, layer) for index, layer in enumerate(layers)], seen
