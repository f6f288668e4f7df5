"""Published MoE models: what benchmarks and estimates take by name, how they route, what their
experts are.

``models.json`` is the only home of these facts; :mod:`moeaccel.zoo.schema` says what its fields
mean. What the device can do of them is asked of the driver (:mod:`moeaccel.host.zoo`).
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path

from moeaccel.errors import MoeAccelError
from moeaccel.zoo.schema import ExpertKind, Model, RouterKind, Shared, key_of, parse

__all__ = ["ExpertKind", "Model", "RouterKind", "Shared", "UnknownModel", "model", "models"]


class UnknownModel(MoeAccelError, ValueError):
    """A model that the zoo does not hold."""


@cache
def models() -> dict[str, Model]:
    """Return every model by key."""
    rows = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))
    return {model.key: model for model in map(parse, rows)}


def model(name: str) -> Model:
    """Return the model of that name, or of a Hugging Face repository.

    Raises
    ------
    UnknownModel
        With the nearest names.
    """
    found = models().get(key_of(name)) or next(
        (m for m in models().values() if m.hf_id == name), None
    )
    if found is None:
        near = difflib.get_close_matches(key_of(name), models(), 3, 0.3)
        raise UnknownModel(f"model must be one of `moeaccel models`, not {name!r}" + (
            f"; did you mean {', '.join(near)}?" if near else ""))
    return found
