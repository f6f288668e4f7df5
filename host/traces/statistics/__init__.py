"""What is known of routes, and what a trace has of it.

`measure` computes every statistic; `compare` sets them beside those that were published for a model
(``real.json``: for each model, by source, name of the statistic and value).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moeaccel.host.traces.statistics import caches, popularity, prediction, reuse, weights
from moeaccel.host.traces.statistics.sample import Sample
from moeaccel.host.traces.trace import RoutingTrace

__all__ = ["Comparison", "compare", "measure", "real"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One statistic.

    Parameters
    ----------
    statistic : :class:`str`
    real, found : :class:`float`, optional
        Of the published model; of the trace. None where there is no such value.
    source : :class:`str`
        Of the real value.
    """

    statistic: str
    real: float | None
    found: float | None
    source: str = ""

    @property
    def difference(self) -> float | None:
        """Found minus real."""
        if self.real is None or self.found is None:
            return None
        return self.found - self.real


@cache
def real() -> dict[str, dict[str, dict[str, float]]]:
    """Return what was published: model, source, statistic, value."""
    path = Path(__file__).with_name("real.json")
    return json.loads(path.read_text(encoding="utf-8"))


def measure(trace: RoutingTrace, *, slots: tuple[int, ...] = (), seed: int = 0,
            progress: Callable[[str], None] | None = None) -> dict[str, float]:
    """Return every statistic that the trace is long enough for, by name.

    Parameters
    ----------
    trace : :class:`RoutingTrace`
    slots : :class:`tuple` of :class:`int`
        Sizes of caches beside the usual ones.
    seed : :class:`int`
        Of batches drawn at random.
    progress : callable, optional
        Gets a line a group, and within the long one now and then.
    """
    say = progress if progress is not None else lambda _: None
    sample = Sample(trace, seed=seed)
    found: dict[str, float] = {}
    for name, group in {
        "popularity": popularity.measure, "reuse": reuse.measure, "weights": weights.measure,
        "prediction": lambda sample: prediction.measure(
            sample, progress=lambda text: say(f"prediction: {text}")),
        "caches": lambda sample: caches.measure(
            sample, slots=slots, progress=lambda text: say(f"caches: {text}")),
    }.items():
        say(name)
        found |= group(sample)
    return found


def compare(trace: RoutingTrace, model: str, *, seed: int = 0,
            progress: Callable[[str], None] | None = None) -> list[Comparison]:
    """Return what is known of a model beside what a trace has, then what only the trace has.

    Parameters
    ----------
    trace : :class:`RoutingTrace`
    model : :class:`str`
        Key in :func:`real`; another one has nothing known.
    seed, progress
        See :func:`measure`.
    """
    known = real().get(model, {})
    slots = {int(size) for values in known.values() for name in values
             if name.startswith("cache/") for size in re.findall(r"(\d+) slots", name)}
    found = measure(trace, slots=tuple(sorted(slots)), seed=seed, progress=progress)
    rows = [Comparison(statistic=name, real=value, found=found.get(name), source=source)
            for source, values in known.items() for name, value in values.items()]
    listed = {row.statistic for row in rows}
    return rows + [Comparison(statistic=name, real=None, found=value)
                   for name, value in found.items() if name not in listed]
