"""A router as the device reads it: the fields of its descriptor, and its table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moeaccel.interface.commands import Selection
from moeaccel.router.choices import GroupScore, Renormalize, Score
from moeaccel.router.settings import RouterSettings
from moeaccel.router.tables import KEY_BITS, LOGIT_BITS, NEVER, SCORE_BITS, fixed

__all__ = ["descriptor", "settings_of", "table_words"]


def descriptor(settings: RouterSettings, *, biased: bool, tables: bool, table_address: int,
               shared: int = 0) -> dict[str, int]:
    """Return the fields of :data:`moeaccel.interface.commands.ROUTER`.

    Parameters
    ----------
    biased : :class:`bool`
        It has a selection bias.
    tables : :class:`bool`
        Its table, at that address, is to be read.
    shared : :class:`int`
        Experts behind those routed to that every token goes to.
    """
    selection = Selection.LOGIT
    if biased:
        selection = Selection.BIASED_SCORE if settings.biases_scores else Selection.BIASED_LOGIT
    grouped = settings.grouped
    return {
        "score": settings.score_kind,
        "renormalize": settings.renormalize_kind,
        "group_score": settings.group_score_kind if grouped else GroupScore.MAX,
        "selection": selection,
        "num_experts": settings.experts,
        "groups": settings.groups if grouped else 1,
        "group_size": settings.experts // settings.groups if grouped else settings.experts,
        "keep_groups": settings.keep_groups if grouped else 1,
        "tables": int(tables),
        "shared": shared,
        "scale": int(np.float32(settings.scale).view(np.uint32)),
        "epsilon": round(settings.epsilon * 2**SCORE_BITS),
        "table_address": table_address if tables else 0,
    }


def settings_of(fields: Mapping[str, int], top_k: int) -> RouterSettings:
    """Return the settings of a descriptor whose fields are good, alone and together.

    Parameters
    ----------
    top_k : :class:`int`
        Of the submission, with shared experts.
    """
    return RouterSettings(
        experts=fields["num_experts"], top_k=top_k - fields["shared"],
        score=Score(fields["score"]).key,
        renormalize=Renormalize(fields["renormalize"]).key,
        epsilon=fields["epsilon"] / 2**SCORE_BITS,
        scale=float(np.uint32(fields["scale"]).view(np.float32)), groups=fields["groups"],
        keep_groups=fields["keep_groups"], group_score=GroupScore(fields["group_score"]).key,
        bias_logits=fields["selection"] == Selection.BIASED_LOGIT)


def table_words(
    settings: RouterSettings,
    bias: NDArray[np.floating] | None = None,
    selection_bias: NDArray[np.floating] | None = None,
    resident: NDArray[np.bool_] | None = None,
) -> NDArray[np.int32]:
    """Return a router's table, int32 (E, 2): what is added to logits, and to keys."""
    zeros = np.zeros(settings.experts)
    biased = selection_bias is not None and settings.biases_scores
    extra = fixed(zeros if selection_bias is None else np.asarray(selection_bias, np.float64),
                  KEY_BITS if biased else LOGIT_BITS)[0]
    if resident is not None:
        extra = np.where(resident, extra, NEVER)
    added = fixed(zeros if bias is None else np.asarray(bias, np.float64), LOGIT_BITS)[0]
    return np.stack([added, extra], axis=1).astype(np.int32)
