"""Cycles of the router for one token."""

from __future__ import annotations

from moeaccel.config import AcceleratorConfig
from moeaccel.router.choices import GroupScore, Renormalize, Score
from moeaccel.router.settings import RouterSettings
from moeaccel.router.tables import part

__all__ = ["drop_cycles", "token_cycles"]

# Latencies of the blocks.
READ_CYCLES = 2
EXPONENTIAL_CYCLES = 13
SCORE_CYCLES = {Score.SOFTMAX: 27, Score.SIGMOID: 27, Score.SQRT_SOFTPLUS: 43, Score.IDENTITY: 0}
DIVIDE_CYCLES = 13
WEIGHT_CYCLES = 15
SETTLE_CYCLES = 8
SELECT_CYCLES = 3
PRIOR_CYCLES = 4
DROP_CYCLES = 5


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
        cycles += experts + READ_CYCLES + EXPONENTIAL_CYCLES + settle
    if settings.grouped:
        scored = not by_logits or top2
        cycles += (experts + READ_CYCLES + (SCORE_CYCLES[score] if scored else 0) + settle
                   + settings.keep_groups)
    if by_logits:
        select = EXPONENTIAL_CYCLES if softmax and not early_sum and not of_chosen else 0
    else:
        select = SCORE_CYCLES[score]
    cycles += experts + READ_CYCLES + select + settle
    if of_chosen:
        cycles += top_k + READ_CYCLES + 1
    cycles += top_k + READ_CYCLES + 1 + (EXPONENTIAL_CYCLES if of_chosen else SCORE_CYCLES[score])
    drops = drop_cycles(settings)
    if settings.shared:
        drops = max(settle, drops + 2) + settings.shared + READ_CYCLES + SCORE_CYCLES[Score.SIGMOID]
    cycles += drops
    cycles += 1  # the divisor
    if settings.renormalize_kind is not Renormalize.NONE:
        cycles += DIVIDE_CYCLES + 1 + WEIGHT_CYCLES
    cycles += 1 + top_k + 1 + WEIGHT_CYCLES
    if settings.shared:
        cycles += settings.shared + 1 + WEIGHT_CYCLES
    return cycles


def _settle(config: AcceleratorConfig) -> int:
    """Return the cycles from the last key of a pass to the next one."""
    keys = SETTLE_CYCLES + (PRIOR_CYCLES if "prior" in config.router_modes else 0)
    return 1 + max(keys + SELECT_CYCLES, DIVIDE_CYCLES)


def _mixed_cycles(config: AcceleratorConfig, settings: RouterSettings) -> int:
    """Return the cycles of a sparsemixer."""
    cycles = 1 + settings.experts + READ_CYCLES + _settle(config)
    for choice in range(settings.top_k):
        cycles += choice + 2 + READ_CYCLES + settings.experts + 1 + READ_CYCLES + EXPONENTIAL_CYCLES
        cycles += 1 + DIVIDE_CYCLES + 1 + WEIGHT_CYCLES + 3 + WEIGHT_CYCLES
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
    return DROP_CYCLES + max(factors).bit_length() + settings.top_k
