"""Which choices the capacity of experts leaves."""

from amaranth import *
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from moeaccel.config import TOP_K_MAX, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.layouts import SCORE_WIDTH
from moeaccel.hdl.unchecked_memory import unchecked_memory

__all__ = ["Capacity"]


class Capacity(wiring.Component):
    """Take the pairs of all tokens, and say of each whether its expert has room for it.

    Golden model: `within_capacity` of :mod:`moeaccel.golden.router`::

        i_pair --+--> [pairs] <--> walk: every first choice before any second one --> o_left
                 |                  ^  |
                 +--> [order] ------+  +--> [counts of experts]

    By priority tokens are put into their order as they come, each from behind to its place: it
    takes two cycles for each token behind it. Cycles: to clear the counts, 1 for each expert;
    behind the last pair, WALK_CYCLES for each pair. Reset: idle.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With the mode ``capacity`` of a router.

    Members
    -------
    i_form : :py:`In(layouts.router_form(config))`
    i_tokens, i_experts : :py:`In`
        These hold from ``i_start`` to ``o_done``.
    i_start : :py:`In(1)`
        Pulse. Not before ``o_done``.
    i_pair : :py:`In(stream.Signature(layouts.routed_pair(config)))`
        ``i_form.top_k`` for each token.
    o_done : :py:`Out(1)`
        It is known who is left.
    o_moves : :py:`Out(1)`
        It counts, or walks, without anybody else's doing; that ends by itself.
    i_next, o_left : :py:`In(1)`, :py:`Out(1)`
        Asks for the next pair, from token 0's first on; the answer, a cycle later. With ``o_done``.
    """

    WALK_CYCLES = 7

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig) or "capacity" not in config.router_modes:
            raise TypeError("config must be an AcceleratorConfig with the mode capacity of a "
                            f"router, not {config!r}")
        self._config = config
        super().__init__({
            "i_form": In(layouts.router_form(config)),
            "i_tokens": In(config.max_tokens.bit_length()),
            "i_experts": In(config.max_experts.bit_length()),
            "i_start": In(1),
            "i_pair": In(stream.Signature(layouts.routed_pair(config))),
            "o_done": Out(1),
            "o_moves": Out(1),
            "i_next": In(1),
            "o_left": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, form, pair = self._config, self.i_form, self.i_pair.payload
        index_bits = ceil_log2(config.max_assignments)
        choice = data.StructLayout({"id": layouts.expert_bits(config), "some": 1})
        place = data.StructLayout({"priority": SCORE_WIDTH, "first": index_bits})
        pairs_w, pairs_r = unchecked_memory(m, "pairs", choice, config.max_assignments)
        counts_w, counts_r = unchecked_memory(
            m, "counts", len(self.i_tokens), 1 << layouts.expert_bits(config))
        order_w, order_r = unchecked_memory(m, "order", place, max(2, config.max_tokens))

        index = Signal(index_bits)  # of a pair: of the next one
        first = Signal(index_bits)  # of its token's first
        token = Signal(layouts.token_bits(config))  # in the order of tokens, or of the walk
        rank = Signal(range(TOP_K_MAX))
        expert = Signal(layouts.expert_bits(config) + 1)  # of those to clear
        new, at = Signal(place), Signal.like(token)  # what is being put into order, and where to
        walked, taken = Signal(choice), Signal()
        # Block RAM is slow to answer: registers behind it, ahead of comparisons.
        other, count = Signal(place), Signal.like(self.i_tokens)
        left = Signal()
        last_token = token + 1 == self.i_tokens
        m.d.comb += [
            pairs_r.addr.eq(index), self.o_left.eq(pairs_r.data.some),
            pairs_w.addr.eq(index), pairs_w.data.id.eq(pair.id), pairs_w.data.some.eq(pair.some),
            order_r.addr.eq(token), order_w.addr.eq(at), order_w.data.eq(new),
            counts_r.addr.eq(walked.id), counts_w.addr.eq(walked.id),
            counts_w.data.eq(count + 1),
            left.eq(walked.some & (count < form.capacity)),
        ]
        m.d.sync += [other.eq(order_r.data), count.eq(counts_r.data)]
        m.d.comb += self.o_moves.eq(~self.o_done & ~self.i_pair.ready)

        def walk():
            m.d.sync += [token.eq(0), first.eq(0), rank.eq(0)]
            m.next = "ORDER"

        with m.FSM():
            with m.State("DONE"):
                m.d.comb += self.o_done.eq(1)
                m.d.sync += [expert.eq(0), token.eq(0), first.eq(0)]
                with m.If(self.i_next):
                    m.d.sync += index.eq(index + 1)
                with m.If(self.i_start):
                    m.d.sync += index.eq(0)
                    m.next = "CLEAR"
            with m.State("CLEAR"):
                m.d.comb += [counts_w.addr.eq(expert), counts_w.data.eq(0), counts_w.en.eq(1)]
                m.d.sync += expert.eq(expert + 1)
                with m.If(expert + 1 == self.i_experts):
                    m.next = "TAKE"
            with m.State("TAKE"):
                m.d.comb += [self.i_pair.ready.eq(1), taken.eq(self.i_pair.valid),
                             pairs_w.en.eq(taken)]
                m.d.sync += [new.priority.eq(pair.priority), new.first.eq(first), at.eq(token)]
                with m.If(taken):
                    m.d.sync += index.eq(index + 1)
                with m.If(taken & pair.last):
                    m.d.sync += first.eq(index + 1)
                    with m.If(form.by_priority):
                        m.next = "PLACE"
                    with m.Else():
                        m.d.sync += token.eq(token + 1)
                        with m.If(last_token):
                            walk()
            with m.State("PLACE"):  # that before its place is on its way
                m.d.comb += order_r.addr.eq(at - 1)
                m.next = "HELD"
            with m.State("HELD"):
                m.next = "COMPARE"
            with m.State("COMPARE"):
                m.d.comb += [order_r.addr.eq(at - 2), order_w.en.eq(1)]
                with m.If((at != 0) & (other.priority < new.priority)):
                    m.d.comb += order_w.data.eq(other)
                    m.d.sync += at.eq(at - 1)
                    m.next = "HELD"
                with m.Else():
                    m.d.sync += token.eq(token + 1)
                    m.next = "TAKE"
                    with m.If(last_token):
                        walk()
            with m.State("ORDER"):
                m.next = "INDEX"
            with m.State("INDEX"):
                m.d.sync += index.eq(Mux(form.by_priority, order_r.data.first, first) + rank)
                m.next = "PAIR"
            with m.State("PAIR"):
                m.next = "CHOICE"
            with m.State("CHOICE"):
                m.d.sync += walked.eq(pairs_r.data)
                m.next = "COUNT"
            with m.State("COUNT"):
                m.next = "COUNTED"
            with m.State("COUNTED"):
                m.next = "DECIDE"
            with m.State("DECIDE"):
                m.d.comb += [
                    pairs_w.en.eq(1), pairs_w.data.id.eq(walked.id), pairs_w.data.some.eq(left),
                    counts_w.en.eq(left),
                ]
                m.d.sync += [token.eq(token + 1), first.eq(first + form.top_k)]
                m.next = "ORDER"
                with m.If(last_token):
                    m.d.sync += [token.eq(0), first.eq(0), rank.eq(rank + 1)]
                    with m.If(rank + 1 == form.top_k):
                        m.d.sync += index.eq(0)
                        m.next = "DONE"
        return m
