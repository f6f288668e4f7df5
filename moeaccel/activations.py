"""Activations of experts: what each is, once for golden model, hardware, driver and documentation.

Every one has the form ``act(g) = g * f(g)``; the device multiplies by f. h is ``act(gate) * up``,
or ``act(gate) * (up + 1)``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import FormatError

__all__ = ["ACTIVATIONS", "Activation", "Factor", "activation", "exact_logistic", "hidden",
           "limit_behind"]

Floats = NDArray[np.float64]


def exact_logistic(x: Floats) -> Floats:
    """Return the logistic function in float64."""
    return 1 / (1 + np.exp(np.minimum(-x, 700)))  # beyond, exp would overflow


def _step(x: Floats) -> Floats:
    return (x > 0).astype(np.float64)


def _ramp(x: Floats) -> Floats:
    return np.maximum(x, 0)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _normal(x: Floats) -> Floats:
    """Return the distribution function of the standard normal distribution."""
    return _erfc(-x / math.sqrt(2)) / 2


def _normal_tanh(x: Floats) -> Floats:
    """Return its approximation by the hyperbolic tangent, 1/2 (1 + tanh y): logistic(2 y)."""
    near = np.clip(x, -100, 100)
    return exact_logistic(2 * math.sqrt(2 / math.pi) * (near + 0.044715 * near**3))


def _steep_logistic(x: Floats) -> Floats:
    return exact_logistic(1.702 * x)


class Factor(enum.Enum):
    """Where the device has f from."""

    TABLE = "table"
    """Interpolated; 0 far below and 1 far above."""
    STEP = "step"
    """1 where g > 0, else 0."""
    RAMP = "ramp"
    """g where g > 0, else 0."""


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
    factor : :class:`Factor`
    up_offset : :class:`int`
        0 or 1: what is added to up rows, after their limit.
    """

    name: str
    code: int
    text: str
    f: Callable[[Floats], Floats]
    factor: Factor
    up_offset: int = 0

    def __call__(self, g: Floats) -> Floats:
        """Return ``act(g)`` in float64."""
        return g * self.f(g)


ACTIVATIONS: dict[str, Activation] = {a.name: a for a in (
    Activation(
        name="silu", code=0, text="g / (1 + exp(-g)) (Elfwing et al., 2017)", f=exact_logistic,
        factor=Factor.TABLE),
    Activation(name="relu", code=1, text="max(g, 0)", f=_step, factor=Factor.STEP),
    Activation(
        name="gelu", code=2, text="g (1 + erf(g / sqrt(2))) / 2 (Hendrycks and Gimpel, 2016)",
        f=_normal, factor=Factor.TABLE),
    Activation(
        name="gelu_tanh", code=3,
        text="g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2 (Hendrycks and Gimpel, 2016)",
        f=_normal_tanh, factor=Factor.TABLE),
    Activation(
        name="relu2", code=4, text="max(g, 0)^2 (So et al., 2021)", f=_ramp, factor=Factor.RAMP),
    Activation(
        name="gpt_oss", code=5,
        text="g / (1 + exp(-1.702 g)), times up + 1 (gpt-oss-120b & gpt-oss-20b Model Card, 2025)",
        f=_steep_logistic, factor=Factor.TABLE, up_offset=1),
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


def hidden(rows: Floats, d_expert: int, name: str | Activation, limit: float | None = None,
           gate_limit: float | None = None) -> Floats:
    """Return h of an expert in float64, (n, d_expert): ``act(gate)``, ``act(gate) * up``, or
    ``act(gate) * up * second up``, which has no offset.

    Parameters
    ----------
    rows : float64 array, (n, d_expert), (n, 2 d_expert) or (n, 3 d_expert)
        Gate; then up; then second up.
    limit : :class:`float`, optional
        Gate is at most that before the activation, and up at most that far from 0, before an
        offset.
    gate_limit : :class:`float`, optional
        Of the gate, where it is not ``limit``.
    """
    gate, *ups = (rows[:, first : first + d_expert] for first in range(0, rows.shape[1], d_expert))
    act = activation(name)
    if limit is not None:
        ups = [np.clip(up, -limit, limit) for up in ups]
    if gate_limit is None:
        gate_limit = limit
    if gate_limit is not None:
        gate = np.minimum(gate, gate_limit)
    if len(ups) == 1:
        ups = [ups[0] + act.up_offset]
    return math.prod(ups, start=act(gate))


def limit_behind(name: str | Activation, limit: float) -> float:
    """Return the most that a gate may be, so that its activation is at most ``limit``.

    ``min(act(g), limit)`` is ``act(min(g, limit_behind))``, for act grows where g does and is not
    below 0. A number with 17 significant bits.
    """
    act = activation(name)
    low, high = 0.0, max(2.0, 2 * limit)
    while low < (middle := (low + high) / 2) < high:
        below = act(np.array(middle)) <= limit
        low, high = (middle, high) if below else (low, middle)
    fraction, exponent = math.frexp(low)
    return math.ldexp(round(fraction * 2**17), exponent - 17)
