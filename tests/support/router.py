"""What tests of the router share: settings as the hardware has them."""

import numpy as np

from moeaccel.router.choices import GroupScore, Score
from moeaccel.router.tables import KEY_BITS, LOGIT_BITS, SCORE_BITS, fixed, significand

NEVER = -(1 << 31)


def by_logits(settings, selection_bias):
    """Return whether keys are logits."""
    return (selection_bias is None or settings.bias_logits
            or settings.score_kind is Score.IDENTITY)


def form_of(settings, selection_bias=None):
    """Return the fields of ``layouts.router_form``."""
    scale, exponent = significand(settings.scale)
    return {
        "experts": settings.experts, "top_k": settings.top_k, "score": settings.score_kind,
        "by_logits": by_logits(settings, selection_bias), "grouped": settings.grouped,
        "top2": settings.grouped and settings.group_score_kind is GroupScore.TOP2_SUM,
        "group_size": settings.experts // settings.groups, "keep_groups": settings.keep_groups,
        "renormalize": settings.renormalize_kind,
        "epsilon": round(settings.epsilon * 2**SCORE_BITS),
        "scale": scale, "scale_exponent": exponent,
    }


def tables_of(settings, bias=None, selection_bias=None, resident=None):
    """Return what is written into the router's two tables."""
    zeros = np.zeros(settings.experts)
    bits = LOGIT_BITS if by_logits(settings, selection_bias) else KEY_BITS
    extra = fixed(zeros if selection_bias is None else selection_bias, bits)[0]
    if resident is not None:
        extra = np.where(resident, extra, NEVER)
    return fixed(zeros if bias is None else bias, LOGIT_BITS)[0], extra
