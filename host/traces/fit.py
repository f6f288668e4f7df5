"""Find the locality that gives wanted hit rates: how the presets were made.

``python -m moeaccel.host.traces.fit NAME`` fits a preset again, from where ``presets.json`` has it,
to its model's published LRU and LFU columns (``real.json`` of the statistics), and writes its
locality as a line of JSON; that takes minutes. Fields that were fitted to other figures (``basis``
says to which) are not moved, nor is popularity where it is one of them.

The unknowns are the three shares of a token's state, the memory of the phrase and the spread of
popularity; what is fitted are the LRU and LFU columns of :mod:`moeaccel.host.traces.segments`. The
search is Gauss-Newton with damping on one set of texts, so that the same random numbers stand
behind every step and differences are smooth enough to take.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeaccel.host.traces.errors import InvalidTrace
from moeaccel.host.traces.generator import Locality, generate_requests
from moeaccel.host.traces.presets import preset
from moeaccel.host.traces.segments import segment_hit_rates
from moeaccel.host.traces.statistics import real

__all__ = ["fit_locality", "refit"]

logger = logging.getLogger(__name__)

_MOVES = 0.005  # a prior: one unit away from the start costs as much as missing a figure by this
_STEP = 0.15


def fit_locality(targets: Mapping[str, tuple[float, ...]], *, n_layers: int, n_experts: int,
                 top_k: int, start: Locality, requests: int = 6, tokens: int = 512,
                 layers: int = 10, seeds: tuple[int, ...] = (1, 2), iterations: int = 7,
                 fit_popularity: bool = True,
                 progress: Callable[[str], None] | None = None) -> tuple[Locality, float]:
    """Return the locality that comes nearest to some hit rates, and the greatest miss.

    Parameters
    ----------
    targets : mapping of :class:`str` to :class:`tuple` of :class:`float`
        Hit rates at ratios 1, 2, ... by policy, see :func:`segment_hit_rates`.
    n_layers, n_experts, top_k : :class:`int`
    start : :class:`Locality`
        Where to begin; what is not fitted is kept.
    requests, tokens, layers : :class:`int`
        Of the texts; layers beyond the first few change nothing but the noise.
    seeds : :class:`tuple` of :class:`int`
        Of the texts and of the model behind them, one after the other.
    iterations : :class:`int`
    fit_popularity : :class:`bool`
        Or keep it, because it is known from how even the experts' load is.
    progress : callable, optional
        Gets a line a step.

    Raises
    ------
    InvalidTrace
        If there are no targets.
    """
    if not targets:
        raise InvalidTrace("a fit must have targets, not none")
    wanted = np.concatenate([np.asarray(values, float) for values in targets.values()])
    ratios = tuple(range(1, 1 + len(next(iter(targets.values())))))

    def misses(locality: Locality) -> np.ndarray:
        found = []
        for seed in seeds:
            made = generate_requests(
                locality, n_layers=min(n_layers, layers), n_experts=n_experts, top_k=top_k,
                lengths=[tokens] * requests, seed=seed, model_seed=seed)
            rates = segment_hit_rates(np.stack([ids for ids, _ in made]), n_experts=n_experts,
                                      ratios=ratios, policies=tuple(targets))
            found.append(np.concatenate([rates[policy] for policy in targets]))
        return np.mean(found, axis=0) - wanted

    first = _free(start)
    fitted = np.eye(len(first))[: None if fit_popularity else -1]
    x, damping = first, 0.01
    off = misses(start)
    for iteration in range(iterations):
        slopes = np.stack([(misses(_bound(start, x + step)) - off) / _STEP
                           for step in fitted * _STEP], axis=1)
        rows = np.concatenate([slopes, np.eye(len(fitted)) * _MOVES])
        rest = np.concatenate([off, fitted @ (x - first) * _MOVES])
        while True:
            move = np.linalg.solve(rows.T @ rows + damping * np.diag((rows**2).sum(0)),
                                   -rows.T @ rest)
            nearer = x + np.clip(move, -1, 1) @ fitted
            new = misses(_bound(start, nearer))
            better = _cost(new, nearer - first) < _cost(off, x - first)
            if better or damping > 1:
                break
            damping *= 8
        if progress is not None:
            progress(f"step {iteration + 1}: off by {np.abs(new).max():.3f}")
        if not better:
            break
        gain = _cost(off, x - first) - _cost(new, nearer - first)
        x, off, damping = nearer, new, damping / 4
        if gain < 1e-6:
            break
    return _bound(start, x), float(np.abs(off).max())


def refit(name: str, **options: Any) -> tuple[Locality, float]:
    """Fit a preset again; see :func:`fit_locality`, which takes the options.

    Raises
    ------
    UnknownPreset
        If there is no such preset.
    InvalidTrace
        If no hit rates of its model were published.
    """
    chosen = preset(name)
    published = {statistic: value for figures in real().get(chosen.key, {}).values()
                 for statistic, value in figures.items()}
    targets = {policy: tuple(published[f"segment/{policy}@{ratio}"] for ratio in (1, 2, 3))
               for policy in ("LRU", "LFU") if f"segment/{policy}@3" in published}
    return fit_locality(
        targets, n_layers=len(chosen.layers), n_experts=chosen.n_experts, top_k=chosen.top_k,
        start=chosen.locality, fit_popularity="popularity" not in chosen.basis, **options)


def _cost(off: np.ndarray, moved: np.ndarray) -> float:
    return float((off**2).sum() + _MOVES**2 * (moved**2).sum())


def _free(locality: Locality) -> np.ndarray:
    """Return the fitted fields as numbers without bounds."""
    shares = np.array([locality.request, locality.passage, locality.phrase])
    rest = max(1 - shares.sum(), 1e-3)
    memory = locality.phrase_memory
    return np.array([*np.log(np.maximum(shares, 1e-4) / rest), np.log(memory / (1 - memory)),
                     np.log(max(locality.popularity, 1e-3))])


def _bound(locality: Locality, x: np.ndarray) -> Locality:
    shares = np.exp(x[:3]) / (1 + np.exp(x[:3]).sum())
    return dataclasses.replace(
        locality, request=float(shares[0]), passage=float(shares[1]), phrase=float(shares[2]),
        phrase_memory=float(1 / (1 + np.exp(-x[3]))), popularity=float(np.exp(x[4])))


def _main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in arguments:
        found, _ = refit(name, progress=logger.info)
        sys.stdout.write(f"{json.dumps({name: dataclasses.asdict(found)})}\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
