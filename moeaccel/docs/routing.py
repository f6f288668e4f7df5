"""What routers may be, and those of published models."""

from __future__ import annotations

from moeaccel.docs.markdown import table
from moeaccel.router.choices import (
    CapacityOrder,
    Choice,
    Gates,
    GroupScore,
    Renormalize,
    Score,
    WeightOn,
)
from moeaccel.router.flavours import FLAVOURS

__all__ = ["flavours", "router_choices"]

_SETTINGS: dict[str, type[Choice]] = {
    "score": Score, "renormalize": Renormalize, "group_score": GroupScore, "weight_on": WeightOn,
    "capacity_order": CapacityOrder, "gates": Gates}


def router_choices() -> list[str]:
    """Return the settings that are one of several."""
    return table(("setting", "code", "name", "meaning"), [
        (f"`{name}`", str(int(choice)), f"`{choice.key}`", choice.text)
        for name, choices in _SETTINGS.items() for choice in choices])


def flavours() -> list[str]:
    """Return the routers of published models."""
    def settings(key: str) -> str:
        named = [f"`{name}={value!r}`" for name, value in FLAVOURS[key].settings.items()]
        if FLAVOURS[key].selection_bias:
            named.append("a selection bias")
        sources = {"logits": FLAVOURS[key].logits_from, "ids": FLAVOURS[key].ids_from}
        named += [f"{what} from {source}" for what, source in sources.items() if source]
        return ", ".join(named)

    return table(("flavour", "router", "settings"),
                 [(f"`{f.key}`", f.text, settings(f.key)) for f in FLAVOURS.values()])
