"""Dimensions of published MoE models: what benchmarks and estimates take by name.

The rows of ``zoo.json`` are facts from the models' published configurations.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moeaccel.errors import MoeAccelError


class UnknownModel(MoeAccelError, ValueError):
    """A model that the zoo does not hold."""


@dataclass(frozen=True)
class Model:
    """One published model.

    Parameters
    ----------
    name, hf_id : :class:`str`
        Common name; Hugging Face repository.
    n_layers, n_moe_layers : :class:`int`
    d_model, d_expert : :class:`int`
        Width of the residual stream and of one routed expert.
    n_experts, top_k, n_shared : :class:`int`
    router_flavour, act, ffn : :class:`str`
        How it routes; activation; ``glu`` (gate, up, down) or another shape.
    expert_bias : :class:`bool`
    native_dtype, tf_class : :class:`str`
    tf_pluggable : :class:`bool`
        Whether transformers honours ``experts_implementation`` for it.
    """

    name: str
    hf_id: str | None
    n_layers: int
    n_moe_layers: int
    d_model: int
    d_expert: int
    n_experts: int
    top_k: int
    n_shared: int | None
    router_flavour: str
    act: str
    ffn: str
    expert_bias: bool
    native_dtype: str
    tf_class: str | None
    tf_pluggable: bool | None

    @property
    def key(self) -> str:
        """Name for the command line: lower case, words joined by dashes."""
        return _key(self.name)

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert (gate, up and down)."""
        return 3 * self.d_model * self.d_expert


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@cache
def models() -> dict[str, Model]:
    """Return every model by key."""
    rows = json.loads((Path(__file__).parent / "zoo.json").read_text(encoding="utf-8"))
    return {model.key: model for model in (Model(**row) for row in rows)}


def model(name: str) -> Model:
    """Return the model of that name, or of a Hugging Face repository.

    Raises
    ------
    UnknownModel
        With the nearest names.
    """
    import difflib

    found = models().get(_key(name)) or next(
        (m for m in models().values() if m.hf_id == name), None
    )
    if found is None:
        near = difflib.get_close_matches(_key(name), models(), 3, 0.3)
        raise UnknownModel(f"model must be one of `moeaccel models`, not {name!r}" + (
            f"; did you mean {', '.join(near)}?" if near else ""))
    return found
