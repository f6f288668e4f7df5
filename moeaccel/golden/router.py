"""Routing, to the bit: logits become ids and weights.

Logits are rounded once, to multiples of 2**-20; scores are within 2**-18 of exact ones, weights
within 2**-16 of them relative to exact ones of the same logits (:mod:`moeaccel.router.tables`).
Selection without a selection bias compares logits, so that only rounding them makes ties. Every
token is routed by itself, but for a capacity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import Ints
from moeaccel.interface.commands import COUNT_MAX, NonFinite, Overflow, Status
from moeaccel.router.choices import (
    PART_BITS,
    CapacityOrder,
    Gates,
    GroupScore,
    Renormalize,
    Score,
)
from moeaccel.router.settings import SELECTION_BIAS_MAX, RouterError, RouterSettings
from moeaccel.router.tables import (
    KEY_BITS,
    LOGIT_BITS,
    NEVER,
    RECIPROCAL,
    SCORE_BITS,
    VALUE_BITS,
    WORD_MAX,
    WORD_MIN,
    exponential,
    fixed,
    leading,
    part,
    quotient,
    sigmoid,
    significand,
    sqrt_softplus,
    to_float32,
)

__all__ = ["NONE", "RoutedTokens", "route", "route_words", "within_capacity"]

NONE = -1
"""Id of a slot without an expert; its weight is 0."""

_OUT = -(1 << 40)
"""Below every key: an expert that cannot be chosen."""
_FIRST = 1 << 40
"""Above every key."""


@dataclass(frozen=True)
class RoutedTokens:
    """What a router makes of logits.

    Parameters
    ----------
    ids : int32 array, (T, k)
        In the order of their keys; `NONE` where there is none, or it was dropped.
    weights : float32 array, (T, k)
    logits : float32 array, (T, E)
        As they were used: rounded, with bias.
    nonfinite_tokens : :class:`list` of :class:`int`
        Tokens with a logit that is NaN or infinite (it counts as -2048).
    saturated : :class:`int`
        Logits of +-2048 and beyond, with or without bias (they count as that).
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    logits: NDArray[np.float32]
    nonfinite_tokens: list[int]
    saturated: int

    @property
    def outcome(self) -> tuple[Status, int, int]:
        """Status, detail and address of the completion."""
        if self.nonfinite_tokens:
            return Status.NONFINITE, self.nonfinite_tokens[0], NonFinite.LOGIT
        if self.saturated:
            return Status.OVERFLOW, min(self.saturated, COUNT_MAX), Overflow.LOGIT
        return Status.OK, 0, 0


def route(
    logits: NDArray[np.float32],
    settings: RouterSettings,
    *,
    bias: NDArray[np.floating] | None = None,
    selection_bias: NDArray[np.floating] | None = None,
    resident: NDArray[np.bool_] | None = None,
    ids: NDArray[np.integer] | None = None,
) -> RoutedTokens:
    """Return where tokens go.

    Parameters
    ----------
    logits : float32 array, (T, E)
        Behind them, with gates, those of the shared experts, which then have the last ids and
        weights.
    settings : :class:`RouterSettings`
    bias, selection_bias : float array, (E,), optional
        Added to the logits; added to the scores (or logits) for selection only.
    resident : bool array, (E,), optional
        Only these are chosen; with ``settings.prior``, these are preferred.
    ids : integer array, (T, k), optional
        The experts chosen, by somebody else: only their weights are asked for.

    Raises
    ------
    RouterError
        If an array has another shape or values that do not fit, or is none that a sparsemixer looks
        at.
    """
    settings.check_given(selection_bias=selection_bias, resident=resident, ids=ids)
    experts = settings.experts
    if logits.ndim != 2 or logits.shape[1] != settings.outputs:
        raise RouterError(f"logits must be (tokens, {settings.outputs}), not {logits.shape}")
    table = _table("bias", bias, experts)
    extra = _table("selection_bias", selection_bias, experts)
    biased = selection_bias is not None and settings.biases_scores
    near = np.abs(extra) <= SELECTION_BIAS_MAX
    if not near.all():
        expert = int(np.argmin(near))
        raise RouterError(f"selection_bias[{expert}] must be from {-SELECTION_BIAS_MAX} to "
                          f"{SELECTION_BIAS_MAX}, not {extra[expert]:g}")
    if resident is not None and np.shape(resident) != (experts,):
        raise RouterError(f"resident must have shape ({experts},), not {np.shape(resident)}")

    words = fixed(extra, KEY_BITS if biased else LOGIT_BITS)[0]
    if resident is not None and not settings.prior:
        words = np.where(resident, words, NEVER)
    return route_words(
        logits, settings, biased=biased, bias=fixed(table, LOGIT_BITS)[0], extra=words, ids=ids,
        preferred=resident if settings.prior else None)


def route_words(
    logits: NDArray[np.float32],
    settings: RouterSettings,
    *,
    biased: bool,
    bias: Ints,
    extra: Ints,
    ids: NDArray[np.integer] | None = None,
    preferred: NDArray[np.bool_] | None = None,
) -> RoutedTokens:
    """Return where tokens go, by the words of a router's table.

    Parameters
    ----------
    biased : :class:`bool`
        Keys are scores, not logits.
    bias, extra : int64 arrays, (E,)
        32 bits: added to logits, in their units; added to keys, in theirs, or `NEVER`.
    ids : integer array, (T, k), optional
    preferred : bool array, (E,), optional
        Those that ``settings.prior`` is for.
    """
    rounded, beyond = fixed(logits, LOGIT_BITS)
    added = rounded + np.pad(bias, (0, settings.shared))
    s = _clipped(added)
    own = s[:, : settings.experts]
    saturated = int((beyond | (s != added)).sum())
    if settings.mixer is not None:
        chosen, weights = _mixed(own, settings)
    else:
        scores = _scores(own, settings)
        chosen = (_select(own, scores, settings, extra, biased, preferred)
                  if ids is None else _given(ids, settings, len(logits)))
        gates = sigmoid(s[:, settings.experts :])
        chosen, weights = _weights(own, scores, chosen, settings, gates)
    return RoutedTokens(
        chosen.astype(np.int32), weights,
        np.ldexp(s.astype(np.float64), -LOGIT_BITS).astype(np.float32),
        np.nonzero(~np.isfinite(logits).all(axis=1))[0].tolist(), saturated)


def _clipped(values: Ints) -> Ints:
    return np.clip(values, WORD_MIN, WORD_MAX)


def _table(name: str, values: NDArray[np.floating] | None, experts: int) -> NDArray[np.float64]:
    if values is None:
        return np.zeros(experts)
    table = np.asarray(values, np.float64)
    if table.shape != (experts,):
        raise RouterError(f"{name} must have shape ({experts},), not {table.shape}")
    if not np.isfinite(table).all():
        expert = int(np.argmin(np.isfinite(table)))
        raise RouterError(f"{name}[{expert}] must be finite, not {table[expert]}")
    return table


def _given(ids: NDArray[np.integer], settings: RouterSettings, tokens: int) -> Ints:
    if np.shape(ids) != (tokens, settings.top_k):
        raise RouterError(f"ids must be ({tokens}, {settings.top_k}), not {np.shape(ids)}")
    return np.where((ids >= 0) & (ids < settings.experts), ids, NONE).astype(np.int64)


def _scores(s: Ints, settings: RouterSettings) -> Ints:
    """Return the scores of logits, (T, E)."""
    match settings.score_kind:
        case Score.SOFTMAX:
            power = exponential(s.max(axis=1, keepdims=True) - s)
            return quotient(power, power.score.sum(axis=1, keepdims=True))
        case Score.SIGMOID:
            return sigmoid(s)
        case Score.SQRT_SOFTPLUS:
            return sqrt_softplus(s)
        case Score.IDENTITY:
            return s << (SCORE_BITS - LOGIT_BITS)


def _top(keys: Ints, count: int) -> Ints:
    """Return the indices of the largest keys, in order; the lowest index first of equal ones."""
    return np.argsort(-keys, axis=1, kind="stable")[:, :count]


def _select(s: Ints, scores: Ints, settings: RouterSettings, extra: Ints, biased: bool,
            preferred: NDArray[np.bool_] | None) -> Ints:
    """Return the chosen of each token, (T, k)."""
    never = extra == NEVER
    as_scores = np.where(never, WORD_MIN, _clipped((scores >> (SCORE_BITS - KEY_BITS)) + extra))
    keys = as_scores if biased else np.where(never, WORD_MIN, _clipped(s + extra))
    if preferred is not None:
        bits = KEY_BITS if biased else LOGIT_BITS
        prior = int(fixed(np.array(settings.prior), bits)[0])
        keys = _clipped(keys + np.where(preferred, prior, 0))
    if settings.grouped:
        of_groups = _group_keys(
            keys if settings.group_score_kind is GroupScore.MAX else as_scores, settings)
        kept = np.zeros(of_groups.shape, bool)
        np.put_along_axis(kept, _top(of_groups, settings.keep_groups), True, axis=1)
        keys = np.where(np.repeat(kept, settings.experts // settings.groups, axis=1), keys, _OUT)
    keys = np.where(never, _OUT, keys)
    if settings.prior_keep:
        keys[np.arange(len(s)), s.argmax(axis=1)] = _FIRST
    chosen = _top(keys, settings.top_k)
    return np.where(np.take_along_axis(keys, chosen, 1) == _OUT, NONE, chosen)


def _group_keys(keys: Ints, settings: RouterSettings) -> Ints:
    """Return what groups are compared by, (T, groups), of the keys of their experts, (T, E)."""
    each = np.sort(keys.reshape(len(keys), settings.groups, -1), axis=2)
    most = 1 if settings.group_score_kind is GroupScore.MAX else 2
    return each[:, :, -most:].sum(axis=2)


def _kept(q: Ints, there: NDArray[np.bool_], settings: RouterSettings) -> NDArray[np.bool_]:
    """Return which of the chosen threshold and top-p keep, (T, k).

    Parameters
    ----------
    q : int64 array, (T, k)
        Scores, 0 where there is none.
    there : bool array, (T, k)
    """
    keep = there
    if settings.threshold is not None:
        keep = keep & ((q << PART_BITS) >= part(settings.threshold) * q[:, :1])
    if settings.top_p is not None:
        before = np.cumsum(q, axis=1) - q
        keep = keep & ((before << PART_BITS)
                       < part(settings.top_p) * q.sum(axis=1, keepdims=True))
    return keep


def _weights(s: Ints, scores: Ints, chosen: Ints, settings: RouterSettings, gates: Ints
             ) -> tuple[Ints, NDArray[np.float32]]:
    """Return the chosen that are kept, and shared experts with gates, (T, S), and their weights."""
    there = chosen != NONE
    at = np.maximum(chosen, 0)
    if settings.renormalize_kind is Renormalize.SOFTMAX_TOP_K:
        logits = np.where(there, np.take_along_axis(s, at, 1), WORD_MIN)
        scores = exponential(logits.max(axis=1, keepdims=True) - logits).score
    else:
        scores = np.take_along_axis(scores, at, 1)
    q = np.where(there, scores, 0)
    keep = _kept(q, there, settings)
    if settings.capacity is not None:
        keep = within_capacity(np.where(keep, chosen, NONE), settings.capacity,
                               q[:, 0] if settings.capacity_order_kind is CapacityOrder.PRIORITY
                               else None)
    q = np.where(keep, q, 0)
    if settings.gates_kind is Gates.SUM:
        q = np.concatenate([q, gates], axis=1)
    epsilon = round(settings.epsilon * 2**SCORE_BITS)
    total = q.sum(axis=1, keepdims=True)
    match settings.renormalize_kind:
        case Renormalize.NONE:
            weights = _scaled(q, settings.scale)
        case Renormalize.CLAMP:
            weights = _scaled(q, settings.scale, np.maximum(total, epsilon))
        case _:
            weights = _scaled(q, settings.scale, total + epsilon)
    if settings.gates_kind is Gates.SIGMOID:
        weights = np.concatenate([weights, _scaled(gates, 1.0)], axis=1)
    behind = np.broadcast_to(settings.experts + np.arange(settings.shared), gates.shape)
    return np.concatenate([np.where(keep, chosen, NONE), behind], axis=1), weights


def _scaled(q: Ints, factor_of: float, divisor: Ints | None = None) -> NDArray[np.float32]:
    """Return ``q / divisor * factor_of``, or ``q * factor_of``; 0 where the divisor is 0."""
    scale, exponent = significand(factor_of)
    factor, power = np.array(scale, np.int64), np.array(exponent, np.int64)
    if divisor is not None:
        mantissa, position = leading(divisor, VALUE_BITS + 1)
        product = RECIPROCAL(mantissa & ((1 << VALUE_BITS) - 1)) * scale
        factor, place = leading(product, VALUE_BITS)
        # product / 2**24 of the scale, over 2**position; cut off to 24 bits.
        power = exponent - VALUE_BITS - position + (place - VALUE_BITS + 1)
    else:
        power = power - SCORE_BITS
    mantissa, position = leading(np.abs(q), VALUE_BITS)
    weights = to_float32(np.sign(q) * mantissa * factor, power + position - VALUE_BITS + 1)
    return weights if divisor is None else np.where(divisor == 0, np.float32(0), weights)


def _mixed(s: Ints, settings: RouterSettings) -> tuple[Ints, NDArray[np.float32]]:
    """Return the chosen of sparsemixer, and their weights."""
    assert settings.mixer is not None
    limit = round(settings.mixer * 2**LOGIT_BITS)
    left = np.ones(s.shape, bool)
    chosen, weights = [], []
    for _ in range(settings.top_k):
        best = np.where(left, s, _OUT).argmax(axis=1)[:, None]
        largest = np.take_along_axis(s, best, 1)
        distance = largest - s
        near = left & ((distance << LOGIT_BITS) <= limit * np.maximum(np.abs(s), largest))
        power = exponential(np.maximum(distance, 0)).score
        total = np.where(near, power, 0).sum(axis=1, keepdims=True)
        first = np.full(total.shape, int(exponential(np.array(0)).score))
        weights.append(_scaled(first, settings.scale, total))
        chosen.append(best)
        np.put_along_axis(left, best, False, axis=1)
    return np.concatenate(chosen, axis=1), np.concatenate(weights, axis=1)


def within_capacity(ids: Ints, capacity: int, priority: Ints | None = None) -> NDArray[np.bool_]:
    """Return which choices an expert's capacity leaves, (T, k).

    Every token's first choice comes before any second one; of one rank, tokens come in their order,
    or those with the larger `priority`, (T,), first.
    """
    tokens, top_k = ids.shape
    order = (np.arange(tokens) if priority is None
             else np.argsort(-priority, kind="stable"))
    flat = ids[order].T.reshape(-1)
    place = np.zeros(len(flat), np.int64)
    for expert in np.unique(flat[flat >= 0]):
        mine = np.nonzero(flat == expert)[0]
        place[mine] = np.arange(len(mine))
    kept = np.zeros(ids.shape, bool)
    kept[order] = ((flat >= 0) & (place < capacity)).reshape(top_k, tokens).T
    return kept
