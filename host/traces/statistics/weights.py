"""How the weight of a token is spread over its experts."""

from __future__ import annotations

import numpy as np

from moeaccel.host.traces.statistics.sample import Sample

__all__ = ["measure"]


def measure(sample: Sample) -> dict[str, float]:
    """Return ``weights/second over first``: median within a layer, mean over layers; and the share
    of the greatest weight. Without weights, or with one slot: nothing."""
    weights = sample.trace.weights
    if weights is None or sample.top_k < 2:
        return {}
    ordered = np.sort(weights.astype(np.float32), axis=2)[..., ::-1]
    some = ordered[..., 0] > 0
    first = np.where(some, ordered[..., 0], 1)
    ratio = np.where(some, ordered[..., 1] / first, np.nan)
    share = np.where(some, ordered[..., 0] / np.where(some, ordered.sum(2), 1), np.nan)
    return {"weights/second over first": float(np.nanmedian(ratio, axis=0).mean()),
            "weights/share of the first": float(np.nanmean(share))}
