"""How far a model's predictions are from another's, on one text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Predictions", "Quality", "compare", "predictions"]

_ROWS = 128  # of 50,000 logits each, looked at at a time


@dataclass(frozen=True)
class Predictions:
    """What a model expects behind each token of some windows of text but the last of each.

    Parameters
    ----------
    log_probabilities : float32 tensor, (W (T - 1), V)
    loss : float64 tensor, (W (T - 1),)
        Of the tokens that follow, nats.
    """

    log_probabilities: torch.Tensor
    loss: torch.Tensor


@dataclass(frozen=True)
class Quality:
    """One model's predictions beside the reference's.

    Parameters
    ----------
    perplexity : :class:`float`
    perplexity_error : :class:`float`
        Its standard error: that of the mean loss times the perplexity. It is of the choice of the
        text, which all models share: differences of models are far more certain.
    loss_difference, loss_difference_error : :class:`float`
        Mean loss less the reference's, nats, and the standard error of that, token by token.
    kl, kl_error : :class:`float`
        Mean of KL(reference || model), nats, and its standard error.
    top1 : :class:`float`
        Share of tokens whose likeliest successor is the reference's.
    """

    perplexity: float
    perplexity_error: float
    loss_difference: float
    loss_difference_error: float
    kl: float
    kl_error: float
    top1: float


def predictions(logits: torch.Tensor, tokens: torch.Tensor) -> Predictions:
    """Return what logits, (W, T, V), say of windows of text, (W, T)."""
    log_probabilities = torch.log_softmax(logits[:, :-1].flatten(0, 1).float(), dim=-1)
    loss = -log_probabilities.gather(1, tokens[:, 1:].reshape(-1, 1))[:, 0].double()
    return Predictions(log_probabilities, loss)


def compare(found: Predictions, reference: Predictions) -> Quality:
    """Return how far predictions are from the reference's."""
    kl: list[torch.Tensor] = []
    same = 0
    for first in range(0, len(found.loss), _ROWS):
        mine = found.log_probabilities[first : first + _ROWS]
        exact = reference.log_probabilities[first : first + _ROWS]
        kl.append((exact.exp() * (exact - mine)).sum(dim=1).double())
        same += int((mine.argmax(dim=1) == exact.argmax(dim=1)).sum())
    mean, error = _mean(found.loss)
    difference = _mean(found.loss - reference.loss)
    perplexity = math.exp(mean)
    return Quality(perplexity, perplexity * error, *difference, *_mean(torch.cat(kl)),
                   same / len(found.loss))


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """Return the mean and its standard error."""
    count = len(values)
    spread = float(values.std()) if count > 1 else math.nan
    return float(values.mean()), spread / math.sqrt(count)
