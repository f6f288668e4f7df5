"""Who is used how often: over the whole trace, and inside one request."""

from __future__ import annotations

import numpy as np

from moeaccel.host.traces.statistics.sample import Sample

__all__ = ["measure"]

_LONG = 128  # tokens: a shorter request is skewed by chance alone


def measure(sample: Sample) -> dict[str, float]:
    """Return shares of the load: means over layers, inside requests also over requests.

    * ``Zipf``: exponent q that makes shares ``rank^-q`` most likely; ``Zipf slope``: of log share
      over log rank, by least squares
    * ``max/mean``, ``min/mean``, ``CV``, ``Gini``: of the shares
    * ``top 10 %``, ``top 25 %``: what that part of the experts has
    * ``entropy``: over its maximum; ``experts for 90 %``: the share of experts that have it
    * ``top expert``: the largest share
    """
    found = _describe(sample.trace.popularity().shares(), "corpus")
    found |= {"top expert/median of layers":
              float(np.median(sample.trace.popularity().shares().max(1)))}
    parts = [_describe(_shares(mask.sum(0)), "request")
             for mask in sample.masks if len(mask) >= _LONG]
    for name in parts[0] if parts else ():
        found[name] = float(np.mean([part[name] for part in parts]))
    return found


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def _describe(shares: np.ndarray, where: str) -> dict[str, float]:
    ordered = np.sort(shares, axis=1)[:, ::-1]
    experts = ordered.shape[1]
    ranks = np.arange(1, experts + 1)
    grid = np.linspace(0, 3, 301)
    likelihood = (-grid * (ordered @ np.log(ranks))[:, None]
                  - np.log((ranks[:, None] ** -grid).sum(0)))
    centred = np.log(ranks) - np.log(ranks).mean()
    with np.errstate(divide="ignore"):
        logs = np.where(ordered > 0, np.log(ordered), 0)
    slope = -(np.where(ordered > 0, logs, logs.min()) @ centred) / (centred**2).sum()
    gini = (2 * (ordered[:, ::-1] @ ranks) / experts - (experts + 1) / experts)
    running = ordered.cumsum(1)
    return {f"{name}/{where}": float(values.mean()) for name, values in {
        "Zipf": grid[likelihood.argmax(1)], "Zipf slope": slope,
        "max/mean": ordered[:, 0] * experts, "min/mean": ordered[:, -1] * experts,
        "CV": ordered.std(1) * experts, "Gini": gini,
        "top 10 %": _top(running, 0.1), "top 12.5 %": _top(running, 0.125),
        "top 25 %": _top(running, 0.25),
        "entropy": -(ordered * logs).sum(1) / np.log(max(experts, 2)),
        "experts for 90 %": ((running < 0.9).sum(1) + 1) / experts,
        "top expert": ordered[:, 0],
    }.items()}


def _top(running: np.ndarray, share: float) -> np.ndarray:
    """Return what the first part of the experts has, interpolated between whole experts."""
    experts = running.shape[1]
    padded = np.concatenate([np.zeros((len(running), 1)), running], axis=1)
    place = share * experts
    low = int(place)
    high = min(low + 1, experts)
    return padded[:, low] + (place - low) * (padded[:, high] - padded[:, low])
