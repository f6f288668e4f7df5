"""Routing of one token after another: logits in, experts and weights out."""

import enum

from amaranth import *
from amaranth.lib import data, fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from moeaccel.config import TOP_K_MAX, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.router.leading import WIDTH, Leading
from moeaccel.hdl.router.line_table import LineTable
from moeaccel.hdl.router.score_unit import SCORE_WIDTH, ScoreMode, ScoreUnit
from moeaccel.hdl.router.top_selector import TopSelector
from moeaccel.hdl.router.weight_unit import WeightUnit
from moeaccel.hdl.unchecked_memory import unchecked_memory
from moeaccel.router.choices import GROUPS_MAX, Renormalize, Score
from moeaccel.router.tables import KEY_BITS, RECIPROCAL, SCORE_BITS, VALUE_BITS, WORD_BITS

__all__ = ["DIVIDE_CYCLES", "SETTLE_CYCLES", "TokenRouter"]

_LEAST = -(1 << (WORD_BITS - 1))
_MOST = (1 << (WORD_BITS - 1)) - 1

DIVIDE_CYCLES = Leading.LATENCY_CYCLES + LineTable.LATENCY_CYCLES + 1
"""From a sum to its reciprocal."""

SETTLE_CYCLES = 6
"""From the last score of a pass to the selector's last key, and one more."""


class _Pass(enum.IntEnum):
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


class _Wires:
    """What the parts of a router tell each other."""

    def __init__(self, config):
        id_bits = layouts.expert_bits(config)
        self.id_bits = id_bits
        self.places = max(config.router_top_k, 1)
        # Two tokens' logits: one is loaded, one routed.
        self.full = Signal(2)
        self.claimed = Signal(2)
        self.bank = Signal()
        self.most = Array(Signal(signed(WORD_BITS), name=f"most{i}") for i in range(2))
        self.freed = Signal()
        # A pass.
        self.kind = Signal(_Pass)
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
        # Selection.
        self.kept = Signal(GROUPS_MAX)
        self.inverted = Signal()  # the weight unit is given a reciprocal, to make a factor of it
        self.factoring = Signal()
        self.weighing = Signal()  # scores of the chosen go to the weight unit
        self.room = Signal()  # for the pairs of a token
        self.largest = Signal(signed(WORD_BITS))


class TokenRouter(wiring.Component):
    """Turn the logits of tokens into experts and weights.

    Golden model: ``moeaccel/golden/router.py``, without modes::

        i_logit --> + bias --> [two tokens' logits] --> ScoreUnit --> + selection bias --> [groups]
                                       ^     |                              |                  |
                                       |     +---- (keys are logits) -------+---> TopSelector <+
                                       +------------------ the chosen --------------- |
                                                             |
                                      o_pair <-- WeightUnit <+-- [sum, reciprocal]

    A token's logits are read in passes: all of them once for the keys, once before that if scores
    need the sum of exponentials first, and once if groups leave experts out; then those of the
    chosen. Meanwhile the next token's are loaded.

    Throughput: a token every ``moeaccel.cycles.token_router`` cycles; one logit a cycle comes in,
    and stalls while two tokens' are there. Pairs come one a cycle. Reset: empty.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With a router.

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
    i_logit : :py:`In(stream.Signature(layouts.fixed_logit()))`
        ``i_form.experts`` for each token.
    o_saturated : :py:`Out(1)`
        Pulse for each logit that is beyond its range, with its bias or before.
    o_pair : :py:`Out(stream.Signature(layouts.routed_pair(config)))`
        ``i_form.top_k`` for each token.
    o_idle : :py:`Out(1)`
        No token has been begun.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig) or not config.router:
            raise TypeError(f"config must be an AcceleratorConfig with a router, not {config!r}")
        self._config = config
        address = layouts.expert_bits(config)
        super().__init__({
            "i_form": In(layouts.router_form(config)),
            "bias_w_en": In(1), "bias_w_address": In(address),
            "bias_w_data": In(signed(WORD_BITS)),
            "extra_w_en": In(1), "extra_w_address": In(address),
            "extra_w_data": In(signed(WORD_BITS)),
            "i_logit": In(stream.Signature(layouts.fixed_logit())),
            "o_saturated": Out(1),
            "o_pair": Out(stream.Signature(layouts.routed_pair(config))),
            "o_idle": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        w = _Wires(self._config)
        m.submodules.selector = selector = TopSelector(
            w.places, key_bits=WORD_BITS + 1, id_bits=max(w.id_bits, ceil_log2(GROUPS_MAX)))
        m.submodules.unit = unit = ScoreUnit(
            self._config.router_scores,
            tag_bits=len(Value.cast(Signal(self._tag(w)))))
        m.submodules.weights = weights = WeightUnit()
        self._decide(m, w)
        self._load(m, w)
        self._feed(m, w, unit, selector)
        self._select(m, w, unit, selector)
        scores = self._chosen(m, w, unit)
        self._control(m, w, unit, selector, weights)
        self._emit(m, w, selector, weights, scores)
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
        ]
        with m.Switch(w.kind):
            with m.Case(_Pass.SUM, _Pass.CHOSEN):
                m.d.comb += w.scored.eq(1)
            with m.Case(_Pass.GROUPS):
                m.d.comb += [w.direct.eq(~group_scores), w.scored.eq(group_scores)]
            with m.Case(_Pass.SELECT):
                m.d.comb += [
                    w.direct.eq(form.by_logits),
                    w.scored.eq(~form.by_logits
                                | (softmax & ~w.early_sum & ~w.softmax_of_chosen))]
            with m.Case(_Pass.LARGEST):
                m.d.comb += w.direct.eq(1)

    def _load(self, m, w):
        """Take logits, add the bias, and keep the largest."""
        config, form = self._config, self.i_form
        write, read = unchecked_memory(
            m, "logits", signed(WORD_BITS), 2 * (1 << w.id_bits))
        bias_write, bias_read = unchecked_memory(
            m, "bias", signed(WORD_BITS), 1 << w.id_bits)
        bank, index = Signal(), Signal(range(config.max_experts + 1))
        take, last = Signal(), Signal()
        m.d.comb += [
            bias_write.en.eq(self.bias_w_en), bias_write.addr.eq(self.bias_w_address),
            bias_write.data.eq(self.bias_w_data),
            bias_read.addr.eq(index),
            self.i_logit.ready.eq(~w.claimed.bit_select(bank, 1)),
            take.eq(self.i_logit.valid & self.i_logit.ready),
            last.eq(index + 1 == form.experts),
        ]
        with m.If(take):
            m.d.sync += index.eq(Mux(last, 0, index + 1))
            with m.If(last):
                m.d.sync += [bank.eq(~bank), w.claimed.bit_select(bank, 1).eq(1)]
        pipe = Pipeline(m, take, name="load")
        s = pipe.stage(logit=self.i_logit.p.value, beyond=self.i_logit.p.beyond,
                       index=index[:w.id_bits], bank=bank, first=index == 0, last=last)
        total = s.logit + Mux(form.tables, bias_read.data, 0)
        s = pipe.stage(total=total, beyond=s.beyond, index=s.index, bank=s.bank, first=s.first,
                       last=s.last)
        high, low = s.total > _MOST, s.total < _LEAST
        s = pipe.stage(value=Mux(high, _MOST, Mux(low, _LEAST, s.total))[:WORD_BITS].as_signed(),
                       beyond=s.beyond | high | low, index=s.index, bank=s.bank, first=s.first,
                       last=s.last)
        value = s.value
        m.d.comb += [
            write.en.eq(pipe.valid), write.addr.eq(Cat(s.index, s.bank)), write.data.eq(value),
            read.addr.eq(Cat(w.read_address, w.bank)), w.read_data.eq(read.data),
            self.o_saturated.eq(pipe.valid & s.beyond),
        ]
        with m.If(pipe.valid):
            with m.If(s.first | (value > w.most[s.bank])):
                m.d.sync += w.most[s.bank].eq(value)
            with m.If(s.last):
                m.d.sync += w.full.bit_select(s.bank, 1).eq(1)
        with m.If(w.freed):
            m.d.sync += [w.full.bit_select(w.bank, 1).eq(0),
                         w.claimed.bit_select(w.bank, 1).eq(0), w.bank.eq(~w.bank)]
        m.d.comb += self.o_idle.eq(~w.claimed.any() & (index == 0))

    def _feed(self, m, w, unit, selector):
        """Read a pass's logits and give them to the score unit."""
        form = self.i_form
        of_chosen = (w.kind == _Pass.LARGEST) | (w.kind == _Pass.CHOSEN)
        some = Signal()
        place = w.at[:ceil_log2(w.places)] if w.places > 1 else C(0, 1)
        m.d.comb += [
            w.at_last.eq(w.at + 1 == Mux(of_chosen, form.top_k, form.experts)),
            w.read_address.eq(Mux(of_chosen, selector.o_ids[place], w.at)),
            some.eq(Mux(of_chosen, selector.o_some.bit_select(place, 1), 1)),
        ]
        with m.If(w.feeding):
            m.d.sync += w.at.eq(Mux(w.at_last, 0, w.at + 1))
            with m.If(w.at_last):
                m.d.sync += w.feeding.eq(0)
        pipe = Pipeline(m, w.feeding, name="feed")
        s = pipe.stage(id=w.read_address, some=some, last=w.at_last)
        w.fed_valid, w.fed = pipe.valid, s
        tag = Signal(self._tag(w))
        m.d.comb += [tag.id.eq(s.id), tag.some.eq(s.some), tag.last.eq(s.last)]

        relative = Signal()
        m.d.comb += relative.eq(
            (w.kind == _Pass.SUM)
            | ((w.kind == _Pass.SELECT) & form.by_logits)
            | ((w.kind == _Pass.CHOSEN) & w.softmax_of_chosen))
        m.d.comb += [
            unit.i_valid.eq(pipe.valid & w.scored), unit.i_logit.eq(w.read_data),
            unit.i_tag.eq(tag),
            unit.i_reference.eq(Mux((w.kind == _Pass.CHOSEN) & w.softmax_of_chosen,
                                    w.largest, w.most[w.bank])),
            unit.i_mode.eq(ScoreMode.EXPONENTIAL),
        ]
        with m.If(~relative):
            with m.Switch(form.score):
                with m.Case(Score.SOFTMAX):
                    m.d.comb += unit.i_mode.eq(ScoreMode.QUOTIENT)
                with m.Case(Score.SIGMOID):
                    m.d.comb += unit.i_mode.eq(ScoreMode.SIGMOID)
                with m.Case(Score.SQRT_SOFTPLUS):
                    m.d.comb += unit.i_mode.eq(ScoreMode.SQRT_SOFTPLUS)

        with m.If(pipe.valid & s.some & (w.kind == _Pass.LARGEST) & (w.read_data > w.largest)):
            m.d.sync += w.largest.eq(w.read_data)
        with m.If((w.kind != _Pass.LARGEST) & (w.kind != _Pass.CHOSEN)):
            m.d.sync += w.largest.eq(_LEAST)

    def _select(self, m, w, unit, selector):
        """Make keys, of groups or of experts, and give them to the selector."""
        form = self.i_form
        write, read = unchecked_memory(m, "extra", signed(WORD_BITS), 1 << w.id_bits)
        scored = Signal(self._tag(w))
        m.d.comb += [
            write.en.eq(self.extra_w_en), write.addr.eq(self.extra_w_address),
            write.data.eq(self.extra_w_data),
            scored.eq(unit.o_tag),
            read.addr.eq(Mux(w.direct, w.read_address, scored.id)),
        ]
        selecting = (w.kind == _Pass.GROUPS) | (w.kind == _Pass.SELECT)
        score = Pipeline(m, unit.o_valid, name="scored")
        behind = score.stage(value=unit.o_score[SCORE_BITS - KEY_BITS:], tag=unit.o_tag)
        behind_tag = Signal(self._tag(w))
        m.d.comb += behind_tag.eq(behind.tag)

        pipe = Pipeline(
            m, Mux(w.direct, w.fed_valid, score.valid) & selecting, name="key")
        key = Mux(w.direct, w.read_data, Cat(behind.value, C(0, 1)).as_signed()) + Mux(
            form.tables, read.data, 0)
        s = pipe.stage(key=key, never=form.tables & (read.data == _LEAST),
                       id=Mux(w.direct, w.fed.id, behind_tag.id))
        s = pipe.stage(
            key=Mux(s.never | (s.key < _LEAST), _LEAST, Mux(s.key > _MOST, _MOST, s.key))[
                :WORD_BITS].as_signed(), never=s.never, id=s.id)
        clipped, valid = s.key, pipe.valid

        # Groups: their best two keys, in order of their members.
        in_group, group = Signal.like(form.group_size), Signal(range(GROUPS_MAX))
        group_ends = in_group + 1 == form.group_size
        best, second = (Signal(signed(WORD_BITS + 1), name=name) for name in ("best", "second"))
        better, good = (Signal(signed(WORD_BITS + 1), name=name) for name in ("better", "good"))
        fresh = in_group == 0
        larger = fresh | (clipped > best)
        m.d.comb += [
            better.eq(Mux(larger, clipped, best)),
            good.eq(Mux(larger, Mux(fresh, _LEAST, best), Mux(clipped > second, clipped, second))),
        ]
        grouping = w.kind == _Pass.GROUPS
        with m.If(valid):
            m.d.sync += [best.eq(better), second.eq(good),
                         in_group.eq(Mux(group_ends, 0, in_group + 1)),
                         group.eq(group + group_ends)]
        with m.If(w.settled):
            m.d.sync += group.eq(0)
        ends = Pipeline(m, valid & group_ends & grouping, name="group")
        g = ends.stage(better=better, good=good, group=group)
        g = ends.stage(key=Mux(form.top2, g.better + g.good, g.better)[:WORD_BITS + 1].as_signed(),
                       group=g.group)

        allowed = ~form.grouped | w.kept.bit_select(group, 1)
        m.d.comb += [
            selector.i_valid.eq(Mux(grouping, ends.valid, valid & allowed & ~s.never)),
            selector.i_key.eq(Mux(grouping, g.key, clipped)),
            selector.i_id.eq(Mux(grouping, g.group, s.id)),
            w.over.eq(Mux(w.scored, unit.o_valid & scored.last,
                          w.fed_valid & w.fed.last)),
        ]

    def _chosen(self, m, w, unit):
        """Add up scores, and keep those of the chosen; return their read port."""
        m.submodules.scores = scores = memory.Memory(
            shape=SCORE_WIDTH, depth=1 << max(1, ceil_log2(w.places)), init=[])
        write, read = scores.write_port(), scores.read_port()
        tag = Signal(self._tag(w))
        place = Signal(len(write.addr))
        value = Mux(tag.some, unit.o_score, 0)
        m.d.comb += [
            tag.eq(unit.o_tag),
            write.en.eq(unit.o_valid & (w.kind == _Pass.CHOSEN)), write.addr.eq(place),
            write.data.eq(value),
        ]
        with m.If(unit.o_valid):
            m.d.sync += w.total.eq(w.total + value)
            with m.If(w.kind == _Pass.CHOSEN):
                m.d.sync += place.eq(Mux(tag.last, 0, place + 1))
        return read

    def _control(self, m, w, unit, selector, weights):
        """Go through the passes of a token, then make its weights."""
        form = self.i_form
        m.submodules.leading = leading = Leading()
        m.submodules.reciprocal = reciprocal = LineTable(RECIPROCAL)
        divisor = Signal(WIDTH)
        factor, power = weights.i_factor, weights.i_power
        m.d.comb += [weights.i_value.eq(reciprocal.o_value), leading.i_value.eq(divisor),
                     reciprocal.i_position.eq(leading.o_mantissa[:VALUE_BITS])]
        softmax = form.score == Score.SOFTMAX
        longest = max(SETTLE_CYCLES + w.places, DIVIDE_CYCLES)
        wait = Signal(range(longest + 1))
        place = Signal(range(max(TOP_K_MAX, GROUPS_MAX) + 1))

        def start(kind):
            m.d.sync += [w.kind.eq(kind), w.feeding.eq(1)]
            m.next = "PASS"

        def begin():
            """Begin with groups, or with experts."""
            m.d.comb += selector.i_clear.eq(1)
            with m.If(form.grouped):
                start(_Pass.GROUPS)
            with m.Else():
                start(_Pass.SELECT)

        m.d.sync += wait.eq(Mux(wait == 0, 0, wait - 1))
        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += [w.total.eq(0), w.kept.eq(0), place.eq(0)]
                with m.If(w.full.bit_select(w.bank, 1)):
                    with m.If(w.early_sum):
                        start(_Pass.SUM)
                    with m.Else():
                        begin()
            with m.State("PASS"):
                with m.If(w.over):
                    m.d.sync += wait.eq(longest)
                    m.next = "SUM_UP"
            with m.State("SUM_UP"):
                m.d.sync += divisor.eq(w.total)
                with m.Switch(w.kind):
                    with m.Case(_Pass.LARGEST):
                        start(_Pass.CHOSEN)
                    with m.Case(_Pass.CHOSEN):
                        m.next = "DIVISOR"
                    with m.Default():
                        m.next = "SETTLE"
            with m.State("SETTLE"):
                # The selector has its last keys, and the sum its reciprocal.
                m.d.sync += w.total.eq(0)
                with m.If(wait == 0):
                    m.d.comb += w.settled.eq(1)
                    with m.If((w.kind == _Pass.SUM)
                              | ((w.kind == _Pass.SELECT) & softmax & ~w.early_sum)):
                        m.d.sync += [unit.i_reciprocal.eq(reciprocal.o_value),
                                     unit.i_position.eq(leading.o_position)]
                    with m.Switch(w.kind):
                        with m.Case(_Pass.SUM):
                            begin()
                        with m.Case(_Pass.GROUPS):
                            m.next = "KEEP"
                        with m.Default():
                            with m.If(w.softmax_of_chosen):
                                start(_Pass.LARGEST)
                            with m.Else():
                                start(_Pass.CHOSEN)
            with m.State("KEEP"):
                index = place[:ceil_log2(w.places)] if w.places > 1 else C(0, 1)
                m.d.sync += [
                    w.kept.bit_select(selector.o_ids[index][:ceil_log2(GROUPS_MAX)], 1).eq(1),
                    place.eq(place + 1)]
                with m.If(place + 1 == form.keep_groups):
                    m.d.comb += selector.i_clear.eq(1)
                    m.d.sync += place.eq(0)
                    start(_Pass.SELECT)
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
                with m.If(form.renormalize == Renormalize.NONE):
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

    def _emit(self, m, w, selector, weights, scores):
        """Make the weights of the chosen, and hand them on."""
        form = self.i_form
        m.submodules.pairs = pairs = fifo.SyncFIFOBuffered(
            width=len(self.o_pair.payload.as_value()), depth=2 * TOP_K_MAX)
        place, out = (Signal(max(1, ceil_log2(w.places)), name=name) for name in ("place", "out"))
        weighing = Pipeline(m, w.weighing, name="weigh")
        weighing.stage()
        m.d.comb += [
            scores.addr.eq(place), w.room.eq(pairs.level <= TOP_K_MAX),
            weights.i_valid.eq(weighing.valid | w.inverted),
        ]
        with m.If(w.weighing):
            m.d.sync += place.eq(place + 1)
            with m.If(place + 1 == form.top_k):
                m.d.sync += [place.eq(0), w.weighing.eq(0)]
        with m.If(weighing.valid):
            m.d.comb += weights.i_value.eq(scores.data)
        pair = Signal(layouts.routed_pair(self._config))
        valid = Signal()
        m.d.comb += [
            valid.eq(weights.o_valid & ~w.factoring),
            pair.id.eq(selector.o_ids[out]), pair.some.eq(selector.o_some.bit_select(out, 1)),
            pair.weight.eq(weights.o_weight), pair.last.eq(out + 1 == form.top_k),
            pairs.w_en.eq(valid), pairs.w_data.eq(pair),
            w.freed.eq(valid & pair.last),
            self.o_pair.valid.eq(pairs.r_rdy), self.o_pair.payload.eq(pairs.r_data),
            pairs.r_en.eq(self.o_pair.ready),
        ]
        with m.If(valid):
            m.d.sync += out.eq(Mux(pair.last, 0, out + 1))
