"""How well a layer's experts can be told from other ids."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeaccel.host.traces.statistics.sample import Sample

__all__ = ["Tables", "measure"]

_DISTANCES = (1, 2, 3, 4, 8)
_LAYERS = 9
_TRAIN = 0.8
_PRIOR = 5.0  # imaginary uses that a table starts with
_SMALL = 1e-9


class Tables:
    """Which experts come with which: of another layer, or of the token before.

    ``score_j = log p_j + sum over i in the known set of log(P(j | i) / p_j)``, P counted on the
    first requests and pulled towards p where counts are few.

    Parameters
    ----------
    known, wanted : bool (tokens, experts)
        The sets of the same tokens to learn from.
    """

    def __init__(self, known: np.ndarray, wanted: np.ndarray) -> None:
        known_, wanted_ = known.astype(np.float32), wanted.astype(np.float32)
        share = wanted_.mean(0) + _SMALL
        together = known_.T @ wanted_ + _PRIOR * share
        self._ratio = np.log(together / (known_.sum(0)[:, None] + _PRIOR)) - np.log(share)
        self.prior = np.log(share)

    def evidence(self, known: np.ndarray) -> np.ndarray:
        """Return the sum over the known set, float32 (tokens, experts)."""
        return known.astype(np.float32) @ self._ratio


def recall(score: np.ndarray, wanted: np.ndarray, guesses: int) -> float:
    """Return the share of the wanted experts that the best guesses hold."""
    experts = score.shape[1]
    best = np.argpartition(score, experts - guesses, axis=1)[:, experts - guesses:]
    return float(np.take_along_axis(wanted, best, 1).sum() / max(1, wanted.sum()))


def measure(sample: Sample, *, progress: Callable[[str], None] = lambda _: None
            ) -> dict[str, float]:
    """Return the recall of predictors: share of a token's experts in a layer among m guesses.

    Learned on four fifths of the requests, measured on the rest, mean over some layers; m is top-k,
    and for the first table also 8/6, 2 and 16/6 times that. Without a fifth request: nothing.

    * ``popularity``; ``previous token``: its experts, then popularity; ``request so far``: counts
      of the request; ``EMA``: the same with decay 0.9; ``Markov``: :class:`Tables` from the token
      before; ``cross-layer d``: :class:`Tables` from the layer d before; ``all``: cross-layer 1,
      Markov and the logarithm of the EMA, added up

    Parameters
    ----------
    sample : :class:`Sample`
    progress : callable
        Gets a line a layer.
    """
    split = int(len(sample.masks) * _TRAIN)
    if split == len(sample.masks) or split == 0:
        return {}
    learn = np.concatenate(sample.masks[:split])
    before = np.concatenate([_shifted(mask) for mask in sample.masks[:split]])
    test = sample.masks[split:]
    wanted_all = np.concatenate(test)
    k, experts = sample.top_k, sample.n_experts
    sizes = {m: min(experts, round(k * m)) for m in (1, 8 / 6, 2, 16 / 6)}
    rows: dict[str, list[float]] = {}

    def add(name: str, score: np.ndarray, wanted: np.ndarray) -> None:
        for guesses in dict.fromkeys(sizes.values()):
            rows.setdefault(f"recall/{name} @{guesses}", []).append(
                recall(score, wanted, guesses))

    for layer in sample.layers(_LAYERS):
        progress(f"layer {layer}")
        wanted = wanted_all[:, layer]
        markov = Tables(before[:, layer], learn[:, layer])
        prior = np.broadcast_to(markov.prior, wanted.shape)
        last = np.concatenate([_shifted(mask[:, layer]) for mask in test])
        ema = np.concatenate([_averaged(mask[:, layer], 0.9) for mask in test])
        add("popularity", prior, wanted)
        add("previous token", last * 100.0 + prior, wanted)
        add("request so far", np.concatenate([_averaged(mask[:, layer], 1.0) for mask in test])
            * 100 + prior, wanted)
        add("EMA", ema * 100 + prior, wanted)
        add("Markov", markov.prior + markov.evidence(last), wanted)
        for distance in _DISTANCES:
            if layer < distance:
                continue
            known = layer - distance
            table = Tables(learn[:, known], learn[:, layer])
            evidence = table.evidence(wanted_all[:, known])
            add(f"cross-layer {distance}", table.prior + evidence, wanted)
            if distance == 1:
                add("all", evidence + markov.evidence(last) + np.log(ema + np.exp(prior)), wanted)
    return {name: float(np.mean(values)) for name, values in rows.items()}


def _shifted(mask: np.ndarray) -> np.ndarray:
    """Return what the token before had; the first has none."""
    return np.concatenate([np.zeros_like(mask[:1]), mask[:-1]])


def _averaged(mask: np.ndarray, decay: float) -> np.ndarray:
    """Return what came before each token, each token before counting `decay` times the next."""
    total = np.zeros(mask.shape, np.float32)
    for t in range(1, len(mask)):
        total[t] = decay * total[t - 1] + mask[t - 1]
    return total
