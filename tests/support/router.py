"""What tests of the router share: settings as the hardware has them."""

from moeaccel.interface.commands import Selection
from moeaccel.router.choices import GroupScore
from moeaccel.router.descriptor import descriptor
from moeaccel.router.tables import SCORE_BITS, significand


def form_of(settings, selection_bias=None, *, modes=(), residents=False):
    """Return the fields of ``layouts.router_form``."""
    fields = descriptor(settings, biased=selection_bias is not None, tables=True, table_address=0,
                        residents=residents)
    of_modes = {
        "threshold": {"threshold": fields["threshold"]}, "top_p": {"top_p": fields["top_p"]},
        "prior": {"prior": fields["prior"], "prior_keep": fields["prior_keep"]},
        "capacity": {"capacity": fields["capacity"], "by_priority": fields["capacity_order"]},
        "mixer": {"mixer": fields["selection"] == Selection.MIXER, "limit": fields["mixer"]},
        "gates": {"gates": fields["gates"], "outputs": settings.outputs}}
    scale, exponent = significand(settings.scale)
    return {
        "experts": settings.experts, "top_k": settings.top_k, "score": settings.score_kind,
        "by_logits": fields["selection"] != Selection.BIASED_SCORE, "grouped": settings.grouped,
        "top2": settings.grouped and settings.group_score_kind is GroupScore.TOP2_SUM,
        "group_size": settings.experts // settings.groups, "keep_groups": settings.keep_groups,
        "renormalize": settings.renormalize_kind,
        "epsilon": round(settings.epsilon * 2**SCORE_BITS),
        "scale": scale, "scale_exponent": exponent,
        "tables": True, "shared": settings.shared,
        **{name: value for mode in modes for name, value in of_modes[mode].items()},
    }

