"""What an experts module computes between its two products, found out by values: which activation,
and with which limit before it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations import moe

from moeaccel.activations import ACTIVATIONS
from moeaccel.errors import FormatError
from moeaccel.image import limit_bits

__all__ = ["Gate", "gate_of"]

# What the decorator installs where a class has no gate of its own.
_DEFAULT_GATE = vars(moe).get("_default_apply_gate")

_Floats = NDArray[np.float64]

# Values whose products float32 holds, also of squares: some gates compute in it.
_FAR, _NEAR = 2.0**40, 2.0**-20
_POWERS = 2.0 ** np.arange(-12, 41)
_GATES = np.concatenate([np.linspace(-30, 30, 241), _POWERS, -_POWERS])
_UPS = np.array([0, _NEAR, 0.5, 1, -1, -3, _FAR, -_FAR])

# Between what float32 makes of a formula and what distinguishes two: erf and tanh in GELU differ by
# up to 5e-4.
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6
_LIMIT_RELATIVE = 1e-6


class Gate(NamedTuple):
    """What a module does with the rows of its first product, or what of it the device does not.

    ``activation(min(gate, limit)) * clamp(up, -limit, limit)``, or of an activation with an offset
    ``(clamp(up, -limit, limit) + 1)`` in its second place; without up rows ``activation(gate)``.

    Parameters
    ----------
    activation : :class:`str`
        One of :data:`moeaccel.activations.ACTIVATIONS`.
    limit : :class:`float`, optional
    missing : :class:`str`, optional
        What the module must have, but has not; the rest says nothing then.
    """

    activation: str = "silu"
    limit: float | None = None
    missing: str | None = None


_Facts = tuple[object, ...]
_found: weakref.WeakKeyDictionary[torch.nn.Module, tuple[_Facts, Gate]] = (
    weakref.WeakKeyDictionary())


@torch.compiler.assume_constant_result
def gate_of(module: Any) -> Gate:
    """Return what a module computes between its products.

    Looked at again when the module's activation, its gate or one of its numbers changed; what they
    read from elsewhere, from its ``config`` for one, is not watched. Compiled code asks once.
    """
    activation = getattr(module, "act_fn", None)
    if not isinstance(activation, torch.nn.Module | None):
        # A function may hold the module, which would then be kept alive here.
        return _look(module)
    facts = (activation, getattr(type(module), "_apply_gate", None), *(
        (name, value) for name, value in vars(module).items()
        if isinstance(value, int | float | None)))
    before = _found.get(module)
    if before is not None and before[0] == facts:
        return before[1]
    gate = _look(module)
    _found[module] = facts, gate
    return gate


def _look(module: Any) -> Gate:
    """Return what a module computes, by its values."""
    gated = getattr(module, "has_gate", True)
    if gated and getattr(type(module), "_apply_gate", None) is not _DEFAULT_GATE:
        return _look_at_gate(module)
    name = _name_of(lambda gate, up: _run(module.act_fn, gate, gate.shape), None,
                    np.ones(1) if gated else None)
    if name is not None:
        return Gate(name)
    act_fn = getattr(module.act_fn, "__name__", type(module.act_fn).__name__)
    return Gate(missing=f"an activation among {', '.join(ACTIVATIONS)}, but act_fn is {act_fn}")


def _look_at_gate(module: Any) -> Gate:
    """Return what a gate of a module's own computes."""
    axis = 0 if getattr(module, "is_concatenated", True) else 1

    def compute(gate: _Floats, up: _Floats) -> _Floats:
        rows = np.stack([gate, up], axis=axis).reshape(1, -1)
        return _run(module._apply_gate, rows, (1, len(gate))).reshape(-1)

    limit = _limit_of(compute)
    name = _name_of(compute, limit, _UPS)
    if name is None:
        return Gate(missing=_flavour(module))
    try:
        limit_bits(limit)
    except FormatError:
        return Gate(missing="a limit with at most 8 significant bits before its activation, but it "
                            f"is {limit:.7g}")
    return Gate(name, limit)


def _run(function: Callable[[torch.Tensor], torch.Tensor], values: _Floats,
         shape: tuple[int, ...]) -> _Floats:
    """Return what a function of tensors gives; no numbers where it does not run."""
    try:
        # While code is exported, tensors are not what they seem. A copy: some compute in place.
        with _disable_current_modes():
            found = function(torch.from_numpy(values.copy())).detach().numpy()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        found = None
    return found if found is not None and found.shape == shape else np.full(shape, math.nan)


_Compute = Callable[[_Floats, _Floats], _Floats]


def _limit_of(compute: _Compute) -> float | None:
    """Return where a gate clamps up rows, if it does; a bfloat16 number if it is next to one."""
    (base,) = compute(np.ones(1), np.zeros(1))  # what an offset of up rows gives
    limit = math.nan
    for step in (0.5, _NEAR) if base else (_NEAR,):  # next to 1 float32 has few bits for a step
        far, near = compute(np.ones(2), np.array([_FAR, step]))
        with np.errstate(all="ignore"):
            limit = float(np.float64(far - base) / (near - base) * step)
        if limit > step:
            break
    if not 0 < limit < _FAR * (1 - _LIMIT_RELATIVE):
        return None
    mantissa, exponent = math.frexp(limit)
    rounded = math.ldexp(round(mantissa * 256), exponent - 8)
    return rounded if abs(limit - rounded) <= _LIMIT_RELATIVE * limit else limit


def _name_of(compute: _Compute, limit: float | None, ups: _Floats | None) -> str | None:
    """Return the activation with which a gate is what a function computes; with up rows, or without
    any (None)."""
    gate, up = _points(limit, np.ones(1) if ups is None else ups)
    found = compute(gate, up)
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    for name, activation in ACTIVATIONS.items():
        expected = activation(gate) * (up + (0 if ups is None else activation.up_offset))
        tolerance = _RELATIVE * abs(expected) + _ABSOLUTE * np.maximum(1, abs(up))
        if (abs(found - expected) <= tolerance).all():
            return name
    return None


def _points(limit: float | None, ups: _Floats) -> tuple[_Floats, _Floats]:
    """Return gate and up rows of all pairs, also on both sides of a limit."""
    around = np.array([] if limit is None else [
        sign * limit * factor for sign in (1, -1) for factor in (0.995, 1, 1.005)])
    gate, up = np.meshgrid(np.concatenate([_GATES, around]), np.concatenate([ups, around]))
    return np.asarray(gate.reshape(-1), np.float64), np.asarray(up.reshape(-1), np.float64)


def _flavour(module: Any) -> str:
    """Return what to call a gate that the device does not have."""
    act_fn = getattr(module, "act_fn", None)
    for name in ("swiglu_alpha", "alpha"):
        if (value := getattr(module, name, None)) is not None:
            return ("a gate with an alpha of 1.702 and 1 added to up rows, or without both, but "
                    f"{name} is {value}")
    for owner, name in ((module, "gate_softcap"), (act_fn, "gate_softcap")):
        if getattr(owner, name, None) is not None:
            return f"a gate without soft caps, but there is a {name}"
    return ("a gate activation(min(gate, limit)) * clamp(up, -limit, limit) with or without limit, "
            f"and an activation among {', '.join(ACTIVATIONS)}, but _apply_gate computes "
            "something else")
