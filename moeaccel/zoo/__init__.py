"""Published MoE models: what benchmarks and estimates take by name, how they route, what their
experts are.

``models.json`` is the only home of these facts; :mod:`moeaccel.zoo.schema` says what its fields
mean. What the device can do of them is asked of the driver (:mod:`moeaccel.host.zoo`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from moeaccel.errors import MoeAccelError
from moeaccel.zoo.schema import ExpertKind, Model, RouterKind, Shared, key_of, parse

__all__ = ["ExpertKind", "Model", "RouterKind", "Shared", "UnknownModel", "matching", "model",
           "models", "of_survey"]


class UnknownModel(MoeAccelError, ValueError):
    """A model that the zoo does not hold."""


@cache
def models() -> dict[str, Model]:
    """Return every model by key."""
    rows = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))
    return {model.key: model for model in map(parse, rows)}


def model(name: str) -> Model:
    """Return the model of that name, an alias or a Hugging Face repository.

    Raises
    ------
    UnknownModel
        With the nearest names.
    """
    key = key_of(name)
    found = models().get(key) or next(
        (m for m in models().values() if key in m.aliases or m.hf_id == name), None)
    if found is None:
        raise _unknown(name)
    return found


def matching(part: str) -> list[Model]:
    """Return the models that have it in a name: their own, their key, an alias, their repository.

    Raises
    ------
    UnknownModel
        If there is none, with the nearest names.
    """
    low = part.lower()
    found = [m for m in models().values()
             if any(low in name.lower() for name in (m.name, m.key, *m.aliases, m.hf_id or ""))]
    if not found:
        raise _unknown(part)
    return found


def _unknown(name: str) -> UnknownModel:
    names = [*models(), *(alias for m in models().values() for alias in m.aliases)]
    near = difflib.get_close_matches(key_of(name), names, 3, 0.3)
    return UnknownModel(f"model must be one of `moeaccel models`, not {name!r}" + (
        f"; did you mean {', '.join(near)}?" if near else ""))


def of_survey(chosen: Sequence[Model]) -> list[Model]:
    """Return those of the survey.

    Raises
    ------
    UnknownModel
        If none is.
    """
    found = [m for m in chosen if m.survey]
    if not found:
        rows = ", ".join(m.key for m in models().values() if m.survey)
        raise UnknownModel(f"model must be one of the survey's, {rows}, not "
                           f"{', '.join(m.key for m in chosen)}")
    return found
