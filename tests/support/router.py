"""What tests of the router share: settings as the hardware has them."""

from moeaccel.router.choices import GroupScore
from moeaccel.router.tables import SCORE_BITS, significand


def by_logits(settings, selection_bias):
    """Return whether keys are logits."""
    return selection_bias is None or not settings.biases_scores


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
        "tables": True, "shared": 0,
    }

