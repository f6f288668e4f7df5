"""Routing of one token after another: logits in, experts and weights out."""

import numpy as np
from amaranth import *
from amaranth.lib import data, fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from moeaccel.config import TOP_K_MAX, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.layouts import SCORE_WIDTH
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.router.dropper import Dropper
from moeaccel.hdl.router.group_keys import GroupKeys
from moeaccel.hdl.router.leading import WIDTH, Leading
from moeaccel.hdl.router.line_table import LineTable
from moeaccel.hdl.router.logit_banks import LogitBanks
from moeaccel.hdl.router.near_logits import NearLogits
from moeaccel.hdl.router.router_wires import Pass, Wires
from moeaccel.hdl.router.score_unit import ScoreMode, ScoreUnit
from moeaccel.hdl.router.top_selector import TopSelector
from moeaccel.hdl.router.weight_unit import WeightUnit
from moeaccel.hdl.unchecked_memory import unchecked_memory
from moeaccel.router.choices import GROUPS_MAX, Gates, Renormalize, Score
from moeaccel.router.tables import (
    KEY_BITS,
    NEVER,
    RECIPROCAL,
    SCORE_BITS,
    VALUE_BITS,
    WORD_BITS,
    WORD_MAX,
    WORD_MIN,
    exponential,
)

__all__ = ["DIVIDE_CYCLES", "SETTLE_CYCLES", "TokenRouter"]

_ONE = int(exponential(np.array(0)).score)
"""The exponential of a sparsemixer's choice, which is the largest itself."""
_FIRST = (1 << WORD_BITS) - 1
"""Above every key."""

DIVIDE_CYCLES = Leading.LATENCY_CYCLES + LineTable.LATENCY_CYCLES + 1
"""From a sum to its reciprocal."""

SETTLE_CYCLES = 8
"""From the last score of a pass to the selector's last key, and one more; a prior takes four."""


class TokenRouter(wiring.Component):
    """Turn the logits of tokens into experts and weights.

    Golden model: ``moeaccel/golden/router.py``, with the modes that the configuration has::

        i_logit --> + bias --> [two tokens' logits] --> ScoreUnit --> + selection bias --> [groups]
                                       ^     |                              |                  |
                                       |     +---- (keys are logits) -------+---> TopSelector <+
                                       +------------------ the chosen --------------- |
                                                             |
                             o_pair <-- WeightUnit <-- Dropper <-- [sum, reciprocal]

    A token's logits are read in passes: all of them once for the keys, once before that if scores
    need the sum of exponentials first, and once if groups leave experts out; then those of the
    chosen. Meanwhile the next token's are loaded. A sparsemixer has one for each of its choices in
    place of the last.

    Throughput: a token every ``moeaccel.cycles.token_router`` cycles; one logit a cycle comes in,
    and stalls while two tokens' are there. Pairs come one a cycle. Reset: empty.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With a router.
    family : :class:`str`
        FPGA family: see :class:`~moeaccel.hdl.array.multiplier.Multiplier`.

    Members
    -------
    i_form : :py:`In(layouts.router_form(config))`
        Holds from the first logit to the last pair.
    bias_w_en, bias_w_address, bias_w_data : :py:`In`
        Write port of what is added to the logits, signed(32). Between tokens.
    extra_w_en, extra_w_address, extra_w_data : :py:`In`
        Write port of the selection bias, signed(32), in units of a logit or, where keys are scores,
        of 2**-22. The least number: this expert is never chosen. Between tokens. Neither memory is
        looked at where the form has no tables.
    resident_w_en, resident_w_address, resident_w_data : :py:`In`
        Write port of residents, 32 to a word; looked at where the form has a prior. With that mode.
    i_capped, o_next, i_left : :py:`In(1)`, :py:`Out(1)`, :py:`In(1)`
        Capacities count, between tokens; whether they leave the next pair, a cycle after it is
        asked for. With that mode.
    i_logit : :py:`In(stream.Signature(layouts.fixed_logit()))`
        ``i_form.experts`` for each token.
    o_saturated : :py:`Out(1)`
        Pulse for each logit that is beyond its range, with its bias or before.
    o_pair : :py:`Out(stream.Signature(layouts.routed_pair(config)))`
        ``i_form.top_k`` for each token.
    o_idle : :py:`Out(1)`
        No token has been begun.
    o_moves : :py:`Out(1)`
        A logit of a pass is read.
    """

    def __init__(self, config, family="generic"):
        if not isinstance(config, AcceleratorConfig) or not config.router:
            raise TypeError(f"config must be an AcceleratorConfig with a router, not {config!r}")
        self._config = config
        self._family = family
        address = layouts.expert_bits(config)
        super().__init__({
            "i_form": In(layouts.router_form(config)),
            "bias_w_en": In(1), "bias_w_address": In(address),
            "bias_w_data": In(signed(WORD_BITS)),
            "extra_w_en": In(1), "extra_w_address": In(address),
            "extra_w_data": In(signed(WORD_BITS)),
            **({"resident_w_en": In(1), "resident_w_address": In(ceil_log2(
                -(-config.max_experts // 32))), "resident_w_data": In(32)}
               if "prior" in config.router_modes else {}),
            **({"i_capped": In(1), "o_next": Out(1), "i_left": In(1)}
               if "capacity" in config.router_modes else {}),
            "i_logit": In(stream.Signature(layouts.fixed_logit())),
            "o_saturated": Out(1),
            "o_pair": Out(stream.Signature(layouts.routed_pair(config))),
            "o_idle": Out(1),
            "o_moves": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        w = Wires(self._config)
        m.submodules.selector = selector = TopSelector(
            w.places, key_bits=WORD_BITS + 1, id_bits=max(w.id_bits, ceil_log2(GROUPS_MAX)))
        m.submodules.unit = unit = ScoreUnit(
            self._config.router_scores,
            tag_bits=len(Value.cast(Signal(self._tag(w)))), family=self._family)
        m.submodules.weights = weights = WeightUnit(self._family)
        self._decide(m, w)
        self._load(m, w)
        self._feed(m, w, unit, selector)
        self._select(m, w, unit, selector)
        scores = self._chosen(m, w, unit)
        dropper = self._drop(m, w, selector, scores) if self._config.router_drops else None
        self._control(m, w, unit, selector, weights, dropper)
        self._emit(m, w, selector, weights, scores, dropper)
        return m

    @staticmethod
    def _tag(w):
        return data.StructLayout({"id": w.id_bits, "some": 1, "last": 1})

    def _decide(self, m, w):
        """Say what a pass is, of its kind and the form."""
        form = self.i_form
        softmax = form.score == Score.SOFTMAX
        group_scores = ~form.by_logits | form.top2
        m.d.comb += [
            w.softmax_of_chosen.eq(form.renormalize == Renormalize.SOFTMAX_TOP_K),
            w.early_sum.eq(softmax & (~form.by_logits | (form.grouped & form.top2))),
            w.added.eq(form.tables & ~w.mixes),
        ]
        if "mixer" in self._config.router_modes:
            m.d.comb += w.mixes.eq(form.mixer)
        if "gates" in self._config.router_modes:
            m.d.comb += [w.gated.eq(form.gates != Gates.NONE), w.gates.eq(w.kind == Pass.GATES)]
        with m.Switch(w.kind):
            with m.Case(Pass.SUM, Pass.CHOSEN, Pass.MIX, Pass.GATES):
                m.d.comb += w.scored.eq(1)
            with m.Case(Pass.GROUPS):
                m.d.comb += [w.direct.eq(~group_scores), w.scored.eq(group_scores)]
            with m.Case(Pass.SELECT):
                m.d.comb += [
                    w.direct.eq(form.by_logits),
                    w.scored.eq(~form.by_logits
                                | (softmax & ~w.early_sum & ~w.softmax_of_chosen & ~w.mixes))]
            with m.Case(Pass.LARGEST):
                m.d.comb += w.direct.eq(1)

    def _load(self, m, w):
        """Take logits, and keep them."""
        m.submodules.banks = banks = LogitBanks(self._config)
        for name in ("bias_w_en", "bias_w_address", "bias_w_data", "i_form"):
            m.d.comb += getattr(banks, name).eq(getattr(self, name))
        wiring.connect(m, outside=wiring.flipped(self.i_logit), banks=banks.i_logit)
        m.d.comb += [
            banks.i_address.eq(w.read_address), w.read_data.eq(banks.o_logit),
            banks.i_freed.eq(w.freed), w.full.eq(banks.o_full), w.most.eq(banks.o_most),
            w.most_id.eq(banks.o_most_id),
            self.o_saturated.eq(banks.o_saturated), self.o_idle.eq(banks.o_idle),
        ]

    def _feed(self, m, w, unit, selector):
        """Read a pass's logits and give them to the score unit."""
        form = self.i_form
        of_chosen = (w.kind == Pass.LARGEST) | (w.kind == Pass.CHOSEN)
        mixing = w.kind == Pass.MIX
        some = Signal()
        place = w.at[:ceil_log2(w.places)] if w.places > 1 else C(0, 1)


        def ends(count):
            """Return whether this is the last of so many, known a cycle before."""
            last = Signal()
            m.d.sync += last.eq(
                Mux(w.feeding & ~w.at_last, w.at + 2 == count, count == 1))
            return last

        m.d.comb += [
            # The largest logit that a sparsemixer looks for is that of its present choice.
            w.at_last.eq(Mux(of_chosen, Mux(w.mixes, w.at == w.second, ends(form.top_k)),
                             Mux(w.gates, ends(form.shared), ends(form.experts)))),
            w.read_address.eq(Mux(of_chosen, selector.o_ids[place],
                                  w.at + Mux(w.gates, form.experts, 0))),
            some.eq(Mux(of_chosen, selector.o_some.bit_select(place, 1),
                        ~(w.mixes & w.second & (w.at == selector.o_ids[0])))),
        ]
        m.d.comb += self.o_moves.eq(w.feeding)
        with m.If(w.feeding):
            m.d.sync += w.at.eq(Mux(w.at_last, 0, w.at + 1))
            with m.If(w.at_last):
                m.d.sync += w.feeding.eq(0)
        pipe = Pipeline(m, w.feeding, name="feed")
        s = pipe.stage(id=w.read_address, some=some, last=w.at_last)
        w.read_id = s.id
        # Block RAM is slow to answer: a register behind it, ahead of everything else.
        s = pipe.stage(id=s.id, some=s.some, last=s.last, logit=w.read_data)
        w.fed_valid, w.fed = pipe.valid, s
        tag = Signal(self._tag(w))
        m.d.comb += [tag.id.eq(s.id), tag.some.eq(s.some), tag.last.eq(s.last)]

        relative = Signal()
        m.d.comb += relative.eq(
            (w.kind == Pass.SUM)
            | ((w.kind == Pass.SELECT) & form.by_logits)
            | ((w.kind == Pass.CHOSEN) & w.softmax_of_chosen) | mixing)
        m.d.comb += [
            unit.i_valid.eq(pipe.valid & w.scored), unit.i_logit.eq(s.logit), unit.i_tag.eq(tag)]
        # A pass's first logit comes two cycles after its kind.
        m.d.sync += [
            unit.i_reference.eq(Mux(((w.kind == Pass.CHOSEN) & w.softmax_of_chosen) | mixing,
                                    w.largest, w.most)),
            unit.i_mode.eq(ScoreMode.EXPONENTIAL),
        ]
        with m.If(~relative):
            with m.Switch(form.score):
                with m.Case(Score.SOFTMAX):
                    m.d.sync += unit.i_mode.eq(ScoreMode.QUOTIENT)
                with m.Case(Score.SIGMOID):
                    m.d.sync += unit.i_mode.eq(ScoreMode.SIGMOID)
                with m.Case(Score.SQRT_SOFTPLUS):
                    m.d.sync += unit.i_mode.eq(ScoreMode.SQRT_SOFTPLUS)
        with m.If(w.gates):
            m.d.sync += unit.i_mode.eq(ScoreMode.SIGMOID)

        # Compared while the one before it is taken, with what will be the largest then.
        due = Pipeline(m, pipe.valid & s.some & (w.kind == Pass.LARGEST), name="largest")
        one = due.stage(logit=s.logit)
        larger, unused = Signal(), Signal()
        m.d.sync += [
            larger.eq(w.mixes | Mux(due.valid & larger, s.logit > one.logit, s.logit > w.largest)),
            unused.eq(~of_chosen & ~mixing),
        ]
        with m.If(due.valid & larger):
            m.d.sync += w.largest.eq(one.logit)
        with m.If(unused):
            m.d.sync += w.largest.eq(WORD_MIN)
        m.d.comb += w.near.eq(1)
        if "mixer" in self._config.router_modes:
            m.submodules.nearness = nearness = NearLogits(
                unit.latency_cycles(ScoreMode.EXPONENTIAL))
            m.d.comb += [
                nearness.i_limit.eq(form.limit), nearness.i_largest.eq(w.largest),
                nearness.i_logit.eq(s.logit), w.near.eq(~mixing | nearness.o_near),
            ]

    def _select(self, m, w, unit, selector):
        """Make keys, of groups or of experts, and give them to the selector."""
        form = self.i_form
        write, read = unchecked_memory(m, "extra", signed(WORD_BITS), 1 << w.id_bits)
        scored = Signal(self._tag(w))
        m.d.comb += [
            write.en.eq(self.extra_w_en), write.addr.eq(self.extra_w_address),
            write.data.eq(self.extra_w_data),
            scored.eq(unit.o_tag),
            read.addr.eq(Mux(w.direct, w.read_id, scored.id)),
        ]
        selecting = (w.kind == Pass.GROUPS) | (w.kind == Pass.SELECT)
        score = Pipeline(m, unit.o_valid, name="scored")
        behind = score.stage(value=unit.o_score[SCORE_BITS - KEY_BITS:], tag=unit.o_tag)
        behind_tag = Signal(self._tag(w))
        m.d.comb += behind_tag.eq(behind.tag)

        pipe = Pipeline(
            m, Mux(w.direct, w.fed_valid, score.valid) & selecting, name="key")
        s = pipe.stage(
            key=Mux(w.direct, w.fed.logit, Cat(behind.value, C(0, 1)).as_signed()),
            extra=read.data, id=Mux(w.direct, w.fed.id, behind_tag.id))
        s = pipe.stage(key=s.key + Mux(w.added, s.extra, 0),
                       never=w.added & (s.extra == NEVER), id=s.id)
        s = pipe.stage(
            key=Mux(s.never | (s.key < WORD_MIN), WORD_MIN, Mux(s.key > WORD_MAX, WORD_MAX, s.key))[
                :WORD_BITS].as_signed(), never=s.never, id=s.id)
        first = C(0)
        if "prior" in self._config.router_modes:
            s, first = self._prefer(m, w, pipe, s)
        grouping = w.kind == Pass.GROUPS
        m.submodules.groups = groups = GroupKeys(self._config)
        m.d.comb += [
            groups.i_form.eq(form), groups.i_clear.eq(w.settled),
            groups.i_valid.eq(pipe.valid), groups.i_key.eq(s.key),
        ]
        allowed = first | ((~form.grouped | w.kept.bit_select(groups.o_at, 1)) & ~s.never)
        m.d.comb += [
            selector.i_valid.eq(Mux(grouping, groups.o_valid, pipe.valid & allowed)),
            selector.i_key.eq(Mux(grouping, groups.o_key, Mux(first, _FIRST, s.key))),
            selector.i_id.eq(Mux(grouping, groups.o_group, s.id)),
            w.over.eq(Mux(w.scored, unit.o_valid & scored.last,
                          w.fed_valid & w.fed.last)),
        ]

    def _prefer(self, m, w, pipe, s):
        """Add the prior to keys of residents; return the stage, and whether its key is first."""
        form = self.i_form
        write, read = unchecked_memory(m, "residents", 32, -(-self._config.max_experts // 32))
        m.d.comb += [
            write.en.eq(self.resident_w_en), write.addr.eq(self.resident_w_address),
            write.data.eq(self.resident_w_data), read.addr.eq(s.id >> 5),
        ]
        none = (w.kind == Pass.GROUPS) & form.top2
        s = pipe.stage(key=s.key, never=s.never, id=s.id)
        s = pipe.stage(**vars(s), prefer=read.data.bit_select(s.id[:5], 1) & ~none)
        s = pipe.stage(key=s.key + Mux(s.prefer, form.prior, 0), never=s.never, id=s.id,
                       first=form.prior_keep & (s.id == w.most_id))
        s = pipe.stage(key=Mux(s.key > WORD_MAX, WORD_MAX, s.key)[:WORD_BITS].as_signed(),
                       never=s.never, id=s.id, first=s.first)
        return s, s.first

    def _chosen(self, m, w, unit):
        """Add up scores, and keep those of the chosen and of gates; return their read port."""
        modes = self._config.router_modes
        m.submodules.scores = scores = memory.Memory(
            shape=SCORE_WIDTH, depth=1 << max(1, ceil_log2(w.slots)), init=[])
        write, read = scores.write_port(), scores.read_port()
        tag = Signal(self._tag(w))
        place = Signal(len(write.addr))
        value = Mux(tag.some & w.near, unit.o_score, 0)
        chosen = w.kind == Pass.CHOSEN
        apart = w.gates & (self.i_form.gates == Gates.SIGMOID) if "gates" in modes else 0
        m.d.comb += [
            tag.eq(unit.o_tag),
            write.en.eq(unit.o_valid & (chosen | w.gates)), write.addr.eq(place),
            write.data.eq(value),
        ]
        with m.If(unit.o_valid):
            m.d.sync += w.total.eq(w.total + Mux(apart, 0, value))
            with m.If(chosen | w.gates):  # gates come behind
                m.d.sync += place.eq(Mux(tag.last & ~(chosen & w.gated), 0, place + 1))
                with m.If(place == 0):
                    m.d.sync += w.first.eq(value)
        return read

    def _drop(self, m, w, selector, scores):
        """Drop what modes drop of the chosen; return who does it."""
        form, modes = self.i_form, self._config.router_modes
        m.submodules.dropper = dropper = Dropper(self._config)
        m.d.comb += [
            dropper.i_form.eq(form), dropper.i_some.eq(selector.o_some),
            dropper.i_first.eq(w.first), dropper.i_total.eq(w.total),
            dropper.score_data.eq(scores.data),
        ]
        if "capacity" in modes:
            m.d.comb += [dropper.i_capped.eq(self.i_capped), self.o_next.eq(dropper.o_next),
                         dropper.i_left.eq(self.i_left)]
        # It holds for all tokens: a register, ahead of the states.
        m.d.sync += w.drops.eq(
            Cat(form[name].any() for name in ("threshold", "top_p") if name in modes).any()
            | dropper.i_capped)
        return dropper

    def _control(self, m, w, unit, selector, weights, dropper):
        """Go through the passes of a token, then make its weights."""
        form = self.i_form
        m.submodules.leading = leading = Leading()
        m.submodules.reciprocal = reciprocal = LineTable(RECIPROCAL, family=self._family)
        divisor = Signal(WIDTH)
        factor, power = weights.i_factor, weights.i_power
        m.d.comb += [weights.i_value.eq(reciprocal.o_value), leading.i_value.eq(divisor),
                     reciprocal.i_position.eq(leading.o_mantissa[:VALUE_BITS])]
        softmax = form.score == Score.SOFTMAX
        keys = SETTLE_CYCLES + (4 if "prior" in self._config.router_modes else 0)
        longest = max(keys + TopSelector.LATENCY_CYCLES, DIVIDE_CYCLES)
        wait = Signal(range(longest + 1))
        place = Signal(range(max(TOP_K_MAX, GROUPS_MAX) + 1))
        all_kept = Signal()  # with this place, known a cycle before

        def start(kind):
            m.d.sync += [w.kind.eq(kind), w.feeding.eq(1)]
            m.next = "PASS"

        def begin():
            """Begin with groups, or with experts."""
            m.d.comb += selector.i_clear.eq(1)
            with m.If(form.grouped):
                start(Pass.GROUPS)
            with m.Else():
                start(Pass.SELECT)

        def weigh():
            """Go on with gates, or with what scores are divided by."""
            m.next = "DIVISOR"
            if "gates" in self._config.router_modes:
                with m.If(w.gated):
                    m.next = "GATES"

        m.d.sync += [wait.eq(Mux(wait == 0, 0, wait - 1)), all_kept.eq(form.keep_groups == 1)]
        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += [w.total.eq(0), w.kept.eq(0), place.eq(0), w.second.eq(0),
                             w.gating.eq(0)]
                with m.If(w.full):
                    with m.If(w.early_sum):
                        start(Pass.SUM)
                    with m.Else():
                        begin()
            with m.State("PASS"):
                with m.If(w.over):
                    m.d.sync += wait.eq(longest)
                    m.next = "SUM_UP"
            with m.State("SUM_UP"):
                m.d.sync += divisor.eq(w.total)
                with m.Switch(w.kind):
                    with m.Case(Pass.LARGEST):
                        m.d.sync += w.total.eq(0)
                        with m.If(w.mixes):
                            start(Pass.MIX)
                        with m.Else():
                            start(Pass.CHOSEN)
                    with m.Case(Pass.CHOSEN, Pass.MIX):
                        weigh()
                        if dropper is not None:
                            m.d.sync += w.left.eq(selector.o_some)
                            with m.If(w.drops):
                                m.d.comb += dropper.i_start.eq(1)
                                m.next = "DROP"
                    with m.Case(Pass.GATES):
                        m.next = "DIVISOR"
                    with m.Default():
                        m.next = "SETTLE"
            with m.State("SETTLE"):
                # The selector has its last keys, and the sum its reciprocal.
                m.d.sync += w.total.eq(0)
                with m.If(wait == 0):
                    m.d.comb += w.settled.eq(1)
                    with m.If((w.kind == Pass.SUM)
                              | ((w.kind == Pass.SELECT) & softmax & ~w.early_sum)):
                        m.d.sync += [unit.i_reciprocal.eq(reciprocal.o_value),
                                     unit.i_position.eq(leading.o_position)]
                    with m.Switch(w.kind):
                        with m.Case(Pass.SUM):
                            begin()
                        with m.Case(Pass.GROUPS):
                            m.next = "KEEP"
                        with m.Default():
                            with m.If(w.softmax_of_chosen | w.mixes):
                                start(Pass.LARGEST)
                            with m.Else():
                                start(Pass.CHOSEN)
            with m.State("KEEP"):
                index = place[:ceil_log2(w.places)] if w.places > 1 else C(0, 1)
                m.d.sync += [
                    w.kept.bit_select(selector.o_ids[index][:ceil_log2(GROUPS_MAX)], 1).eq(1),
                    place.eq(place + 1), all_kept.eq(place + 2 == form.keep_groups)]
                with m.If(all_kept):
                    m.d.comb += selector.i_clear.eq(1)
                    m.d.sync += place.eq(0)
                    start(Pass.SELECT)
            if dropper is not None:
                with m.State("DROP"):
                    m.d.comb += w.dropping.eq(1)
                    m.d.sync += [w.total.eq(dropper.o_total), w.left.eq(dropper.o_kept)]
                    with m.If(dropper.o_done):
                        weigh()
            if "gates" in self._config.router_modes:
                with m.State("GATES"):
                    # Sigmoids take longer than exponentials: none of those is behind them any more.
                    with m.If(wait == 0):
                        start(Pass.GATES)
            with m.State("DIVISOR"):
                smaller = w.total < form.epsilon
                m.d.sync += [
                    wait.eq(DIVIDE_CYCLES),
                    divisor.eq(Mux(form.renormalize == Renormalize.CLAMP,
                                   Mux(smaller, form.epsilon, w.total),
                                   w.total + form.epsilon)),
                    factor.eq(form.scale), power.eq(form.scale_exponent - SCORE_BITS),
                ]
                m.next = "DIVIDE"
                with m.If((form.renormalize == Renormalize.NONE) & ~w.mixes):
                    m.next = "WEIGHTS"
            with m.State("DIVIDE"):
                with m.If(wait == 0):
                    m.d.comb += w.inverted.eq(1)
                    m.next = "FACTOR"
            with m.State("FACTOR"):
                # The reciprocal times the scale; a reciprocal may have a bit less.
                m.d.comb += w.factoring.eq(1)
                with m.If(weights.o_valid):
                    m.d.sync += [
                        factor.eq(weights.o_mantissa),
                        power.eq(form.scale_exponent - leading.o_position - weights.o_shift
                                 - ~reciprocal.o_value[-1])]
                    m.next = "WEIGHTS"
            with m.State("WEIGHTS"):
                with m.If(w.room):
                    m.d.sync += w.weighing.eq(1)
                    m.next = "OUT"
            with m.State("OUT"):
                with m.If(w.freed):
                    m.next = "IDLE"
                with m.Elif(w.mixes & w.pair_made):
                    m.d.sync += w.second.eq(1)
                    start(Pass.LARGEST)
                if "gates" in self._config.router_modes:
                    with m.Elif(w.gated & w.own_last):
                        m.d.sync += [w.gating.eq(1), w.weighing.eq(1)]
                        with m.If(form.gates == Gates.SIGMOID):  # as it is: times 1
                            m.d.sync += [factor.eq(1 << (VALUE_BITS - 1)),
                                         power.eq(1 - VALUE_BITS - SCORE_BITS)]

    def _emit(self, m, w, selector, weights, scores, dropper):
        """Make the weights of the chosen, and hand them on."""
        form = self.i_form
        left = selector.o_some if dropper is None else w.left
        m.submodules.pairs = pairs = fifo.SyncFIFOBuffered(
            width=len(self.o_pair.payload.as_value()), depth=2 * TOP_K_MAX)
        place, out = (Signal(max(1, ceil_log2(w.slots)), name=name) for name in ("place", "out"))
        slots = form.top_k + Mux(w.gated, form.shared, 0)
        weighing = Pipeline(m, w.weighing, name="weigh")
        s = weighing.stage(left=left.bit_select(place, 1) | w.gating)
        value = Mux(w.mixes, _ONE, scores.data)
        m.d.comb += [
            scores.addr.eq(place), w.room.eq(pairs.level <= TOP_K_MAX),
            weights.i_valid.eq(weighing.valid | w.inverted),
        ]
        with m.If(w.weighing):
            m.d.sync += place.eq(place + 1)
            with m.If(place + 1 == Mux(w.gating, slots, form.top_k)):
                m.d.sync += w.weighing.eq(0)
            with m.If(place + 1 == slots):
                m.d.sync += place.eq(0)
            with m.If(w.mixes):
                m.d.sync += w.weighing.eq(0)
        with m.If(weighing.valid):
            # Where nothing is dropped, scores of none are 0.
            m.d.comb += weights.i_value.eq(value if dropper is None else Mux(s.left, value, 0))
        if dropper is not None:
            with m.If(w.dropping):
                m.d.comb += scores.addr.eq(dropper.score_address)
        pair = Signal(layouts.routed_pair(self._config))
        valid = w.pair_made
        m.d.comb += [
            valid.eq(weights.o_valid & ~w.factoring),
            w.own_last.eq(valid & (out + 1 == form.top_k) & ~w.gating),
            pair.id.eq(Mux(w.gating, form.experts + out - form.top_k, selector.o_ids[out])),
            pair.some.eq(left.bit_select(out, 1) | w.gating),
            pair.weight.eq(weights.o_weight), pair.last.eq(out + 1 == slots),
            pairs.w_en.eq(valid), pairs.w_data.eq(pair),
            *([pair.priority.eq(w.first)] if "capacity" in self._config.router_modes else []),
            w.freed.eq(valid & pair.last),
            self.o_pair.valid.eq(pairs.r_rdy), self.o_pair.payload.eq(pairs.r_data),
            pairs.r_en.eq(self.o_pair.ready),
        ]
        with m.If(valid):
            m.d.sync += out.eq(Mux(pair.last, 0, out + 1))
