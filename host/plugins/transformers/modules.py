"""What an experts module of transformers holds, and whether the device does what it does."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, overload

import torch

from moeaccel.activations import ACTIVATIONS
from moeaccel.host.importers.fp8 import dequantise
from moeaccel.host.plugins.transformers.choice import LayerDims
from moeaccel.host.plugins.transformers.gates import gate_of

__all__ = ["Weights", "forget_with", "look", "number_of"]

_LAYERS_IF_UNKNOWN = 64


def _layers_of(module: Any) -> int:
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    return count if isinstance(count, int) and count > 0 else _LAYERS_IF_UNKNOWN


def _shared_of(module: Any, d_expert: int) -> int:
    """Return how many experts of this width a layer's shared experts are, which run on the host."""
    config = getattr(module, "config", None)
    width = getattr(config, "shared_expert_intermediate_size", None)
    if not isinstance(width, int):
        counts = (getattr(config, name, None) for name in (
            "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"))
        count = next((count for count in counts if isinstance(count, int)), 0)
        each = getattr(config, "moe_intermediate_size", None)
        width = count * (each if isinstance(each, int) else d_expert)
    return -(-width // d_expert)


_numbers: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
_count = itertools.count(1)


@torch.compiler.assume_constant_result
def _loader(module: Any) -> int:
    """Return a number for a module whose parameters accelerate loads for each call, else 0."""
    hook = module._hf_hook
    hooks = getattr(hook, "hooks", (hook,))  # of a SequentialHook
    return number_of(module) if any(getattr(one, "offload", False) for one in hooks) else 0


def number_of(module: torch.nn.Module) -> int:
    """Return a number, from 1 on, by which operators know a module."""
    return _numbers.setdefault(module, next(_count))


def forget_with(number: int, entries: dict[int, Any]) -> None:
    """Let an entry go with the module that has a number."""
    for module, one in _numbers.items():
        if one == number:
            weakref.finalize(module, entries.pop, number, None)


class Weights(NamedTuple):
    """The parameters of an experts module, and how they lie in them.

    Parameters
    ----------
    gate_up : tensor, (E, 2 I, H)
        (E, H, 2 I) where ``transposed``; I instead of 2 I where not ``gated``.
    down : tensor, (E, H, I)
        (E, I, H) where ``transposed``.
    gate_up_scale, down_scale : tensor, optional
        Of FP8 weights.
    transposed : :class:`bool`
    interleaved : :class:`bool`
        Gate and up rows alternate.
    block : list of two :class:`int`, optional
        Rows and columns of the block of a scale.
    layers : :class:`int`
        How many such layers the model has, or more: what a device is chosen for.
    activation, gated, limit
        See :meth:`moeaccel.host.Device.load_experts`.
    gate_up_bias, down_bias : tensor, optional
        (E, 2 I), or (E, I) where not ``gated``, and (E, H).
    shared : :class:`int`
        How many such experts the layer's shared ones are, which are not among these.
    loaded_by : :class:`int`
        A number of the module where its parameters are other tensors at each call, since
        accelerate loads them for it (``device_map`` with offloading); else 0.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    transposed: bool
    interleaved: bool
    block: list[int] | None
    layers: int
    activation: str = "silu"
    gated: bool = True
    limit: float | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    shared: int = 0
    loaded_by: int = 0

    @classmethod
    def of(cls, module: Any, activation: str = "silu", limit: float | None = None) -> Self:
        """Return those of a module."""
        block = getattr(module, "block_size", None)
        gated = bool(getattr(module, "has_gate", True))
        transposed = bool(getattr(module, "is_transposed", False))
        first = "gate_up_proj" if gated else "up_proj"
        biases = [getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
                  for name in (first, "down_proj")]
        return cls(getattr(module, first), module.down_proj,
                   getattr(module, f"{first}_scale_inv", None),
                   getattr(module, "down_proj_scale_inv", None),
                   transposed, gated and not getattr(module, "is_concatenated", True),
                   None if block is None else list(block), _layers_of(module),
                   activation, gated, limit, biases[0], biases[1],
                   _shared_of(module, module.down_proj.shape[1 if transposed else 2]),
                   0 if getattr(module, "_hf_hook", None) is None else _loader(module))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that there are."""
        more = (self.gate_up_scale, self.down_scale, self.gate_up_bias, self.down_bias)
        return self.gate_up, self.down, *(t for t in more if t is not None)

    @property
    def dims(self) -> LayerDims:
        """Number of experts and dimensions, padded."""
        experts, *shape = self.down.shape
        d_expert, d_model = shape if self.transposed else reversed(shape)
        return LayerDims.padded(experts, d_model, d_expert, gated=self.gated,
                                activation=self.activation,
                                biased=self.gate_up_bias is not None)

    @property
    def stacks(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Gate and up, (E, 2 I, H) or (E, I, H), and down, (E, H, I), converted one expert at a
        time."""
        parts = 2 if self.gated and not self.interleaved else 1
        return (_Stack(self.gate_up, self.gate_up_scale, self.block, self.transposed,
                       self.interleaved, parts),
                _Stack(self.down, self.down_scale, self.block, self.transposed, False, 1))


    @property
    def biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Biases of gate and up, (E, 2 I) or (E, I), and of down, (E, H), where there are some."""
        first = self.gate_up_bias
        if first is not None and self.interleaved:
            first = torch.cat([first[:, 0::2], first[:, 1::2]], dim=1)
        return first, self.down_bias


class _Stack(Sequence[torch.Tensor]):
    """A view of one projection of all experts that converts one expert at a time.

    ``parts``: matrices of equal size that its rows are made of, gate and up.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None,
                 block: Sequence[int] | None, transposed: bool, interleaved: bool,
                 parts: int) -> None:
        self._weight = weight.detach()
        self._scale = scale
        self._block = block
        self._transposed = transposed
        self._interleaved = interleaved
        self._parts = parts

    def __len__(self) -> int:
        return self._weight.shape[0]

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        """Return one expert, float32 (rows, K): gate rows, then up rows."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        weight = self._weight[index].cpu()
        if self._scale is not None:
            weight = dequantise(weight, self._scale[index].detach().cpu(), self._block,
                                parts=self._parts)
        weight = weight.float()
        if self._transposed:
            weight = weight.T
        if self._interleaved:
            weight = torch.cat([weight[0::2], weight[1::2]])
        return weight


# -- does the device do what it does? --------------------------------------------------------------
def look(module: Any) -> tuple[Weights | None, str | None]:
    """Return what a module holds, or None and what it does that the device does not do.

    Called on every call, and traced by ``torch.compile``.
    """
    missing = []
    if getattr(module, "has_post_expert_norm", False):
        missing.append("no norm behind its experts, but has_post_expert_norm is True")
    if module.down_proj.dtype == torch.int8:
        missing.append("FP8 or float weights, but its weights are packed FP4")
    gate = gate_of(module)
    if gate.missing is not None:
        missing.append(gate.missing)
    if not missing:
        return Weights.of(module, gate.activation, gate.limit), None
    return None, (
        f"{type(module).__name__} must have {', and '.join(missing)}; the device runs experts with "
        f"or without up rows and biases, activations {', '.join(ACTIVATIONS)} and a limit before "
        "them: use "
        'experts_implementation="eager" for this model')
