"""A router as the device reads it: the fields of its descriptor, and its table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moeaccel.interface.commands import ENTRY_BYTES, Selection
from moeaccel.router.choices import PART_BITS, CapacityOrder, Gates, GroupScore, Renormalize, Score
from moeaccel.router.settings import RouterSettings
from moeaccel.router.tables import (
    KEY_BITS,
    LOGIT_BITS,
    NEVER,
    SCORE_BITS,
    fixed,
    part,
)

__all__ = ["descriptor", "settings_of", "table_bytes", "table_words"]


def descriptor(settings: RouterSettings, *, biased: bool, tables: bool, table_address: int,
               shared: int = 0, residents: bool = False) -> dict[str, int]:
    """Return the fields of :data:`moeaccel.interface.commands.ROUTER`.

    Parameters
    ----------
    biased : :class:`bool`
        It has a selection bias.
    tables : :class:`bool`
        Its table, at that address, is to be read.
    shared : :class:`int`
        Experts behind those routed to that every token goes to, where they have no gates.
    residents : :class:`bool`
        Those that ``settings.prior`` is for are in the table, or alone at its address.
    """
    selection = Selection.LOGIT
    if settings.mixer is not None:
        selection = Selection.MIXER
    elif biased:
        selection = Selection.BIASED_SCORE if settings.biases_scores else Selection.BIASED_LOGIT
    grouped = settings.grouped
    prior = int(fixed(np.array(settings.prior), _key_bits(settings, biased))[0])
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
        "shared": settings.shared or shared,
        "scale": int(np.float32(settings.scale).view(np.uint32)),
        "epsilon": round(settings.epsilon * 2**SCORE_BITS),
        "table_address": table_address if tables or residents else 0,
        "threshold": part(settings.threshold or 0),
        "prior_keep": settings.prior_keep,
        "top_p": part(settings.top_p or 0),
        "capacity_order": settings.capacity_order_kind,
        "prior": prior if residents else 0,
        "capacity": settings.capacity or 0,
        "gates": settings.gates_kind,
        "mixer": round((settings.mixer or 0) * 2**LOGIT_BITS),
    }


def _key_bits(settings: RouterSettings, biased: bool) -> int:
    """Return the fraction bits of keys."""
    return KEY_BITS if biased and settings.biases_scores else LOGIT_BITS


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
        bias_logits=fields["selection"] == Selection.BIASED_LOGIT,
        threshold=fields["threshold"] / 2**PART_BITS or None,
        top_p=fields["top_p"] / 2**PART_BITS or None,
        prior=fields["prior"] / 2**(
            KEY_BITS if fields["selection"] == Selection.BIASED_SCORE else LOGIT_BITS),
        prior_keep=fields["prior_keep"], capacity=fields["capacity"] or None,
        capacity_order=CapacityOrder(fields["capacity_order"]).key,
        gates=Gates(fields["gates"]).key, shared=fields["shared"] if fields["gates"] else 0,
        mixer=(fields["mixer"] / 2**LOGIT_BITS if fields["selection"] == Selection.MIXER
               else None))


def table_words(
    settings: RouterSettings,
    bias: NDArray[np.floating] | None = None,
    selection_bias: NDArray[np.floating] | None = None,
    resident: NDArray[np.bool_] | None = None,
) -> NDArray[np.int32]:
    """Return a router's table, int32 (E, 2): what is added to logits, and to keys."""
    zeros = np.zeros(settings.experts)
    extra = fixed(zeros if selection_bias is None else np.asarray(selection_bias, np.float64),
                  _key_bits(settings, selection_bias is not None))[0]
    if resident is not None:
        extra = np.where(resident, extra, NEVER)
    added = fixed(zeros if bias is None else np.asarray(bias, np.float64), LOGIT_BITS)[0]
    return np.stack([added, extra], axis=1).astype(np.int32)


def table_bytes(words: NDArray[np.int32] | None, residents: NDArray[np.bool_] | None
                ) -> NDArray[np.uint8]:
    """Return what lies at a descriptor's ``table_address``: a table, residents, or both."""
    parts = [np.zeros(0, np.uint8) if words is None else words.reshape(-1).view(np.uint8),
             np.zeros(0, np.uint8) if residents is None
             else np.packbits(residents, bitorder="little")]
    return np.concatenate([np.pad(one, (0, -one.size % ENTRY_BYTES)) for one in parts])
