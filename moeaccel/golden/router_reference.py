"""Routing in floats, as models do it: what :mod:`moeaccel.golden.router` is held against.

The formulas are those of the models' own code (:data:`moeaccel.router.flavours.FLAVOURS` names one
of each); where keys are equal the lowest index comes first.
"""

from __future__ import annotations

import torch

from moeaccel.golden.router import within_capacity
from moeaccel.router.choices import CapacityOrder, Gates, GroupScore, Renormalize, Score
from moeaccel.router.settings import RouterSettings

__all__ = ["route_float", "scores_float"]


def route_float(
    logits: torch.Tensor,
    settings: RouterSettings,
    *,
    bias: torch.Tensor | None = None,
    selection_bias: torch.Tensor | None = None,
    resident: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids, (T, k) int64, and weights, (T, k), in the dtype of the logits, (T, E).

    Arguments are those of :func:`moeaccel.golden.router.route`; ids are -1 where there is no
    expert.
    """
    gates = torch.sigmoid(logits[:, settings.experts :])
    logits = logits[:, : settings.experts]
    s = logits if bias is None else logits + bias
    if settings.mixer is not None:
        return _mixed(s, settings)
    scores = scores_float(s, settings)
    if ids is None:
        ids = _select(s, scores, settings, selection_bias, resident)
    there = ids >= 0
    at = ids.clamp(min=0)
    if settings.renormalize_kind is Renormalize.SOFTMAX_TOP_K:
        q = torch.softmax(s.gather(1, at).masked_fill(~there, -torch.inf), 1)
    else:
        q = scores.gather(1, at) * there
    keep = there
    if settings.threshold is not None:
        keep = keep & (q >= settings.threshold * q[:, :1])
    if settings.top_p is not None:
        keep = keep & (q.cumsum(1) - q < settings.top_p * q.sum(1, keepdim=True))
    if settings.capacity is not None:
        priority = ((q[:, 0].double() * 2**40).long().numpy()
                    if settings.capacity_order_kind is CapacityOrder.PRIORITY else None)
        keep = torch.from_numpy(within_capacity(
            ids.masked_fill(~keep, -1).numpy(), settings.capacity, priority))
    q = q * keep
    if settings.gates_kind is Gates.SUM:
        q = torch.cat([q, gates], 1)
    total = q.sum(1, keepdim=True)
    match settings.renormalize_kind:
        case Renormalize.NONE:
            weights = q
        case Renormalize.SUM_EPS:
            weights = q / (total + settings.epsilon)
        case Renormalize.CLAMP:
            weights = q / total.clamp(min=settings.epsilon)
        case Renormalize.SUM | Renormalize.SOFTMAX_TOP_K:
            weights = q / total
    weights = weights.nan_to_num(0.0) * settings.scale
    if settings.gates_kind is Gates.SIGMOID:
        weights = torch.cat([weights, gates], 1)
    behind = torch.arange(settings.experts, settings.outputs).expand(gates.shape)
    return torch.cat([ids.masked_fill(~keep, -1), behind], 1), weights


def scores_float(s: torch.Tensor, settings: RouterSettings) -> torch.Tensor:
    """Return the scores of logits, (T, E), in their dtype."""
    match settings.score_kind:
        case Score.SOFTMAX:
            return torch.softmax(s, 1)
        case Score.SIGMOID:
            return torch.sigmoid(s)
        case Score.SQRT_SOFTPLUS:
            # softplus of torch is x above its threshold of 20, which float64 would show.
            return torch.nn.functional.softplus(s, threshold=60).sqrt()
        case Score.IDENTITY:
            return s


def _top(keys: torch.Tensor, count: int) -> torch.Tensor:
    return keys.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _select(s: torch.Tensor, scores: torch.Tensor, settings: RouterSettings,
            selection_bias: torch.Tensor | None, resident: torch.Tensor | None) -> torch.Tensor:
    extra = torch.zeros(settings.experts) if selection_bias is None else selection_bias
    biased = scores + extra
    by_logits = settings.bias_logits or selection_bias is None
    keys = s + extra if by_logits else biased
    if resident is not None and settings.prior:
        keys = keys + settings.prior * resident
    elif resident is not None:
        keys = keys.masked_fill(~resident, -torch.inf)
        biased = biased.masked_fill(~resident, -torch.inf)
    if settings.grouped:
        shape = (len(s), settings.groups, -1)
        if settings.group_score_kind is GroupScore.MAX:
            of_groups = keys.reshape(shape).amax(2)
        else:
            of_groups = biased.reshape(shape).topk(2, dim=2).values.sum(2)
        kept = torch.zeros_like(of_groups, dtype=torch.bool).scatter(
            1, _top(of_groups, settings.keep_groups), True)
        kept = kept.repeat_interleave(settings.experts // settings.groups, dim=1)
        keys = keys.masked_fill(~kept, -torch.inf)
    if settings.prior_keep:
        keys = keys.scatter(1, _top(s, 1), torch.inf)
    chosen = _top(keys, settings.top_k)
    return chosen.masked_fill(keys.gather(1, chosen) == -torch.inf, -1)


def _mixed(s: torch.Tensor, settings: RouterSettings) -> tuple[torch.Tensor, torch.Tensor]:
    assert settings.mixer is not None
    left = s.clone()
    chosen, weights = [], []
    for _ in range(settings.top_k):
        best = _top(left, 1)
        largest = left.gather(1, best)
        near = (largest - s) / s.abs().maximum(largest) <= settings.mixer
        weights.append(torch.softmax(left.masked_fill(~near, -torch.inf), 1).gather(1, best))
        chosen.append(best)
        left = left.scatter(1, best, -torch.inf)
    return torch.cat(chosen, 1), torch.cat(weights, 1) * settings.scale
