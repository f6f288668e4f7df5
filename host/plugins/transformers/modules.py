"""What an experts module of transformers holds, and whether the device does what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self, overload

import torch
from transformers.activations import SiLUActivation
from transformers.integrations import moe
from transformers.integrations.finegrained_fp8 import FP8Experts

from moeaccel.host.importers.fp8 import dequantise
from moeaccel.host.plugins.transformers.choice import LayerDims

__all__ = ["Weights", "why_not"]

# What the decorator installs where a class has no gate of its own. Others may differ by a clamp
# that no probe would reach, so they are refused.
_DEFAULT_GATE = vars(moe).get("_default_apply_gate")
_LAYERS_IF_UNKNOWN = 64


def _layers_of(module: Any) -> int:
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    return count if isinstance(count, int) and count > 0 else _LAYERS_IF_UNKNOWN


class Weights(NamedTuple):
    """The parameters of an experts module, and how they lie in them.

    Parameters
    ----------
    gate_up : tensor, (E, 2 I, H)
        (E, H, 2 I) where ``transposed``.
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
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    transposed: bool
    interleaved: bool
    block: list[int] | None
    layers: int

    @classmethod
    def of(cls, module: Any) -> Self:
        """Return those of a module."""
        block = getattr(module, "block_size", None)
        return cls(module.gate_up_proj, module.down_proj,
                   getattr(module, "gate_up_proj_scale_inv", None),
                   getattr(module, "down_proj_scale_inv", None),
                   bool(getattr(module, "is_transposed", False)),
                   not getattr(module, "is_concatenated", True),
                   None if block is None else list(block), _layers_of(module))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that there are."""
        scales = [t for t in (self.gate_up_scale, self.down_scale) if t is not None]
        return self.gate_up, self.down, *scales

    @property
    def dims(self) -> LayerDims:
        """Number of experts and dimensions, padded."""
        experts, *shape = self.down.shape
        d_expert, d_model = shape if self.transposed else reversed(shape)
        return LayerDims.padded(experts, d_model, d_expert)

    @property
    def stacks(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Gate and up, (E, 2 I, H), and down, (E, H, I), converted one expert at a time."""
        return (_Stack(self.gate_up, self.gate_up_scale, self.block, self.transposed,
                       self.interleaved, 1 if self.interleaved else 2),
                _Stack(self.down, self.down_scale, self.block, self.transposed, False, 1))


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
@torch.compiler.disable
def _computes_silu(function: Any) -> bool:
    probe = torch.linspace(-30, 30, 241)
    try:
        with torch.no_grad():
            return torch.allclose(function(probe.clone()), torch.nn.functional.silu(probe),
                                  rtol=1e-5, atol=1e-6)
    except (RuntimeError, TypeError, ValueError):
        return False


def _is_silu(function: Any) -> bool:
    """Return whether an activation computes SiLU, whatever class it is."""
    return type(function) in (torch.nn.SiLU, SiLUActivation) or bool(_computes_silu(function))


def why_not(module: Any) -> str | None:
    """Return what a module does that the device does not do, or None.

    Called on every call, and traced by ``torch.compile``.
    """
    found = None
    if not getattr(module, "has_gate", True):
        found = "a gate, but has_gate is False"
    elif getattr(module, "has_bias", False):
        found = "no bias, but has_bias is True"
    elif getattr(module, "has_post_expert_norm", False):
        found = "no norm behind its experts, but has_post_expert_norm is True"
    elif isinstance(module, FP8Experts):
        for flag in ("swiglu_alpha", "limit", "gate_softcap"):
            if (value := getattr(module, flag, None)) is not None:
                found = f"a plain SwiGLU gate, but {flag} is {value}"
        if module.gate_up_proj.dtype == torch.int8:
            found = "FP8 weights, but its weights are packed FP4"
    elif getattr(type(module), "_apply_gate", None) is not _DEFAULT_GATE:
        found = "the default gate, silu(gate) * up, but _apply_gate is its own"
    if found is None and not _is_silu(module.act_fn):
        name = getattr(module.act_fn, "__name__", type(module.act_fn).__name__)
        found = f"the activation SiLU, but act_fn is {name}"
    if found is None:
        return None
    return (f"{type(module).__name__} must have {found}; the device runs gated experts with SiLU, "
            'without bias and without a norm behind them: use experts_implementation="eager" for '
            "this model")
