"""Whole models: is the device used, does it fit, what is there, is it still true?"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from moeaccel.errors import MoeAccelError
from moeaccel.host.errors import ExpertsIgnored, InvalidOption
from moeaccel.host.plugins.transformers import uploads
from moeaccel.host.plugins.transformers.choice import Choice
from moeaccel.host.plugins.transformers.modules import Weights, look
from moeaccel.host.plugins.transformers.operator import NAME, warn_once, why_refused
from moeaccel.host.plugins.transformers.probing import Call, probed
from moeaccel.host.plugins.transformers.routed import RoutedBlock, blocks_in, needs, wanted
from moeaccel.host.plugins.transformers.session import (
    check_memory,
    choice_for,
    option,
    session_for,
)

__all__ = ["check_model", "choose_config", "refresh", "release", "routing"]


def _check_type(model: Any, expected: type[torch.nn.Module]) -> None:
    if not isinstance(model, expected):
        raise InvalidOption(f"model must be a {expected.__name__}, not {type(model).__name__}")


def _dispatches(module: torch.nn.Module) -> bool:
    """Return whether a module goes through the experts interface."""
    return hasattr(module, "_is_expert_parallel")


def _weights_in(model: torch.nn.Module) -> list[tuple[torch.nn.Module, Weights]]:
    """Return the experts modules of a model that the device supports, and what they hold."""
    found = ((module, look(module)[0]) for module in model.modules() if _dispatches(module))
    return [(module, weights) for module, weights in found if weights is not None]


# -- what is in device memory ----------------------------------------------------------------------
def release(model: torch.nn.Module | None = None) -> None:
    """Free the device memory of a model's experts, or of all; a later call uploads them again.

    Calls that are under way in other threads end before it is free. Parameters that gave up their
    memory (``keep_host_weights=False``) get back what the device has: quantised weights.
    """
    if model is None:
        uploads.drop_all()
        return
    _check_type(model, torch.nn.Module)
    for _, weights in _weights_in(model):
        uploads.drop(weights)


def refresh(model: torch.nn.Module) -> int:
    """Compare all weights of a model's experts with what was uploaded, and upload what changed.

    Every call compares a part of them (see :mod:`moeaccel.host.plugins.transformers.watch`); after
    this, the device has what the model has.

    Parameters
    ----------
    model : :class:`torch.nn.Module`
        A model, or a part of one.

    Returns
    -------
    Number of layers that were uploaded again. Those that were not uploaded yet are not now.
    """
    _check_type(model, torch.nn.Module)
    changed = 0
    for module, weights in _weights_in(model):
        layer = wanted(module, weights)
        before = uploads.uploaded(layer)
        if before is not None:
            changed += uploads.layer_of(layer, everything=True) is not before
    return changed


# -- who routes? -----------------------------------------------------------------------------------
def routing(model: torch.nn.Module) -> list[RoutedBlock]:
    """Return who routes the MoE blocks of a model, and why it is not the device where it is not.

    Asks the device, which is opened if need be; nothing is uploaded.

    Parameters
    ----------
    model : :class:`torch.nn.Module`
        A model, or a part of one.
    """
    _check_type(model, torch.nn.Module)
    return list(blocks_in(model))


# -- what a model needs ----------------------------------------------------------------------------
def choose_config(model: torch.nn.Module, *, weight_format: str | None = None) -> Choice:
    """Return the configuration and memory that the plug-in chooses for a model.

    MOEACCEL_CONFIG and MOEACCEL_MEMORY, where they are set, are not chosen but taken as they are,
    also when the model does not fit them; all else is chosen to go with them.

    Parameters
    ----------
    model : :class:`torch.nn.Module`
        It may be on the meta device: only shapes are looked at.
    weight_format : :class:`str`, optional
        When left out, that of :func:`use_device`, else of MOEACCEL_WEIGHT_FORMAT.

    Returns
    -------
    ``config`` and ``memory_bytes``, as :func:`moeaccel.host.open_device` takes them.

    Raises
    ------
    LimitExceeded
        If no configuration is large enough.
    InvalidOption, ConfigurationError
        If one of these variables makes no sense.
    """
    _check_type(model, torch.nn.Module)
    return choice_for(needs(model), weight_format=weight_format)


# -- is it used? -----------------------------------------------------------------------------------
@contextlib.contextmanager
def _probing(model: torch.nn.Module) -> Iterator[list[Call]]:
    """Collect the calls of experts modules, without computing anything."""
    calls: list[Call] = []
    token = probed.set(calls)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield calls
    finally:
        probed.reset(token)
        for module in training:
            module.training = True


def _default_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.zeros((1, 4), dtype=torch.long, device=model.device)
    if getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def _looks_like_experts(module: torch.nn.Module) -> bool:
    """Return whether a module is a layer of routed experts; shared ones run on the host anyway."""
    name = type(module).__name__
    return (re.search(r"(Experts|ExpertsModule|CDMoE|NaiveMoe)$", name) is not None
            and not name.endswith("SharedExperts"))


def _check_setting(model: PreTrainedModel) -> Mapping[str, torch.nn.Module]:
    """Return the layers of experts by path, all of which are set to use the device."""
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
    return layers


def _calls(model: PreTrainedModel, inputs: Mapping[str, Any] | None) -> list[Call]:
    """Return the calls that a forward pass makes."""
    if not isinstance(inputs, Mapping | None):
        raise InvalidOption("inputs must be a mapping of the arguments of a forward pass, not "
                            f"{type(inputs).__name__}")
    with _probing(model) as calls:
        try:
            model(**(_default_inputs(model) if inputs is None else inputs))
        except MoeAccelError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError,
                ValueError) as error:
            raise InvalidOption(
                f"inputs must be arguments with which {type(model).__name__} runs, but "
                f"{'the default ones' if inputs is None else 'they'} ended in "
                f"{type(error).__name__}: {error}") from error
    return calls


def check_model(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> int:
    """Make sure that every experts layer of a model runs on the device; return how many do.

    Looks at the model's parts, then runs one forward pass with empty experts and counts which of
    them are asked, and for what; then asks the device, which is opened if need be, whether it can
    and has room. Nothing is uploaded. What is not part of a layer's routed experts (shared experts,
    say) runs on the host.

    Parameters
    ----------
    model : :class:`transformers.PreTrainedModel`
    inputs : mapping, optional
        Arguments of a forward pass that reaches every experts layer; four tokens when left out.

    Returns
    -------
    Number of layers on the device: all, but for those that :func:`use_device` lets run eagerly.

    Raises
    ------
    ExpertsIgnored
        If the setting is something else, or a part of the model ignores it.
    UnsupportedExperts
        If a layer does something that the device does not do.
    LimitExceeded
        If a layer, or its number of experts for a token, is larger than the device allows.
    OutOfDeviceMemory
        If the layers do not fit its memory.
    InvalidOption
        If the model does not run with these inputs, or they are no mapping, or it is no model.
    """
    _check_type(model, PreTrainedModel)
    name = type(model).__name__
    layers = _check_setting(model)
    list(blocks_in(model))  # also of a model that has not been called yet
    calls = {id(call.module): call for call in _calls(model, inputs)}
    missed = [path for path, module in layers.items() if id(module) not in calls]
    if not layers or missed:
        what = f"{missed[0]!r} and {len(missed) - 1} more were" if missed else "no layer was"
        raise ExpertsIgnored(
            f"{name} must call the device in a forward pass, but {what} "
            f"{'not ' if missed else ''}asked; pass inputs that reach every experts layer, or use "
            "a model with experts that supports experts_implementation")
    return _check_device([calls[id(module)] for module in layers.values()])


def _check_device(calls: list[Call]) -> int:
    """Return how many layers run on the device, having made sure that it can and has room."""
    layers = [(call, wanted(call.module, call.weights)) for call in calls
              if call.weights and call.weights.dims.possible]
    waiting = {id(call): layer.dims for call, layer in layers if uploads.uploaded(layer) is None}
    session = session_for([dims for _, layer in layers for dims in layer.dims],
                          list(itertools.chain(*waiting.values())))
    running = len(calls)
    for call in calls:
        error = why_refused(call.reason, call.weights and call.weights.dims, call.top_k, 1)
        if error is None:
            continue
        if option("unsupported") != "eager":
            raise error
        warn_once(error)
        running -= 1
        waiting.pop(id(call), None)
    check_memory(session, list(itertools.chain(*waiting.values())))
    return running
