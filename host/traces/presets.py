"""Generated traces of published models.

``presets.json`` has the shape of each model and the locality that was fitted to what is known of
its routes; ``basis`` says to what.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moeaccel.host.traces.errors import InvalidTrace, UnknownPreset
from moeaccel.host.traces.generator import Locality, generate_requests
from moeaccel.host.traces.trace import RoutingTrace

__all__ = ["Preset", "generate", "preset", "presets"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model whose routes can be generated.

    Parameters
    ----------
    key, name : :class:`str`
        For the command line; in full.
    layers : :class:`tuple` of :class:`int`
        Number in the model of each layer with routed experts.
    n_experts, top_k : :class:`int`
    renormalize : :class:`bool`
        Whether the weights of a token sum to 1.
    locality : :class:`Locality`
    basis : :class:`str`
        What the locality was fitted to.
    """

    key: str
    name: str
    layers: tuple[int, ...]
    n_experts: int
    top_k: int
    renormalize: bool
    locality: Locality
    basis: str


@cache
def presets() -> dict[str, Preset]:
    """Return all presets by key."""
    rows: list[dict[str, Any]] = json.loads(
        Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
    return {row["key"]: Preset(**(row | {"layers": tuple(range(*row["layers"])),
                                         "locality": Locality(**row["locality"])}))
            for row in rows}


def preset(key: str) -> Preset:
    """Return a preset.

    Raises
    ------
    UnknownPreset
        If there is none of that name.
    """
    found = presets().get(key)
    if found is None:
        near = difflib.get_close_matches(key, presets(), 1, 0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownPreset(f"preset must be one of {', '.join(presets())}, not {key!r}{hint}")
    return found


def generate(model: str | Preset, *, requests: int, tokens: int | Sequence[int], prompt: int = 0,
             batch: int = 1, seed: int = 0, model_seed: int = 0,
             progress: Callable[[int], None] | None = None) -> RoutingTrace:
    """Return a trace with the locality of a model.

    Parameters
    ----------
    model : :class:`str` or :class:`Preset`
    requests : :class:`int`
    tokens : :class:`int`, or one for each request
        Prompt included.
    prompt : :class:`int`
        First tokens of each request that go in one step.
    batch : :class:`int`
        Requests at a time, see :meth:`RoutingTrace.rebatch`.
    seed, model_seed : :class:`int`
        Of the text; of the stand-in for the model's weights. The same model with another text is
        the same `model_seed` with another `seed`.
    progress : callable, optional
        Gets the number of each request, before it is made.

    Raises
    ------
    UnknownPreset
        If there is no such preset.
    InvalidTrace
        If a number is out of range.
    """
    chosen = preset(model) if isinstance(model, str) else model
    lengths = [tokens] * requests if isinstance(tokens, int) else list(tokens)
    if requests < 1 or len(lengths) != requests:
        raise InvalidTrace(f"requests must be at least 1 and each have its tokens, not {requests} "
                           f"with {len(lengths)} lengths")
    if prompt < 0:
        raise InvalidTrace(f"prompt must be at least 0 tokens, not {prompt}")
    routes = generate_requests(
        chosen.locality, n_layers=len(chosen.layers), n_experts=chosen.n_experts,
        top_k=chosen.top_k, lengths=lengths, seed=seed, model_seed=model_seed,
        renormalize=chosen.renormalize, progress=progress)
    trace = RoutingTrace.of_requests(
        routes, prompts=[prompt] * requests, n_experts=chosen.n_experts, layers=chosen.layers,
        model=chosen.name, source=f"generated, preset {chosen.key}, seed {seed}, "
        f"model seed {model_seed}")
    return trace if batch == 1 else trace.rebatch(batch, prompt=prompt)
