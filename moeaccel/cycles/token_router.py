"""Cycles of the router for one token."""

from __future__ import annotations

from moeaccel.config import AcceleratorConfig
from moeaccel.router.choices import GroupScore, Renormalize, Score
from moeaccel.router.settings import RouterSettings
from moeaccel.router.tables import part

__all__ = ["drop_cycles", "token_cycles"]

# Latencies of the blocks (tests/hdl/router).
_READ = 2
_EXPONENTIAL = 13
_SCORE = {Score.SOFTMAX: 27, Score.SIGMOID: 27, Score.SQRT_SOFTPLUS: 43, Score.IDENTITY: 0}
_DIVIDE = 13
_WEIGHT = 15
_SETTLE = 8
_SELECT = 3
_PRIOR = 4
_DROP = 5


def token_cycles(config: AcceleratorConfig, settings: RouterSettings, *, biased: bool) -> int:
    """Return the cycles from the first of a token's passes to its last pair.

    The next token's logits are there by then: they take ``experts`` cycles to come in.

    Parameters
    ----------
    biased : :class:`bool`
        Whether it has a selection bias.
    """
    if settings.mixer is not None:
        return _mixed_cycles(config, settings)
    experts, top_k, score = settings.experts, settings.top_k, settings.score_kind
    softmax = score is Score.SOFTMAX
    by_logits = not biased or settings.bias_logits or score is Score.IDENTITY
    top2 = settings.grouped and settings.group_score_kind is GroupScore.TOP2_SUM
    of_chosen = settings.renormalize_kind is Renormalize.SOFTMAX_TOP_K
    early_sum = softmax and (not by_logits or top2)
    settle = _settle(config)

    cycles = 1
    if early_sum:
        cycles += experts + _READ + _EXPONENTIAL + settle
    if settings.grouped:
        scored = not by_logits or top2
        cycles += experts + _READ + (_SCORE[score] if scored else 0) + settle + settings.keep_groups
    if by_logits:
        select = _EXPONENTIAL if softmax and not early_sum and not of_chosen else 0
    else:
        select = _SCORE[score]
    cycles += experts + _READ + select + settle
    if of_chosen:
        cycles += top_k + _READ + 1
    cycles += top_k + _READ + 1 + (_EXPONENTIAL if of_chosen else _SCORE[score])
    drops = drop_cycles(settings)
    if settings.shared:
        drops = max(settle, drops + 2) + settings.shared + _READ + _SCORE[Score.SIGMOID]
    cycles += drops
    cycles += 1  # the divisor
    if settings.renormalize_kind is not Renormalize.NONE:
        cycles += _DIVIDE + 1 + _WEIGHT
    cycles += 1 + top_k + 1 + _WEIGHT
    if settings.shared:
        cycles += settings.shared + 1 + _WEIGHT
    return cycles


def _settle(config: AcceleratorConfig) -> int:
    """Return the cycles from the last key of a pass to the next one."""
    keys = _SETTLE + (_PRIOR if "prior" in config.router_modes else 0)
    return 1 + max(keys + _SELECT, _DIVIDE)


def _mixed_cycles(config: AcceleratorConfig, settings: RouterSettings) -> int:
    """Return the cycles of a sparsemixer."""
    cycles = 1 + settings.experts + _READ + _settle(config)
    for choice in range(settings.top_k):
        cycles += choice + 2 + _READ + settings.experts + 1 + _READ + _EXPONENTIAL
        cycles += 1 + _DIVIDE + 1 + _WEIGHT + 3 + _WEIGHT
    return cycles


def drop_cycles(settings: RouterSettings, *, capped: bool = False) -> int:
    """Return the cycles in which a token's chosen are dropped.

    Parameters
    ----------
    capped : :class:`bool`
        A capacity counts.
    """
    factors = [part(value or 0) for value in (settings.threshold, settings.top_p)]
    if not any(factors) and not capped:
        return 0
    return _DROP + max(factors).bit_length() + settings.top_k
