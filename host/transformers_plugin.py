"""``experts_implementation="moeaccel"`` in Hugging Face transformers.

Importing this module registers the name with transformers' own registries; nothing is patched::

    import moeaccel.host.transformers_plugin
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moeaccel")

The experts of each layer are quantised and uploaded on their first call and again whenever their
parameters change. Which device they go to, and how they are stored there, says :func:`use_device`,
else the environment: ``MOEACCEL_DEVICE`` (golden), ``MOEACCEL_CONFIG`` (small),
``MOEACCEL_WEIGHT_FORMAT`` (int4_g32), ``MOEACCEL_ACTIVATION_BITS`` (16).

transformers accepts the name for every model, but a class that does not go through its experts
interface ignores it without a word: :func:`check_model` finds out.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from transformers.integrations import moe
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8ExpertsInterface
from transformers.modeling_utils import PreTrainedModel

from moeaccel.host.device import Device, open_device
from moeaccel.host.errors import (
    ExpertsIgnored,
    InvalidOption,
    TrainingUnsupported,
    UnsupportedExperts,
)
from moeaccel.host.importers.fp8 import dequantise
from moeaccel.host.layers import Experts

__all__ = ["NAME", "Session", "check_model", "current_session", "register", "release",
           "use_device"]

logger = logging.getLogger(__name__)

NAME = "moeaccel"
"""What to pass as ``experts_implementation``."""


# -- which device ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Session:
    """Where experts go, and how they are stored there.

    Parameters
    ----------
    device : :class:`Device`
    weight_format : :class:`str`
    activation_bits, grid_exponent : :class:`int`
        See :meth:`Device.load_experts`.
    """

    device: Device
    weight_format: str = "int4_g32"
    activation_bits: int = 16
    grid_exponent: int | None = None


@dataclass(frozen=True)
class _Upload:
    """The experts of one module, and what they were made from."""

    experts: Experts
    session: Session
    fingerprint: tuple[object, ...]


_lock = threading.RLock()
_session: Session | None = None
_uploads: weakref.WeakKeyDictionary[torch.nn.Module, _Upload] = weakref.WeakKeyDictionary()
_probe: contextvars.ContextVar[list[torch.nn.Module] | None] = contextvars.ContextVar(
    "moeaccel_probe", default=None)


def use_device(device: Device | None, *, weight_format: str = "int4_g32",
               activation_bits: int = 16, grid_exponent: int | None = None) -> None:
    """Set the device for every model from now on; layers move to it on their next call.

    Parameters
    ----------
    device : :class:`Device`, optional
        It stays yours to close. None: what the environment says, opened on the next call.
    weight_format, activation_bits, grid_exponent
        See :meth:`Device.load_experts`.
    """
    global _session
    with _lock:
        _session = device and Session(device, weight_format, activation_bits, grid_exponent)


def current_session() -> Session:
    """Return where experts go, opening the device that the environment names if there is none.

    Raises
    ------
    InvalidOption
        If an environment variable makes no sense.
    """
    global _session
    with _lock:
        if _session is None:
            bits = os.environ.get("MOEACCEL_ACTIVATION_BITS", "16")
            if bits not in ("8", "16"):
                raise InvalidOption(f"MOEACCEL_ACTIVATION_BITS must be 8 or 16, not {bits!r}")
            device = open_device(os.environ.get("MOEACCEL_DEVICE", "golden"),
                                 config=os.environ.get("MOEACCEL_CONFIG", "small"))
            _session = Session(device, os.environ.get("MOEACCEL_WEIGHT_FORMAT", "int4_g32"),
                               int(bits))
        return _session


def release(model: torch.nn.Module | None = None) -> None:
    """Free the device memory of a model's experts, or of all; a later call uploads them again."""
    with _lock:
        modules = list(_uploads) if model is None else list(model.modules())
        for module in modules:
            upload = _uploads.pop(module, None)
            if upload is not None:
                upload.experts.close()


# -- what an experts module holds ------------------------------------------------------------------
def _refuse(module: torch.nn.Module, flag: str, expected: str) -> UnsupportedExperts:
    return UnsupportedExperts(
        f"{type(module).__name__} must have {expected}, but {flag}; the device runs gated experts "
        "with SiLU, without bias and without a norm behind them: use "
        'experts_implementation="eager" for this model')


def _is_silu(function: Any) -> bool:
    """Return whether an activation computes SiLU, whatever class it is."""
    probe = torch.linspace(-30, 30, 241)
    try:
        with torch.no_grad():
            return torch.allclose(function(probe.clone()), torch.nn.functional.silu(probe),
                                  rtol=1e-5, atol=1e-6)
    except (RuntimeError, TypeError, ValueError):
        return False


def _check_module(module: Any) -> None:
    """Raise :class:`UnsupportedExperts` if the device does not do what the module does."""
    if not getattr(module, "has_gate", True):
        raise _refuse(module, "has_gate is False", "a gate")
    if getattr(module, "has_bias", False):
        raise _refuse(module, "has_bias is True", "no bias")
    if getattr(module, "has_post_expert_norm", False):
        raise _refuse(module, "has_post_expert_norm is True", "no norm behind its experts")
    if isinstance(module, FP8Experts):
        for flag in ("swiglu_alpha", "limit", "gate_softcap"):
            if (value := getattr(module, flag, None)) is not None:
                raise _refuse(module, f"{flag} is {value}", "a plain SwiGLU gate")
        if module.gate_up_proj.dtype == torch.int8:
            raise _refuse(module, "its weights are packed FP4", "FP8 weights")
    else:
        # What the decorator installs where a class has no gate of its own. Others may differ by a
        # clamp that no probe would reach, so they are refused.
        default = vars(moe).get("_default_apply_gate")
        if getattr(type(module), "_apply_gate", None) is not default:
            raise _refuse(module, "_apply_gate is its own", "the default gate, silu(gate) * up")
    if not _is_silu(module.act_fn):
        name = getattr(module.act_fn, "__name__", type(module.act_fn).__name__)
        raise _refuse(module, f"act_fn is {name}", "the activation SiLU")


def _parameters(module: Any) -> list[torch.Tensor]:
    names = ("gate_up_proj", "down_proj", "gate_up_proj_scale_inv", "down_proj_scale_inv")
    found = [getattr(module, name, None) for name in names]
    return [tensor for tensor in found if tensor is not None]


def _fingerprint(module: torch.nn.Module) -> tuple[object, ...]:
    """Return what changes when a parameter is replaced or written to."""
    return tuple(
        (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape),
         0 if tensor.is_inference() else tensor._version)
        for tensor in _parameters(module))


class _Stack(Sequence[torch.Tensor]):
    """A view of one projection of all experts that converts one expert at a time."""

    def __init__(self, module: Any, name: str) -> None:
        self._weight: torch.Tensor = getattr(module, name).detach()
        self._scale = getattr(module, f"{name}_scale_inv", None)
        self._block = getattr(module, "block_size", None)
        self._transposed = bool(getattr(module, "is_transposed", False))
        self._interleaved = (name == "gate_up_proj"
                             and not getattr(module, "is_concatenated", True))
        self._parts = 2 if name == "gate_up_proj" and not self._interleaved else 1

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


def _upload(module: torch.nn.Module) -> Experts:
    """Return the module's experts in device memory, uploading them if they are not there as is."""
    with _lock:
        session = current_session()
        fingerprint = _fingerprint(module)
        found = _uploads.get(module)
        if found is not None:
            if (found.session == session and found.fingerprint == fingerprint
                    and not found.experts.closed):
                return found.experts
            del _uploads[module]
            found.experts.close()
        _check_module(module)
        logger.debug("upload %s", type(module).__name__)
        experts = session.device.load_experts(
            _Stack(module, "gate_up_proj"), _Stack(module, "down_proj"),
            weight_format=session.weight_format, activation_bits=session.activation_bits,
            grid_exponent=session.grid_exponent)
        _uploads[module] = _Upload(experts, session, fingerprint)
        return experts


# -- the experts implementation --------------------------------------------------------------------
def experts_forward(module: torch.nn.Module, hidden_states: torch.Tensor,
                    top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
                    **_: Any) -> torch.Tensor:
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
    (T, H), type and place of ``hidden_states``; without gradient.

    Raises
    ------
    UnsupportedExperts
        If the module does something that the device does not do.
    TrainingUnsupported
        If the module is in training mode and a gradient is expected.
    """
    probe = _probe.get()
    if probe is not None:
        _check_module(module)
        probe.append(module)
        return torch.zeros_like(hidden_states)
    if module.training and torch.is_grad_enabled() and hidden_states.requires_grad:
        raise TrainingUnsupported(
            f"{type(module).__name__} must be in evaluation mode, not in training: the device "
            "computes no gradients; call model.eval(), or train with another "
            "experts_implementation")
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids = top_k_index.reshape(x.shape[0], top_k_index.shape[-1])
    weights = top_k_weights.reshape(ids.shape)
    y: torch.Tensor = _upload(module)(x, ids, weights)
    return y.reshape(hidden_states.shape)


def register() -> None:
    """Make ``experts_implementation="moeaccel"`` known to transformers; may be called again."""
    moe.ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, experts_forward)


# -- is it used? -----------------------------------------------------------------------------------
@contextlib.contextmanager
def _probing(model: torch.nn.Module) -> Iterator[list[torch.nn.Module]]:
    """Collect the experts modules that are called, without computing anything."""
    calls: list[torch.nn.Module] = []
    token = _probe.set(calls)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield calls
    finally:
        _probe.reset(token)
        for module in training:
            module.training = True


def _default_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.zeros((1, 4), dtype=torch.long, device=model.device)
    if getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def _looks_like_experts(module: torch.nn.Module) -> bool:
    return re.search(r"(Experts|ExpertsModule|CDMoE|NaiveMoe)$", type(module).__name__) is not None


def _dispatches(module: torch.nn.Module) -> bool:
    """Return whether a module goes through the experts interface."""
    return hasattr(module, "_is_expert_parallel")


def check_model(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> int:
    """Make sure that every experts layer of a model uses the device; return how many do.

    Looks at the model's parts, then runs one forward pass with empty experts and counts which of
    them are asked: nothing is uploaded.

    Parameters
    ----------
    model : :class:`transformers.PreTrainedModel`
    inputs : mapping, optional
        Arguments of a forward pass that reaches every experts layer; four tokens when left out.

    Raises
    ------
    ExpertsIgnored
        If the setting is something else, or a part of the model ignores it.
    UnsupportedExperts
        If a layer does something that the device does not do.
    """
    name = type(model).__name__
    layers = {path: module for path, module in model.named_modules() if _dispatches(module)}
    ignoring = {path: module for path, module in model.named_modules()
                if _looks_like_experts(module) and not _dispatches(module)}
    if ignoring:
        parts = sorted({type(part).__name__ for part in model.modules()
                        if isinstance(part, PreTrainedModel)
                        and not part._can_set_experts_implementation()})
        classes = sorted({type(module).__name__ for module in ignoring.values()})
        raise ExpertsIgnored(
            f"{name} must send all its experts through transformers' experts interface, but "
            f"{', '.join(classes)} ({len(ignoring)} layers, first {next(iter(ignoring))!r}, in "
            f"{', '.join(parts) or name}) ignores experts_implementation; these layers would run "
            "on the host. Use a class that supports it, or experts_implementation=\"eager\"")
    for path, module in layers.items():
        setting = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if setting != NAME:
            raise ExpertsIgnored(
                f"experts_implementation of {path!r} in {name} must be {NAME!r}, not {setting!r}; "
                f"call model.set_experts_implementation({NAME!r})")
    with _probing(model) as calls:
        model(**(_default_inputs(model) if inputs is None else inputs))
    called = {id(module) for module in calls}
    missed = [path for path, module in layers.items() if id(module) not in called]
    if not layers or missed:
        what = f"{missed[0]!r} and {len(missed) - 1} more were" if missed else "no layer was"
        raise ExpertsIgnored(
            f"{name} must call the device in a forward pass, but {what} "
            f"{'not ' if missed else ''}asked; pass inputs that reach every experts layer, or use "
            "a model with experts that supports experts_implementation")
    return len(layers)


register()
