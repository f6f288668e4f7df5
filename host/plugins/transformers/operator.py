"""The call: one opaque operator of PyTorch, without gradient, and what transformers calls.

``torch.compile`` and ``torch.export`` see ``moeaccel::experts``, a function of tensors, and never
the driver behind it. Its gradient is an operator, too, and raises when it is run, not when it is
traced: evaluation without ``no_grad`` works, compiled or not, and asking for a gradient fails.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.autograd import forward_ad
from transformers.integrations import moe
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface

from moeaccel.config import TOP_K_MAX
from moeaccel.host.errors import (
    GraphCaptureUnsupported,
    HostError,
    LimitExceeded,
    TrainingUnsupported,
    UnsupportedExperts,
)
from moeaccel.host.plugins.transformers.choice import LayerDims
from moeaccel.host.plugins.transformers.modules import Weights, look
from moeaccel.host.plugins.transformers.probing import Call, answered, probed
from moeaccel.host.plugins.transformers.session import check_limits, option, session_for
from moeaccel.host.plugins.transformers.split import run

__all__ = ["NAME", "experts_forward", "refuse_capture", "refuse_gradient", "refuse_tangents",
           "register", "remember", "warn_once", "why_refused"]

logger = logging.getLogger(__name__)

NAME = "moeaccel"
"""What to pass as ``experts_implementation``."""

_WAY_OUT = ("the device computes no gradients: evaluate under torch.no_grad() or without "
            "backward(), or train with another experts_implementation")


def refuse_capture() -> None:
    """Raise :class:`GraphCaptureUnsupported` while a CUDA graph is captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise GraphCaptureUnsupported(
            "experts must not be called while a CUDA graph is captured: a replay would not ask the "
            "device again; capture what lies around the call, or use torch.compile, which does so")


def refuse_tangents(*tensors: torch.Tensor) -> None:
    """Raise :class:`TrainingUnsupported` for gradients in forward mode, which do not heed
    ``no_grad()``."""
    if not torch.compiler.is_compiling() and any(
            forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise TrainingUnsupported(f"x and routing weights must be no dual tensors: {_WAY_OUT}")


# -- the operator ----------------------------------------------------------------------------------
# Graphs of CUDA cannot hold it: compiled code keeps it out of them.
@torch.library.custom_op(
    "moeaccel::experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,),
    schema="(Tensor x, Tensor ids, Tensor routing, Tensor gate_up, Tensor down, "
           "Tensor? gate_up_scale, Tensor? down_scale, bool transposed, bool interleaved, "
           "int[]? block, int layers, str activation='silu', bool gated=True, "
           "float? limit=None, Tensor? gate_up_bias=None, Tensor? down_bias=None, "
           "int shared=0, int loaded_by=0) -> Tensor")
def _experts(x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor,
             *weights: Any) -> torch.Tensor:
    refuse_capture()
    return run(Weights(*weights), x, ids, routing)


@_experts.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "moeaccel::gradient", mutates_args=(),
    schema="(Tensor grad, SymInt[] shape, ScalarType dtype, Device device) -> Tensor")
def _gradient(grad: torch.Tensor, shape: list[int], dtype: torch.dtype,
              device: torch.device) -> torch.Tensor:
    raise TrainingUnsupported(f"gradient of experts must not be asked for: {_WAY_OUT}")


@_gradient.register_fake
def _(grad: torch.Tensor, shape: list[int], dtype: torch.dtype,
      device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _like(value: Any) -> Any:
    """Return what a gradient is like: of a tensor that wants one, or of each of several."""
    if isinstance(value, list | tuple):
        return [_like(one) for one in value]
    wants = isinstance(value, torch.Tensor) and value.requires_grad
    return (value.shape, value.dtype, value.device) if wants else None


def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Note what gradients are asked for."""
    # Shapes only: tensors that are written to later must not be what the error is about.
    ctx.like = [_like(value) for value in inputs]


def refuse_gradient(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    """Return gradients that raise :class:`TrainingUnsupported` when they are computed."""
    grad = next(one for one in grads if one is not None)

    def refused(like: Any) -> Any:
        if isinstance(like, list):
            return [refused(one) for one in like]
        return like and _gradient(grad, *like)

    return tuple(refused(like) for like in ctx.like)


_experts.register_autograd(refuse_gradient, setup_context=remember)


# -- the experts implementation --------------------------------------------------------------------
_Dims = tuple[Any, ...]
"""The fields of :class:`LayerDims`."""


def why_refused(reason: str | None, dims: _Dims | None, top_k: int,
                layers: int) -> HostError | None:
    """Return why the device cannot run a layer, or None; opens it if need be.

    Parameters
    ----------
    reason : :class:`str`, optional
        See :func:`look`.
    dims : tuple, optional
        See :class:`LayerDims`.
    top_k, layers : :class:`int`
    """
    if reason is not None or dims is None:
        return UnsupportedExperts(reason or "")
    if top_k > TOP_K_MAX:
        return LimitExceeded(
            f"ids must have at most {TOP_K_MAX} experts for each token, not {top_k}")
    layer = LayerDims(*dims)
    try:
        check_limits(session_for([layer] * layers), layer)
    except (LimitExceeded, UnsupportedExperts) as error:
        return error
    return None


@torch.compiler.assume_constant_result
def _runs_eagerly(reason: str | None, dims: _Dims | None, top_k: int,
                  layers: int) -> bool:
    """Return whether transformers' own code runs a layer; asked once when code is compiled."""
    if option("unsupported") != "eager":
        return False
    error = why_refused(reason, dims, top_k, layers)
    if error is not None:
        warn_once(error)
    return error is not None


_warned: set[str] = set()


def warn_once(error: HostError) -> None:
    """Say why layers run without the device, once for each reason."""
    if str(error) not in _warned:
        _warned.add(str(error))
        logger.warning("layers run on the host, by transformers' own code: %s", error)


def experts_forward(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                    top_k_weights: torch.Tensor, **_: Any) -> torch.Tensor:
    """Run a layer's experts on the device: what is registered with transformers.

    Parameters
    ----------
    module : :class:`torch.nn.Module`
        The experts module, with the flags of ``use_experts_implementation``.
    hidden_states : (T, H)
    top_k_index : integer, (T, K)
        Ids outside [0, E) are skipped.
    top_k_weights : float, (T, K)

    Returns
    -------
    (T, H), type and place of ``hidden_states``; its backward raises :class:`TrainingUnsupported`.

    Raises
    ------
    UnsupportedExperts
        If the module does something that the device does not do.
    TrainingUnsupported
        If the module is in training mode and a gradient of anything is expected.
    GraphCaptureUnsupported
        If a CUDA graph is being captured.
    """
    weights, reason = look(module)
    top_k = top_k_index.shape[-1]
    if not torch.compiler.is_compiling() and (calls := probed.get()) is not None:
        calls.append(Call(module, weights, top_k, reason))
        return torch.zeros_like(hidden_states)
    if not torch.compiler.is_compiling() and (answer := answered.get()) is not None:
        return answer
    dims = weights and weights.dims
    plain = dims and (dims.experts, dims.d_model, dims.d_expert, dims.gated, dims.activation,
                      dims.biased)
    if _runs_eagerly(reason, plain, top_k, 1 if weights is None else weights.layers):
        # What the decorator wrapped.
        return type(module).forward.__wrapped__(
            module, hidden_states, top_k_index, top_k_weights, **_)
    if weights is None:
        raise UnsupportedExperts(reason)
    refuse_tangents(hidden_states, top_k_weights)
    if module.training and torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (hidden_states, top_k_weights, *weights.tensors)):
        raise TrainingUnsupported(
            f"{type(module).__name__} must be in evaluation mode, not in training: {_WAY_OUT}; "
            "model.eval() ends training mode")
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids = top_k_index.reshape(x.shape[0], top_k)
    y = torch.ops.moeaccel.experts(x, ids, top_k_weights.reshape(ids.shape), *weights)
    return y.reshape(hidden_states.shape)


def register() -> None:
    """Make ``experts_implementation="moeaccel"`` known to transformers; may be called again."""
    moe.ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, experts_forward)
