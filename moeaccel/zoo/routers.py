"""Routers of the zoo in the settings of the device's."""

from __future__ import annotations

from typing import Any

from moeaccel.router.settings import RouterError, RouterSettings
from moeaccel.zoo import models
from moeaccel.zoo.schema import Model

__all__ = ["kinds", "settings_of"]


def kinds(experts_class: str | None = None) -> list[dict[str, Any]]:
    """Return the settings of every router that a published model has, each once, but for numbers
    of its own: experts, top-k, scale and groups.

    Those whose logits come from a product with x alone, and that drop nothing. Behind them the
    same with scores that are not renormalised, and with such that are, as configurations of
    some models say.

    Parameters
    ----------
    experts_class : :class:`str`, optional
        Class of the experts in transformers: routers of such models come first.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    routers = [model.router for model in sorted(
        models().values(), key=lambda model: experts_class not in (model.tf_class or "").split())]
    routers = [kind for kind in routers if kind.logits == "linear" and kind.capacity is None
               and kind.weight_on == "output" and not kind.sinks]
    for more in ({}, {"renormalize": "none", "epsilon": None},
                 {"renormalize": "sum", "epsilon": None}):
        for kind in routers:
            if more and (kind.mixer is not None or kind.score == "identity"):
                continue
            settings = {
                "score": kind.score, "renormalize": kind.renormalize, "epsilon": kind.epsilon,
                "bias_logits": kind.selection_bias == "logits", "mixer": kind.mixer} | more
            settings["epsilon"] = settings["epsilon"] or 0.0
            found.setdefault(tuple(settings.values()), settings)
    return list(found.values())


def settings_of(model: Model, *, experts: int, top_k: int, tokens: int = 1) -> RouterSettings:
    """Return a model's router for that many experts.

    Parameters
    ----------
    model : :class:`Model`
    experts, top_k : :class:`int`
        Experts with identities, but without sinks, which are no choice: their gates are.
    tokens : :class:`int`
        Of the call, on which a capacity depends.

    Raises
    ------
    RouterError
        Naming the flavour, where the device's settings cannot say what the router does.
    """
    kind = model.router
    if kind.logits == "product_keys":
        raise RouterError(f"router must have a logit for each expert, but {kind.flavour} looks "
                          "experts up by product keys")
    return RouterSettings(
        experts=experts, top_k=top_k, score=kind.score, renormalize=kind.renormalize,
        epsilon=kind.epsilon or 0.0, scale=1.0 if kind.scale is None else kind.scale,
        groups=kind.groups, keep_groups=kind.keep_groups, group_score=kind.group_score,
        bias_logits=kind.selection_bias == "logits", weight_on=kind.weight_on, mixer=kind.mixer,
        gates="sum" if kind.sinks else "none", shared=kind.sinks,
        capacity=kind.capacity and kind.capacity(tokens, experts, top_k),
        capacity_order=kind.capacity.order if kind.capacity else "rank")
