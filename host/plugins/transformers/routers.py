"""Which of the device's routers a router of a model is, found out by values.

Settings of published models are tried (:func:`moeaccel.zoo.routers.kinds`), those of the model's
own class first, in float64, on logits and tables that were drawn: which table is added to logits
and which to what is compared, which groups there are, and what the weights are multiplied by.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from moeaccel.golden.router_reference import route_float, scores_float
from moeaccel.host.errors import UnsupportedExperts
from moeaccel.router.choices import GROUPS_MAX, GroupScore
from moeaccel.router.settings import RouterError, RouterSettings
from moeaccel.zoo.routers import kinds

__all__ = ["Observed", "Recognised", "recognise"]

_RELATIVE = 1e-4
"""Between what float32 makes of a weight and what distinguishes two formulas."""

_LEAST_SUM = 2.0**-30
"""Of the scores of the chosen, where weights are compared: the device has scores to 2**-36."""

_STRAYS = 0.01
"""Share of tokens that float32 may send elsewhere."""


@dataclass(frozen=True)
class Observed:
    """What a router has done with tokens.

    Parameters
    ----------
    logits : float64 tensor, (T, E)
        The product of its weight with x, without a bias.
    ids, weights : int64, float64 tensor, (T, k)
    tables : mapping of str to float64 tensor, (E,)
        What it may have added, by name.
    plain : :class:`int`
        Of how many tokens, the first ones, the choice is compared; others have logits so far apart
        that float32 has ties.
    """

    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    tables: Mapping[str, torch.Tensor]
    plain: int


@dataclass(frozen=True)
class Recognised:
    """A router in the device's settings, and the names of its tables.

    Parameters
    ----------
    settings : :class:`RouterSettings`
    bias, selection_bias : :class:`str`, optional
    """

    settings: RouterSettings
    bias: str | None
    selection_bias: str | None


def recognise(seen: Observed, experts_class: str) -> Recognised:
    """Return which router it is.

    Parameters
    ----------
    seen : :class:`Observed`
    experts_class : :class:`str`
        Of the layer, in transformers.

    Raises
    ------
    UnsupportedExperts
        If it is none of them.
    """
    experts, top_k = seen.logits.shape[1], seen.ids.shape[1]
    scales = []
    for kind in kinds(experts_class):
        try:
            settings = RouterSettings(experts=experts, top_k=top_k, **kind)
        except RouterError:
            continue  # a sparsemixer of another top-k
        for bias, selection_bias in _roles(seen.tables):
            if settings.mixer is not None and selection_bias is not None:
                continue
            scale = _scale(seen, settings, bias)
            if scale is None:
                continue
            scales.append(settings)
            for grouped in _grouped(settings):
                if _chooses(seen, grouped, bias, selection_bias):
                    return Recognised(replace(grouped, scale=scale), bias, selection_bias)
    what = ("weighs experts as one of those but chooses others" if scales else
            "gives experts other weights")
    raise UnsupportedExperts(f"a router of the device's flavours, but its own {what}")


def _roles(tables: Mapping[str, torch.Tensor]) -> list[tuple[str | None, str | None]]:
    """Return who may be the bias, and who that of the selection; where most have a part first."""
    names: list[str | None] = [*tables, None]
    return sorted(((bias, other) for bias in names for other in names
                   if bias != other or bias is None), key=lambda pair: pair.count(None))


def _table(seen: Observed, name: str | None) -> torch.Tensor | None:
    return None if name is None else seen.tables[name]


def _scale(seen: Observed, settings: RouterSettings, bias: str | None) -> float | None:
    """Return what the settings' weights of the chosen are to be multiplied by, if they are then
    those that were seen."""
    table = _table(seen, bias)
    if settings.mixer is not None:
        expected = route_float(seen.logits, settings, bias=table)
        order, own = (ids.argsort(dim=1) for ids in (expected[0], seen.ids))
        expected_weights = expected[1].gather(1, order)
        weights = seen.weights.gather(1, own)
        there = (expected[0].gather(1, order) == seen.ids.gather(1, own)).all(dim=1)
    else:
        s = seen.logits if table is None else seen.logits + table
        there = scores_float(s, settings).gather(1, seen.ids).sum(dim=1).abs() >= _LEAST_SUM
        expected_weights = route_float(seen.logits, settings, bias=table, ids=seen.ids)[1]
        weights = seen.weights
    expected_weights, weights = expected_weights[there], weights[there]
    total = expected_weights.square().sum()
    if len(weights) < len(seen.logits) / 2 or not total > 0:
        return None
    scale = float((weights * expected_weights).sum() / total)
    error = (weights - scale * expected_weights).abs()
    most = _RELATIVE * (scale * expected_weights).abs() + _RELATIVE**2 * abs(scale)
    wrong = (error > most).any(dim=1).double().mean()  # a sparsemixer's edge may be a stray
    if wrong > (_STRAYS if settings.mixer is not None else 0):
        return None
    return float(f"{scale:.6g}")


def _grouped(settings: RouterSettings) -> Iterator[RouterSettings]:
    """Yield settings without groups, and with all that there may be."""
    yield settings
    if settings.mixer is not None:
        return
    for groups in range(2, min(GROUPS_MAX, settings.experts) + 1):
        if settings.experts % groups:
            continue
        for keep, score in itertools.product(range(1, groups), GroupScore):
            try:
                yield replace(settings, groups=groups, keep_groups=keep, group_score=score.key)
            except RouterError:
                continue


def _chooses(seen: Observed, settings: RouterSettings, bias: str | None,
             selection_bias: str | None) -> bool:
    """Return whether settings choose what was seen."""
    ids, _ = route_float(seen.logits[: seen.plain], settings, bias=_table(seen, bias),
                         selection_bias=_table(seen, selection_bias))
    other = (_sorted(ids) != _sorted(seen.ids[: seen.plain])).any(dim=1)
    return float(other.double().mean()) <= _STRAYS


def _sorted(ids: torch.Tensor) -> torch.Tensor:
    return ids.sort(dim=1).values
