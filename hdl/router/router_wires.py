"""What the parts of a token's router tell each other."""

import enum

from amaranth import *

from moeaccel.config import TOP_K_MAX
from moeaccel.hdl import layouts
from moeaccel.hdl.layouts import SCORE_WIDTH
from moeaccel.hdl.router.leading import WIDTH
from moeaccel.router.choices import GROUPS_MAX
from moeaccel.router.tables import WORD_BITS

__all__ = ["Pass", "Wires"]


class Pass(enum.IntEnum):
    """What is done with a token's logits, one a cycle."""

    SUM = 0
    """Add up exponentials: all scores need the sum."""
    GROUPS = 1
    """Find the best groups."""
    SELECT = 2
    """Find the best experts; add up exponentials if only weights need the sum."""
    LARGEST = 3
    """Of the chosen: the largest logit."""
    CHOSEN = 4
    """Of the chosen: scores and their sum."""
    MIX = 5
    """Of a sparsemixer's choice: add up exponentials of the logits near it."""
    GATES = 6
    """Of shared experts: scores, and perhaps their sum with those of the chosen."""


class Wires:
    """What the parts of a router tell each other."""

    def __init__(self, config):
        id_bits = layouts.expert_bits(config)
        self.id_bits = id_bits
        self.places = config.router_top_k
        self.slots = TOP_K_MAX if "gates" in config.router_modes else self.places
        # A token's logits.
        self.full = Signal()
        self.most = Signal(signed(WORD_BITS))
        self.most_id = Signal(id_bits)
        self.freed = Signal()
        # A pass.
        self.kind = Signal(Pass)
        self.feeding = Signal()
        self.at = Signal(range(config.max_experts + 1))
        self.at_last = Signal()
        self.read_address = Signal(id_bits)
        self.read_data = Signal(signed(WORD_BITS))
        self.over = Signal()  # its last score or key
        self.settled = Signal()  # and all that follows from it
        self.total = Signal(WIDTH)
        # Of the form.
        self.direct = Signal()  # keys are the logits of this pass
        self.scored = Signal()  # this pass needs scores
        self.early_sum = Signal()
        self.softmax_of_chosen = Signal()
        self.mixes = Signal()
        self.added = Signal()  # what the table has for keys
        # A sparsemixer.
        self.second = Signal()  # of its choices
        self.near = Signal()  # with the exponential of a logit: it is added
        # Selection.
        self.kept = Signal(GROUPS_MAX)
        self.inverted = Signal()  # the weight unit is given a reciprocal, to make a factor of it
        self.factoring = Signal()
        self.weighing = Signal()  # scores of the chosen go to the weight unit
        self.room = Signal()  # for the pairs of a token
        self.pair_made = Signal()
        self.largest = Signal(signed(WORD_BITS))
        self.first = Signal(SCORE_WIDTH)  # of the first chosen
        self.drops, self.dropping = Signal(), Signal()
        self.left = Signal(self.places)  # the chosen that are not dropped
        # Gates of shared experts.
        self.gated = Signal()  # there are some
        self.gates = Signal()  # this pass is theirs
        self.gating = Signal()  # the chosen have their weights: now they
        self.own_last = Signal()  # of the pairs of the chosen
