"""Activations of experts: what each is, once for golden model, hardware, driver and documentation.

Every one has the form ``act(g) = g * f(g)`` with f from 0 to 1, 0 far below and 1 far above; the
device multiplies by f, which a table of :mod:`moeaccel.tables` holds, or the sign of g tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import FormatError

__all__ = ["ACTIVATIONS", "Activation", "activation", "exact_logistic"]

Floats = NDArray[np.float64]


def exact_logistic(x: Floats) -> Floats:
    """Return the logistic function in float64."""
    return 1 / (1 + np.exp(np.minimum(-x, 700)))  # beyond, exp would overflow


def _step(x: Floats) -> Floats:
    return (x > 0).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One activation, ``act(g) = g * f(g)``.

    Parameters
    ----------
    name, code : :class:`str`, :class:`int`
        Name for users; number in expert table entries and hardware, 0 to 255.
    text : :class:`str`
        Formula and source.
    f : callable
        f in float64, exactly.
    tabulated : :class:`bool`
        f is interpolated from a table; else it is 1 where g > 0 and 0 elsewhere.
    """

    name: str
    code: int
    text: str
    f: Callable[[Floats], Floats]
    tabulated: bool

    def __call__(self, g: Floats) -> Floats:
        """Return ``act(g)`` in float64."""
        return g * self.f(g)


ACTIVATIONS: dict[str, Activation] = {a.name: a for a in (
    Activation(
        name="silu", code=0, text="g / (1 + exp(-g)) (Elfwing et al., 2017)", f=exact_logistic,
        tabulated=True),
    Activation(name="relu", code=1, text="max(g, 0)", f=_step, tabulated=False),
)}
"""Every activation by name, in the order of their codes."""


def activation(name: str | Activation) -> Activation:
    """Return the activation of that name.

    Raises
    ------
    FormatError
        If there is none.
    """
    if isinstance(name, Activation):
        return name
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise FormatError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, not {name!r}") from None
