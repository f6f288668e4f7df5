"""What a router is: its settings, with their limits.

A router makes E logits of a token, one for each expert (with ``bias`` added), a score of each
logit, and orders the experts by a *key*: the logit, or with a selection bias the score plus that
bias. It chooses ``top_k`` of them, the lowest index first where keys are equal, drops what a mode
says, and makes weights of the scores of the chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moeaccel.config import EXPERTS_MAX, TOP_K_MAX
from moeaccel.errors import MoeAccelError
from moeaccel.router.choices import (
    GROUPS_MAX,
    MODES,
    CapacityOrder,
    Choice,
    Gates,
    GroupScore,
    Renormalize,
    Score,
    WeightOn,
)

__all__ = ["OFF", "SELECTION_BIAS_MAX", "RouterError", "RouterSettings", "names_of_mode"]

SELECTION_BIAS_MAX = 128
"""How far from 0 a selection bias may be: sums of two keys fit 32 bits."""

SCALES = (2.0**-20, 2.0**20)
"""Least and largest scale."""

OFF = {"prior": 0, "prior_keep": 0, "gates": "none"}
"""Settings of modes where they are not used, as far as that is not None."""


class RouterError(MoeAccelError, ValueError):
    """A setting or a table of a router that does not fit."""


_C = TypeVar("_C", bound=Choice)


def names_of_mode(mode: str) -> tuple[str, ...]:
    """Return the settings that a mode is for, without those that only say how."""
    return ("prior", "prior_keep") if mode == "prior" else (mode,)


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """A router, but for its weights; validated on creation, immutable after it.

    Parameters
    ----------
    experts, top_k : :class:`int`
        E, 1 to 1024 outputs of the router; of them 1 to 16 are chosen.
    score, renormalize, group_score, weight_on, capacity_order : :class:`str`
        Lower-case names of the members of :mod:`moeaccel.router.choices`.
    epsilon : :class:`float`
        Of ``sum_eps`` and ``clamp``; 0 to 1.
    scale : :class:`float`
        What weights are multiplied with at last; 2**-20 to 2**20.
    groups, keep_groups : :class:`int`
        Experts in ``groups`` equal groups, of which those with the ``keep_groups`` best scores are
        chosen from.
    bias_logits : :class:`bool`
        The selection bias is added to the logit, not to the score (Kolibri-1).
    threshold : :class:`float`, optional
        beta: a chosen expert whose score is below ``beta`` times that of the first is dropped.
    top_p : :class:`float`, optional
        Of the chosen, in their order, only so many are kept that their scores are at least that
        share of the sum of all chosen.
    prior : :class:`float`
        Added to the keys of residents, for selection only (cache prior); 0 to 2048. Keys end at
        2048, at 512 where they are scores: beyond, residents are equal.
    prior_keep : :class:`int`
        0, or 1: the expert with the largest logit is chosen in any case, and first.
    capacity : :class:`int`, optional
        Tokens of a call that an expert takes; others lose this expert.
    mixer : :class:`float`, optional
        Sparsemixer (Phi-3.5-MoE; `top_k` is 2): an expert's weight is its softmax among those
        logits s with ``(largest - s) / max(|s|, largest) <= mixer``, of the second choice without
        the first.

    gates : :class:`str`
        What shared experts weigh: the name of a member of :class:`Gates`.
    shared : :class:`int`
        With gates, so many shared experts, whose logits are behind those of the experts.

    Raises
    ------
    RouterError
        Naming the setting, its value and what it must be.
    """

    experts: int
    top_k: int
    score: str = "softmax"
    renormalize: str = "none"
    epsilon: float = 0.0
    scale: float = 1.0
    groups: int = 1
    keep_groups: int = 1
    group_score: str = "max"
    bias_logits: bool = False
    weight_on: str = "output"
    threshold: float | None = None
    top_p: float | None = None
    prior: float = 0.0
    prior_keep: int = 0
    capacity: int | None = None
    capacity_order: str = "rank"
    mixer: float | None = None
    gates: str = "none"
    shared: int = 0

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, what: str) -> None:
            if not ok:
                raise RouterError(f"{name} must be {what}, not {getattr(self, name)!r}")

        def whole(name: str, low: int, high: int, what: str = "") -> None:
            value = getattr(self, name)
            require(name, isinstance(value, int | np.integer) and not isinstance(value, bool)
                    and bool(low <= value <= high), f"from {low} to {high}{what}")
            object.__setattr__(self, name, int(value))

        def real(name: str, low: float, high: float) -> None:
            value = getattr(self, name)
            require(name, isinstance(value, int | float | np.integer | np.floating)
                    and not isinstance(value, bool) and math.isfinite(value)
                    and bool(low <= value <= high), f"from {low:g} to {high:g}")
            object.__setattr__(self, name, float(value))

        require("bias_logits", isinstance(self.bias_logits, bool), "True or False")
        for name, choices in (("score", Score), ("renormalize", Renormalize),
                              ("group_score", GroupScore), ("weight_on", WeightOn),
                              ("capacity_order", CapacityOrder), ("gates", Gates)):
            names = [choice.key for choice in choices]
            require(name, getattr(self, name) in names, f"one of {', '.join(names)}")
        whole("experts", 1, EXPERTS_MAX)
        whole("groups", 1, min(GROUPS_MAX, self.experts))
        require("groups", self.experts % self.groups == 0,
                f"a divisor of experts = {self.experts}")
        whole("keep_groups", 1, self.groups, ", the groups")
        require("keep_groups", self.keep_groups in (*range(1, TOP_K_MAX + 1), self.groups),
                f"at most {TOP_K_MAX}, or all {self.groups}")
        in_group = self.experts // self.groups
        require("group_score",
                not self.grouped or self.group_score_kind is GroupScore.MAX or in_group >= 2,
                "max where groups have one expert")
        whole("top_k", 1, TOP_K_MAX)
        kept = self.keep_groups * in_group
        require("top_k", self.top_k <= kept, f"at most {kept}, the experts of the groups kept")
        real("scale", *SCALES)
        real("epsilon", 0, 1)
        require("epsilon", self.epsilon == 0
                or self.renormalize_kind in (Renormalize.SUM_EPS, Renormalize.CLAMP),
                f"0 where renormalize is {self.renormalize}")
        require("group_score", not (self.bias_logits and self.grouped)
                or self.group_score_kind is GroupScore.MAX, "max with bias_logits")
        if self.score_kind is Score.IDENTITY:
            require("renormalize", self.renormalize_kind in (
                Renormalize.NONE, Renormalize.SOFTMAX_TOP_K),
                "none or softmax_top_k where score is identity, since scores may be negative")
            require("group_score", not self.grouped or self.group_score_kind is GroupScore.MAX,
                    "max where score is identity")
        for name, low in (("threshold", 0.0), ("top_p", 2.0**-16)):
            if getattr(self, name) is not None:
                real(name, low, 1)
                require(name, self.score_kind is not Score.IDENTITY
                        or self.renormalize_kind is Renormalize.SOFTMAX_TOP_K,
                        "None where weights are logits")
        real("prior", 0, 2048)
        whole("prior_keep", 0, 1)
        if self.capacity is not None:
            whole("capacity", 1, (1 << 31) - 1)
        if self.mixer is not None:
            real("mixer", 0, 1)
            require("top_k", self.top_k == 2, "2 with mixer")
            for name, only in (("renormalize", "none"), ("groups", 1), ("threshold", None),
                               ("top_p", None), ("prior", 0), ("prior_keep", 0),
                               ("capacity", None)):
                require(name, getattr(self, name) == only, f"{only} with mixer")

        if self.gates_kind is Gates.NONE:
            require("shared", self.shared == 0, "0 without gates: then it is the layer's affair")
        else:
            whole("shared", 1, TOP_K_MAX - self.top_k, ", the places that top_k leaves")
            require("gates", self.mixer is None and self.capacity is None,
                    "none with mixer and capacity")
        if self.gates_kind is Gates.SUM:
            require("score", self.score_kind is Score.SIGMOID, "sigmoid with gates in their sum")
            require("renormalize", self.renormalize_kind is not Renormalize.SOFTMAX_TOP_K,
                    "of scores with gates in their sum")

    def check_given(self, **given: object) -> None:
        """Refuse what a sparsemixer, which has its own selection, would not look at.

        Raises
        ------
        RouterError
            Naming what is not None.
        """
        names = [name for name, value in given.items() if value is not None]
        if self.mixer is not None and names:
            raise RouterError(f"{', '.join(names)} must be None with mixer, which chooses by the "
                              "logits alone; leave them out, or route without mixer")

    def _kind(self, choices: type[_C], key: str) -> _C:
        return choices[key.upper()]

    @property
    def score_kind(self) -> Score:
        """The score, as a member."""
        return self._kind(Score, self.score)

    @property
    def renormalize_kind(self) -> Renormalize:
        """The renormalisation, as a member."""
        return self._kind(Renormalize, self.renormalize)

    @property
    def group_score_kind(self) -> GroupScore:
        """The groups' score, as a member."""
        return self._kind(GroupScore, self.group_score)

    @property
    def gates_kind(self) -> Gates:
        """What shared experts weigh, as a member."""
        return self._kind(Gates, self.gates)

    @property
    def modes(self) -> tuple[str, ...]:
        """Those of :data:`moeaccel.router.choices.MODES` that it makes use of."""
        return tuple(mode for mode in MODES if any(
            getattr(self, name) != OFF.get(name) for name in names_of_mode(mode)))

    @property
    def outputs(self) -> int:
        """Logits of a token: of the experts, and of gates."""
        return self.experts + self.shared

    @property
    def weight_on_kind(self) -> WeightOn:
        """What weights multiply, as a member."""
        return self._kind(WeightOn, self.weight_on)

    @property
    def capacity_order_kind(self) -> CapacityOrder:
        """Who is first, as a member."""
        return self._kind(CapacityOrder, self.capacity_order)

    @property
    def biases_scores(self) -> bool:
        """Whether a selection bias is one of scores, not of logits."""
        return not self.bias_logits and self.score_kind is not Score.IDENTITY

    @property
    def grouped(self) -> bool:
        """Whether groups leave experts out."""
        return self.keep_groups < self.groups
