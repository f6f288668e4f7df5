"""Routers of published models: settings by the flavours' keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeaccel.router.settings import RouterSettings

__all__ = ["FLAVOURS", "Flavour"]


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """A family of routers.

    Parameters
    ----------
    key, text : :class:`str`
        Name in the zoo; formula, and one who uses it.
    settings : mapping
        Settings but for experts and top_k; what is a model's own, such as a scale, is that of the
        model named in the text.
    selection_bias : :class:`bool`
        Whether its models have one.
    logits_from : :class:`str`, optional
        Where the logits come from, if not from one product with x: they are computed elsewhere, and
        the device routes from them.
    ids_from : :class:`str`, optional
        Where some layers have their ids from, if not from the scores.
    """

    key: str
    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    selection_bias: bool = False
    logits_from: str | None = None
    ids_from: str | None = None

    def router(self, experts: int, top_k: int, **changes: Any) -> RouterSettings:
        """Return a router of this flavour.

        Raises
        ------
        RouterError
            If it cannot have so many experts or groups.
        """
        return RouterSettings(**{"experts": experts, "top_k": top_k, **self.settings, **changes})


_SIGMOID_SUM: dict[str, Any] = {"score": "sigmoid", "renormalize": "sum_eps", "epsilon": 1e-20}

FLAVOURS: dict[str, Flavour] = {f.key: f for f in (
    Flavour(key="R1", text="softmax, top-k, divided by the sum (Mixtral, Qwen3-MoE)",
            settings={"renormalize": "sum"}),
    Flavour(key="R1b", text="softmax, chosen with a bias, divided by the clamped sum (ERNIE-4.5)",
            settings={"renormalize": "clamp", "epsilon": 1e-12}, selection_bias=True),
    Flavour(key="R1g", text="softmax, groups by their top two, divided by the sum "
                            "(Mistral-Small-4)",
            settings={"renormalize": "sum_eps", "epsilon": 1e-20, "group_score": "top2_sum"}),
    Flavour(key="R2", text="softmax, top-k (OLMoE, DeepSeekMoE-16B)"),
    Flavour(key="R3", text="top-k of the logits, softmax of those (gpt-oss, Granite)",
            settings={"score": "identity", "renormalize": "softmax_top_k"}),
    Flavour(key="R4", text="softmax, groups by their largest, times a scale (DeepSeek-V2)",
            settings={"groups": 8, "keep_groups": 3, "scale": 16.0}),
    Flavour(key="R5", text="sigmoid, chosen with a bias, groups by their top two, divided by the "
                           "sum, times a scale (DeepSeek-V3)",
            settings={**_SIGMOID_SUM, "groups": 8, "keep_groups": 4, "group_score": "top2_sum",
                      "scale": 2.5}, selection_bias=True),
    Flavour(key="R5s", text="R5 without groups (Kimi-K2, GLM-4.5)",
            settings={**_SIGMOID_SUM, "scale": 2.5}, selection_bias=True),
    Flavour(key="R6", text="sigmoid, divided by the sum (Flint)",
            settings={"score": "sigmoid", "renormalize": "sum"}),
    Flavour(key="R6L4", text="sigmoid of the largest, on x (Llama 4)",
            settings={"score": "sigmoid", "weight_on": "input"}),
    Flavour(key="R7", text="sqrt-softplus, chosen with a bias, divided by the sum, times a scale "
                           "(DeepSeek-V4)",
            settings={"score": "sqrt_softplus", "renormalize": "sum_eps", "epsilon": 1e-20,
                      "scale": 1.5}, selection_bias=True,
            ids_from="a table by token, in the first layers"),
    Flavour(key="R8", text="softmax, chosen with a bias, times a scale (LongCat-Flash)",
            settings={"scale": 6.0}, selection_bias=True),
    Flavour(key="R9", text="sparsemixer (Phi-3.5-MoE)", settings={"mixer": 0.02}),
    Flavour(key="R10", text="R1 of logits that an attention among experts makes (Yuan2-M32)",
            settings={"renormalize": "sum"}, logits_from="an attention among the experts"),
    Flavour(key="R11s", text="softmax, top-1, with a capacity (Switch)"),
    Flavour(key="R11n", text="softmax, divided by the clamped sum of those not dropped (NLLB)",
            settings={"renormalize": "clamp", "epsilon": 2.0**-23}),
    Flavour(key="R11o", text="softmax, top-2, with a capacity (OpenMoE)"),
)}
"""Every flavour that the device has, by its key."""
