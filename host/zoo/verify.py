"""Models of the zoo on the device: float, golden model and RTL side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import MoeAccelError
from moeaccel.host.device import Device
from moeaccel.host.zoo.cases import Case, case
from moeaccel.host.zoo.support import expert_options, known
from moeaccel.zoo.schema import Model

__all__ = ["MEMORY_BYTES", "RELATIVE_ERROR", "Verdict", "verify"]

MEMORY_BYTES = 1 << 28
"""Of a device for reduced sizes."""

RELATIVE_ERROR = 5e-4
"""Most that y of 16-bit activations may be off the float reference, relative to all of y: above
what rounding gives, below what any mistake does."""

_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """What came out for a model.

    Parameters
    ----------
    name : :class:`str`
        Key of the model.
    ok : :class:`bool`
        Router and experts are on the device, and everything is as it should be.
    router, expert : :class:`str`
        What they are.
    selection_differences : :class:`int`, optional
        Tokens for which the device chose other experts than the float router; None where it does
        not route.
    relative_error : :class:`float`, optional
        Of y; None where experts did not run.
    reason : :class:`str`
        What is missing, or wrong; empty if ok.
    """

    name: str
    ok: bool
    router: str
    expert: str
    selection_differences: int | None
    relative_error: float | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def verify(model: Model, golden: Device, rtl: Device, *, seed: int = 0) -> Verdict:
    """Run a model at reduced size.

    Parameters
    ----------
    model : :class:`Model`
    golden, rtl : :class:`Device`
        Of one configuration.
    seed : :class:`int`
        Of weights and x.
    """
    verdict = Verdict(model.key, False, model.router.text, model.expert.text, None, None, "")
    problems: list[str] = []
    try:
        drawn = case(model, golden.config, seed=seed)
        y, bits = _experts(drawn, golden, rtl)
        error = _relative(y, drawn)
        verdict = replace(verdict, relative_error=error)
        problems += _wrong(bits, error)
    except MoeAccelError as failure:
        problems.append(f"experts: {model.expert.text}: {failure}")
    problems.append("router: the device does not route")
    return replace(verdict, ok=not problems, reason="; ".join(problems))


def _wrong(differ: int, error: float) -> list[str]:
    """Return what is wrong with y."""
    problems = []
    if differ:
        problems.append(f"experts: {differ} elements of y differ between golden model and RTL")
    if not error <= RELATIVE_ERROR:
        problems.append(f"experts: relative error must be at most {RELATIVE_ERROR:g}, not "
                        f"{error:.3g}")
    return problems


def _relative(y: _Floats, drawn: Case) -> float:
    exact = drawn.y()
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def _experts(drawn: Case, golden: Device, rtl: Device) -> tuple[_Floats, int]:
    """Return the experts' y for routes of the host, and how many elements differ."""
    expected, found = (_run(device, drawn) for device in (golden, rtl))
    differ = expected.view(np.uint32) != found.view(np.uint32)
    return found, int(differ.sum())


def _run(device: Device, drawn: Case) -> _Floats:
    """Return y, (T, H); what no expert computes the host does, as an engine would."""
    options = expert_options(drawn.model.expert)
    for name in ("gate_up_bias", "down_bias"):
        if name in options:
            options[name] = getattr(drawn, name)
    known(device, options)
    x, ids, weights = drawn.x, drawn.ids, drawn.weights
    with device.load_experts(drawn.gate_up, drawn.down, weight_format="mxint8", quantiser="amax",
                             **options) as experts:
        if drawn.model.router.weight_on == "input":
            y = np.zeros_like(x)
            for column in range(ids.shape[1]):
                one = slice(column, column + 1)
                y += experts(x * weights[:, one], ids[:, one], np.ones_like(weights[:, one]))
        else:
            y = experts(x, ids, weights)
    identity = np.where(ids >= experts.num_experts, weights, 0).sum(axis=1, keepdims=True)
    return y + identity * x if drawn.size.identities else y
