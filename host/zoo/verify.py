"""Models of the zoo on the device: float, golden model and RTL side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import MoeAccelError
from moeaccel.golden.router import route
from moeaccel.host.device import Device
from moeaccel.host.routing import Router
from moeaccel.host.zoo.cases import Case, case
from moeaccel.host.zoo.support import (
    expert_options,
    expert_refusal,
    known,
    routing_refusal,
)
from moeaccel.router.settings import RouterError
from moeaccel.zoo.schema import Model

__all__ = ["MEMORY_BYTES", "RELATIVE_ERROR", "RESOLUTION", "Verdict", "verify", "wrong"]

MEMORY_BYTES = 1 << 28
"""Of a device for reduced sizes."""

RELATIVE_ERROR = 1e-4
"""Most that y of 16-bit activations may be off the float reference, relative to all of y: above
what rounding gives, below what any mistake does."""

RESOLUTION = 2.0**-17
"""Most that experts chosen instead of each other may differ in what the choice compares: twice the
device's resolution, since the float router has its own."""

_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """What came out for a model.

    Parameters
    ----------
    name : :class:`str`
        Key of the model.
    ok : :class:`bool`
        The device routes and has the experts, and everything is as it should be.
    router, expert : :class:`str`
        What they are.
    selection_differences : :class:`int`, optional
        Tokens for which the device's integer router chose other experts than the float router; None
        where it has no such router.
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
    config, problems = golden.config, []
    try:
        drawn = case(model, config, seed=seed)
    except MoeAccelError as failure:
        problems += filter(None, (expert_refusal(golden, model.expert),
                                  routing_refusal(config, model), f"reference: {failure}"))
        return replace(verdict, reason="; ".join(problems))
    size = drawn.size
    refusal = routing_refusal(config, drawn.model, (size.experts + size.identities, size.top_k))
    problems += [refusal] if refusal else []
    if not refusal and _is_whole(drawn):
        return _whole(drawn, golden, rtl, verdict)
    reference = drawn.routes.ids.numpy(), drawn.routes.weights.numpy()
    taken = reference
    try:
        routed = _route(drawn)
        # Experts have the device's weights; where it chose others, those of the float router.
        taken = [np.where(routed.same[:, None], own, float_router) for own, float_router in zip(
            (routed.ids, routed.weights), reference, strict=True)]
        if not refusal:
            problems += _devices_agree(drawn, routed, golden, rtl)
        others = int((~routed.same).sum())
        verdict = replace(verdict, selection_differences=others)
        if others and not _ties(drawn, routed):
            problems.append(_routed_otherwise(others, size.tokens))
    except RouterError:
        assert problems  # said already
    try:
        expected, found = (_run(device, drawn, *taken) for device in (golden, rtl))
        exact = drawn.y
        error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        verdict = replace(verdict, relative_error=error)
        differ = int((expected.view(np.uint32) != found.view(np.uint32)).sum())
        problems += wrong("experts", differ, error)
    except MoeAccelError as failure:
        problems.insert(0, f"experts: {model.expert.text}: {failure}")
    return replace(verdict, ok=not problems, reason="; ".join(problems))


def _is_whole(drawn: Case) -> bool:
    """Return whether the device does all of the layer: logits, too, and nothing but experts."""
    return drawn.model.router.logits == "linear" and not drawn.size.identities


def _whole(drawn: Case, golden: Device, rtl: Device, verdict: Verdict) -> Verdict:
    """Return the verdict of a layer that goes from x to y on the device."""
    problems: list[str] = []
    router = Router(weight=drawn.router.weight.numpy(), **asdict(drawn.settings), **_tables(drawn))
    options, down = _options(drawn), _down(drawn)
    experts = drawn.size.experts
    shared = list(zip(drawn.gate_up[experts:], down[experts:], strict=True))  # always on
    made = []
    try:
        for device in (golden, rtl):
            known(device, options)
            with device.load_moe(
                    router, drawn.gate_up[:experts], down[:experts], shared=shared or None,
                    weight_format="mxint8", quantiser="amax", **options) as moe:
                made.append((*moe.route(drawn.x), moe(drawn.x)))
    except MoeAccelError as failure:
        return replace(verdict, reason=f"experts: {drawn.model.expert.text}: {failure}")
    (ids, weights, expected), (rtl_ids, rtl_weights, found) = made
    other = (ids != rtl_ids) | (weights.view(np.uint32) != rtl_weights.view(np.uint32))
    if other.any():
        problems.append(f"router: the RTL routes {int(other.any(axis=1).sum())} of {len(ids)} "
                        "tokens otherwise than the golden model")
    reference = drawn.routes.ids.numpy()[:, : drawn.size.top_k]
    same = np.sort(ids, axis=1) == np.sort(reference, axis=1)
    routed = _Routed(ids, weights, same.all(axis=1))
    others = int((~routed.same).sum())
    if others and not _ties(drawn, routed):
        problems.append(_routed_otherwise(others, len(ids)))
    y, exact = found[routed.same], drawn.y[routed.same]
    error = float(np.linalg.norm(y - exact) / np.linalg.norm(exact)) if len(y) else np.inf
    differ = int((expected.view(np.uint32) != found.view(np.uint32)).sum())
    problems += wrong("layer", differ, error)
    return replace(verdict, ok=not problems, selection_differences=others, relative_error=error,
                   reason="; ".join(problems))


def _routed_otherwise(others: int, tokens: int) -> str:
    return (f"router: {others} of {tokens} tokens are routed otherwise than by the float router, "
            "and not for a tie")


@dataclass(frozen=True)
class _Routed:
    """Where tokens went, (T, K), and which went where the float router sends them, (T,)."""

    ids: NDArray[np.integer]
    weights: _Floats
    same: NDArray[np.bool_]


def _route(drawn: Case) -> _Routed:
    """Return the routes of the integer router.

    Raises
    ------
    RouterError
        If it has no such router.
    """
    found = route(drawn.logits, drawn.settings, **_tables(drawn))
    same = np.sort(found.ids, axis=1) == np.sort(drawn.routes.ids.numpy(), axis=1)
    return _Routed(found.ids, found.weights, same.all(axis=1))


def _tables(drawn: Case) -> dict[str, Any]:
    """Return what is added to logits, and to what is compared."""
    tables = {"bias": drawn.router.bias, "selection_bias": drawn.router.selection_bias}
    experts = drawn.size.experts + drawn.size.identities  # sinks are no choice
    return {name: None if table is None else table.numpy()[:experts]
            for name, table in tables.items()}


def _devices_agree(drawn: Case, routed: _Routed, golden: Device, rtl: Device) -> list[str]:
    """Return in what devices route otherwise than the integer router, to the bit."""
    router = Router(**asdict(drawn.settings), **_tables(drawn))
    problems = []
    for name, device in (("golden device", golden), ("RTL", rtl)):
        ids, weights = device.route(router, drawn.logits)
        other = (ids != routed.ids) | (weights.view(np.uint32) != routed.weights.view(np.uint32))
        if other.any():
            problems.append(f"router: the {name} routes {int(other.any(axis=1).sum())} of "
                            f"{len(ids)} tokens otherwise than the golden model")
    return problems


def _ties(drawn: Case, routed: _Routed) -> bool:
    """Return whether what was compared is as good as equal wherever tokens went elsewhere."""
    compared = drawn.routes.compared.numpy()
    reference = drawn.routes.ids.numpy()[:, : routed.ids.shape[1]]  # without sinks
    for token in np.nonzero(~routed.same)[0]:
        either = set(routed.ids[token].tolist()) ^ set(reference[token].tolist())
        values = compared[token, [e for e in either if e >= 0]]
        if not (len(values) and values.max() - values.min() <= RESOLUTION):
            return False
    return True


def wrong(what: str, differ: int, error: float) -> list[str]:
    """Return what is wrong with y: elements that differ between devices, and its error."""
    problems = []
    if differ:
        problems.append(f"{what}: {differ} elements of y differ between golden model and RTL")
    if not error <= RELATIVE_ERROR:
        problems.append(f"{what}: relative error must be at most {RELATIVE_ERROR:g}, not "
                        f"{error:.3g}")
    return problems


def _options(drawn: Case) -> dict[str, Any]:
    """Return the arguments of ``load_experts`` that say what experts are, with their biases."""
    options = expert_options(drawn.model.expert)
    scale = drawn.router.expert_scale
    for name in ("gate_up_bias", "down_bias"):
        if name in options:
            options[name] = getattr(drawn, name)
    if scale is not None and "down_bias" in options:
        options["down_bias"] = options["down_bias"] * scale.numpy()[:, None]
    return options


def _down(drawn: Case) -> _Floats:
    """Return the last matrices; an expert's own factor is one of its last matrix."""
    scale = drawn.router.expert_scale
    return drawn.down if scale is None else drawn.down * scale.numpy()[:, None, None]


def _run(device: Device, drawn: Case, ids: NDArray[np.integer], weights: _Floats) -> _Floats:
    """Return y, (T, H); what no expert computes the host does, as an engine would."""
    options, x, down = _options(drawn), drawn.x, _down(drawn)
    known(device, options)
    with device.load_experts(drawn.gate_up, down, weight_format="mxint8", quantiser="amax",
                             **options) as experts:
        if drawn.model.router.weight_on == "input":
            y = np.zeros_like(x)
            for column in range(ids.shape[1]):
                one = slice(column, column + 1)
                y += experts(x * weights[:, one], ids[:, one], np.ones_like(weights[:, one]))
        else:
            y = experts(x, ids, weights)
    identity = np.where(ids >= len(down), weights, 0).sum(axis=1, keepdims=True)
    return y + identity * x if drawn.size.identities else y
