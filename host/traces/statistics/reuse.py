"""What tokens share: over time, in a batch, over devices."""

from __future__ import annotations

import numpy as np

from moeaccel.host.traces.statistics.sample import Sample

__all__ = ["measure"]

_LAGS = (1, 2, 3, 4, 8, 16, 32, 64, 128)
_WINDOWS = (2, 4, 8, 16, 32, 64)
_BATCHES = (2, 4, 8, 16, 32, 64, 128)
_DEVICES, _DEVICE_BATCHES = (4, 8, 16), (1, 4, 16, 64, 256)
_DRAWS = 100


def measure(sample: Sample) -> dict[str, float]:
    """Return overlaps and set sizes, means over layers.

    * ``reuse/lag n``: share of a token's experts that the token n before had, too; also of the
      first, the last and the best layer
    * ``repeated/n``: chance that a token has n experts of the token before
    * ``distinct/window w``, ``distinct/batch B``: experts that w tokens of one request, or B tokens
      of as many requests, have together
    * ``tokens an expert/batch B``, ``alone/batch B``: mean over the experts in use; share of them
      with a single token
    * ``imbalance/D devices, batch B``: the fullest device's tokens over the mean, experts dealt in
      contiguous runs
    """
    found: dict[str, float] = {}
    masks = sample.masks
    for lag in _LAGS:
        both = [_overlap(mask, lag) for mask in masks if len(mask) > lag]
        if not both:
            break
        shared = np.concatenate(both)
        by_layer = shared.mean(0) / sample.top_k
        found[f"reuse/lag {lag}"] = float(by_layer.mean())
        if lag == 1:
            found |= {"reuse/lag 1, first layer": float(by_layer[0]),
                      "reuse/lag 1, best layer": float(by_layer.max()),
                      "reuse/lag 1, last layer": float(by_layer[-1])}
            counts = np.bincount(shared.ravel(), minlength=sample.top_k + 1) / shared.size
            found |= {f"repeated/{n}": float(share) for n, share in enumerate(counts)}
    for window in _WINDOWS:
        sizes = [mask[: len(mask) // window * window].reshape(-1, window, *mask.shape[1:])
                 .any(1).sum(2) for mask in masks if len(mask) >= window]
        if sizes:
            found[f"distinct/window {window}"] = float(np.concatenate(sizes).mean())
    return found | _batches(sample) | _devices(sample)


def _overlap(mask: np.ndarray, lag: int) -> np.ndarray:
    return (mask[lag:] & mask[:-lag]).sum(2)


def _draw(sample: Sample, batch: int) -> np.ndarray:
    """Return tokens of an expert, (layers, experts), in a batch of independent requests."""
    masks, random = sample.masks, sample.random
    order = [int(i) for _ in range(-(-batch // len(masks)))
             for i in random.permutation(len(masks))][:batch]
    return np.sum([masks[i][random.integers(len(masks[i]))] for i in order], axis=0)


def _batches(sample: Sample) -> dict[str, float]:
    found = {}
    for batch in _BATCHES:
        load = np.stack([_draw(sample, batch) for _ in range(_DRAWS)])
        active = (load > 0).sum()
        found |= {f"distinct/batch {batch}": float((load > 0).sum(2).mean()),
                  f"tokens an expert/batch {batch}": float(load.sum() / active),
                  f"alone/batch {batch}": float((load == 1).sum() / active)}
    return found


def _devices(sample: Sample) -> dict[str, float]:
    found = {}
    for devices in _DEVICES:
        if sample.n_experts < devices:
            continue
        starts = np.arange(devices) * sample.n_experts // devices
        for batch in _DEVICE_BATCHES:
            load = np.stack([np.add.reduceat(_draw(sample, batch), starts, axis=1)
                             for _ in range(_DRAWS if batch < 64 else _DRAWS // 4)])
            found[f"imbalance/{devices} devices, batch {batch}"] = float(
                (load.max(2) / load.mean(2)).mean())
    return found
