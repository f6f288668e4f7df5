"""Routers of the zoo in the settings of the device's."""

from __future__ import annotations

from moeaccel.router.settings import RouterError, RouterSettings
from moeaccel.zoo.schema import Model

__all__ = ["settings_of"]


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
