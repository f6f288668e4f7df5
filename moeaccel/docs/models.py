"""The zoo: its models, and the flavours of their routers."""

from __future__ import annotations

from moeaccel.docs.markdown import table
from moeaccel.zoo import Model, models
from moeaccel.zoo.schema import FLAVOURS, FORMS, ORIGINS

__all__ = ["zoo_forms", "zoo_routers", "zoo"]


def zoo() -> list[str]:
    """Return every model with what its experts and its router are."""
    return table(
        ("model", "layers with experts", "d_model", "experts", "top-k", "expert", "router",
         "shared", "native type", "sizes from"), [
            (", ".join(f"`{key}`" for key in (m.key, *m.aliases)) + (" *" if m.survey else ""),
             _text(m.moe_layers), _text(m.d_model),
             _experts(m), _text(m.top_k), _expert(m), f"`{m.router.text}`", _shared(m),
             m.native_dtype, m.confidence)
            for m in models().values()])


def _text(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _experts(m: Model) -> str:
    more = m.router.identity_experts
    return _text(m.n_experts) + (f" and {more} identities" if more else "")


def _expert(m: Model) -> str:
    widths = ", ".join(f"{d_in:,} x {d_expert:,}" for d_in, d_expert in m.expert_widths) or "?"
    return f"{widths}, {m.expert.text}"


def _shared(m: Model) -> str:
    if m.shared is None:
        return "?"
    if not m.shared.count:
        return f"dense MLP of {m.dense:,}" if m.dense else ""
    gate = ", gated" if m.shared.gate else ""
    return f"{m.shared.count}, {_text(m.shared.width)}{gate}"


def zoo_routers() -> list[str]:
    """Return every flavour of routers, and who has it."""
    return table(("flavour", "what", "models"), [
        (f"`{key}`", text, ", ".join(m.key for m in models().values() if m.router.flavour == key))
        for key, text in FLAVOURS.items()])


def zoo_forms() -> list[str]:
    """Return forms of experts, and where sizes are from."""
    return [*table(("form", "matrices", "expert"), [
        (f"`{form}`", str(matrices), f"`{text}`") for form, (matrices, text) in FORMS.items()]),
        *table(("sizes from", "what"), [(f"`{key}`", text) for key, text in ORIGINS.items()])]
