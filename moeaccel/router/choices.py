"""What a setting of a router may be, with the codes that commands have for it."""

from __future__ import annotations

import enum

__all__ = [
    "GROUPS_MAX", "MODES", "PART_BITS", "CapacityOrder", "Choice", "Gates", "GroupScore",
    "Renormalize", "Score", "WeightOn"]

GROUPS_MAX = 64
"""Most groups of a router."""

MODES = ("threshold", "top_p", "prior", "capacity", "mixer", "gates")
"""Settings of a router that hardware has only where its configuration asks for them; ``prior`` is
for ``prior_keep`` as well, ``capacity`` for ``capacity_order``."""

PART_BITS = 16
"""Fraction bits of ``threshold`` and ``top_p``."""


class Choice(enum.IntEnum):
    """A setting that is one of several; its value is its code in commands."""

    text: str

    def __new__(cls, code: int, text: str = "") -> Choice:
        """Return the member of that code, described by the text."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.text = text
        return member

    @property
    def key(self) -> str:
        """Name for users: lower case."""
        return self.name.lower()


class Score(Choice):
    """The score of a logit s."""

    SOFTMAX = 0, "p = exp(s) / sum over all experts of exp"
    SIGMOID = 1, "1 / (1 + exp(-s))"
    SQRT_SOFTPLUS = 2, "sqrt(log(1 + exp(s)))"
    IDENTITY = 3, "s"


class Renormalize(Choice):
    """How the scores q of the chosen become weights, before the scale."""

    NONE = 0, "q"
    SUM = 1, "q / sum of q over the chosen"
    SUM_EPS = 2, "q / (sum of q over the chosen + epsilon)"
    CLAMP = 3, "q / max(sum of q over the chosen, epsilon)"
    SOFTMAX_TOP_K = 4, "softmax of the chosen logits; the score is not used"


class GroupScore(Choice):
    """The score of a group of experts, of its members' keys."""

    MAX = 0, "the largest key"
    TOP2_SUM = 1, "the sum of the two largest scores with selection bias"


class WeightOn(Choice):
    """What a weight multiplies."""

    OUTPUT = 0, "the expert's output"
    INPUT = 1, "x, before the expert (Llama 4)"


class Gates(Choice):
    """What a shared expert, to which every token goes, weighs."""

    NONE = 0, "1"
    SIGMOID = 1, "the sigmoid of a logit of its own, behind those of the experts"
    SUM = 2, "that, renormalised and scaled as the scores of the chosen are, in one sum with them"


class CapacityOrder(Choice):
    """Who is first when an expert has a capacity."""

    RANK = 0, "every token's first choice before any second one; then by token"
    PRIORITY = 1, "as RANK, but tokens with the larger first score before others"
