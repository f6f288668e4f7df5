"""Token-expert pairs, those of an expert together: a counting sort over the experts there are."""

from amaranth import *
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.unchecked_memory import unchecked_memory

__all__ = ["PairSort"]


class _Wires:
    """What the parts of a sort tell each other."""

    def __init__(self, config):
        pairs_bits = config.max_assignments.bit_length()
        rank_bits = layouts.expert_bits(config)
        # An expert, and how many pairs it has beyond the first one.
        self.ranked = data.StructLayout({
            "expert": layouts.expert_bits(config), "more": ceil_log2(config.max_assignments)})

        # The walk over the pairs, in the order of their tokens, and the pair that it is at.
        self.rewind = Signal()  # it is held at the first pair
        self.take_first = Signal()  # the first id is there
        self.third = Signal()  # of a pair's cycles
        self.counting = Signal()  # the first of two walks
        self.index = Signal(pairs_bits, reset_less=True)
        self.token = Signal(config.max_tokens.bit_length(), reset_less=True)
        self.expert = Signal(layouts.expert_bits(config))
        self.valid = Signal()  # it has an expert
        self.last_pair = Signal()
        self.no_expert = Signal()  # while counting, with the last pair of a token: none is valid
        self.ended = Signal()  # the last pair is over

        # The valid pair whose third cycle is over: what is known of it one and two cycles later.
        self.read, self.known = Signal(), Signal()
        self.pair = Signal(layouts.pair(config), reset_less=True)
        self.entry = Signal(self.ranked, reset_less=True)  # its expert; with it, when known
        self.found = Signal(max(pairs_bits, rank_bits))  # what [places] says of ``expert``
        self.place = Signal.like(self.found, reset_less=True)  # when that was read
        self.again = Signal()  # the valid pair before has the same expert
        self.rank = Signal(rank_bits, reset_less=True)  # of its expert, when known
        self.new = Signal()  # no pair before has its expert, when known

        # The experts that have pairs.
        self.experts = Signal(range(config.max_experts + 1))  # so many so far
        self.single = Signal()  # they are those of one token
        self.shared = Signal()  # one has several pairs
        self.walk = Signal(rank_bits, reset_less=True)
        self.walk_ends = Signal()  # it is at the last one, since a cycle ago
        self.prefixing = Signal()
        self.singles = Signal()  # the second of two walks: over those with one pair
        self.placing = Signal()  # the place of ``entry`` is ``prefix``
        self.prefix = Signal(pairs_bits, reset_less=True)
        self.at = Signal(self.ranked)  # the expert that was asked for a cycle ago


class PairSort(wiring.Component):
    """Sort the pairs of a command by expert; those of an expert stay in the order of their tokens.

    ::

        ids_w --> [ids] --> count --> [places], [ranks] --> prefix --> [places] --> scatter
                             | |           |                      |                    |
                             | |           +----> [listed] <------+                    v
                    o_zero <-+ +--> total_w          |                pair_data <-- [sorted]
                                                     +--> expert_data, count_data

    The order in which ids name experts first gives each its *rank*. ``places`` has the rank of each
    expert, ``ranks`` the expert of each rank, with its pairs. So an expert has pairs if it is the
    one of its rank, and the rank one of those that have been given: nothing need be cleared, and no
    cycle depends on how many experts there could be.

    One token's experts come in that order, and when all pairs are counted, those of the first ranks
    are where they belong, unless an expert has several. Of more tokens, experts with several pairs
    come first, then those with one, so that passes of a token alone follow each other: each
    expert's place follows from the counts, and the pairs are walked over once more, to put them
    there. docs/architecture.md has what other orders would change.

    An id that is negative or not below ``num_experts`` makes no pair; a token without any pair is
    announced on ``o_zero``, and counting waits until that is taken. A job that is not ``routed``
    has no ids: a token's pairs are of experts 0, 1, ...

    Cycles: from ``i_start`` to ``o_done``, 5 and 3 for each pair, 1 or more for each token without
    pairs; with several tokens, 3 more, 4 for each expert with pairs, and 3 for each pair again; so
    with one token and an expert that has several pairs, but 2 for each expert. One token's first
    expert counts in ``o_experts`` 8 cycles after ``i_start``, if its is the first pair, and 3 more
    for each pair before it. Reset: idle.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_job : :py:`In(layouts.job(config))`
    i_pairs : :py:`In`
        The job's ``tokens * top_k``. Both are constant from the cycle after ``i_start`` to
        ``o_done``.
    ids_w_en, ids_w_address, ids_w_data : :py:`In`
        Write port of the ids: as many as a beat of memory holds, from token 0's on.
    i_start : :py:`In(1)`
        Pulse: a new job, whose ids have all been written; drops the last one's pairs. Not before
        ``o_done``.
    o_done : :py:`Out(1)`
        Pulse: ``o_pairs`` is complete, what ``count_address`` asks for, and from the next cycle on
        what ``pair_address`` does.
    o_zero : :py:`Out(stream.Signature(layouts.token_bits(config)))`
        A token without any pair.
    total_w_en, total_w_address, total_w_data : :py:`Out`
        The pairs of a token have been counted: its index, and how many they are, 0 included. Once
        for each token, before ``o_done``.
    o_experts : :py:`Out(range(config.max_experts + 1))`
        Experts whose place among all is known: it grows from the cycle after ``i_start`` to
        ``o_done``.
    expert_address, expert_data : :py:`In`, :py:`Out(layouts.expert_bits(config))`
        The expert at a place below ``o_experts``, one cycle later.
    count_address, count_data : :py:`In`, :py:`Out`
        Pairs of the expert at a place, one cycle later.
    o_pairs : :py:`Out`
        Pairs of all experts.
    pair_address, pair_data : :py:`In`, :py:`Out(layouts.pair(config))`
        A sorted pair, one cycle later.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        pairs_bits = config.max_assignments.bit_length()
        super().__init__({
            "i_job": In(layouts.job(config)),
            "i_pairs": In(pairs_bits),
            "ids_w_en": In(1),
            "ids_w_address": In(layouts.pair_beat_bits(config)),
            "ids_w_data": In(8 * config.port_bytes),
            "i_start": In(1),
            "o_done": Out(1),
            "o_zero": Out(stream.Signature(layouts.token_bits(config))),
            "total_w_en": Out(1),
            "total_w_address": Out(layouts.token_bits(config)),
            "total_w_data": Out(5),
            "o_experts": Out(range(config.max_experts + 1)),
            "expert_address": In(layouts.expert_bits(config)),
            "expert_data": Out(layouts.expert_bits(config)),
            "count_address": In(layouts.expert_bits(config)),
            "count_data": Out(pairs_bits),
            "o_pairs": Out(pairs_bits),
            "pair_address": In(ceil_log2(config.max_assignments)),
            "pair_data": Out(layouts.pair(config)),
        })

    def elaborate(self, platform):
        m = Module()
        wires = _Wires(self._config)
        self._pairs(m, wires)
        self._ranks(m, wires)
        self._list(m, wires)
        self._places(m, wires)
        self._sequence(m, wires)
        return m

    def _pairs(self, m, w):
        """Walk over the pairs in the order of their tokens.

        Every pair has three cycles (ID, READ, THIRD); its id is read during the pair before it, and
        all that the third needs to know comes from registers, be it that it is the third. Until a
        walk begins it is held at the first pair, which sets what a reset need not.
        """
        config, job = self._config, self.i_job
        lane_bits = exact_log2(config.port_bytes // 4)
        ids_w, ids_r = unchecked_memory(
            m, "ids", 8 * config.port_bytes, 4 * config.max_assignments // config.port_bytes)
        id_word = Signal(8 * config.port_bytes, reset_less=True)
        raw_id = Signal(32, reset_less=True)
        ahead = Signal.like(w.index)  # index of the pair whose id is being read
        k = Signal(5, reset_less=True)
        last_of_token = Signal()
        valid_of_token = Signal(5, reset_less=True)
        zero_token = Signal(layouts.token_bits(config), reset_less=True)
        expert = Mux(job.routed, raw_id, k)
        m.d.comb += [
            ids_w.en.eq(self.ids_w_en),
            ids_w.addr.eq(self.ids_w_address),
            ids_w.data.eq(self.ids_w_data),
            ids_r.addr.eq(ahead >> lane_bits),
            self.total_w_en.eq(w.third & w.counting & last_of_token),
            self.total_w_address.eq(w.token),
            self.total_w_data.eq(valid_of_token + w.valid),
            self.o_zero.payload.eq(zero_token),
        ]
        m.d.sync += [
            id_word.eq(ids_r.data),
            w.valid.eq(expert < job.num_experts),
            w.expert.eq(expert),
            last_of_token.eq(k + 1 == job.top_k),
            w.last_pair.eq(w.index + 1 == self.i_pairs),
            w.no_expert.eq(w.counting & last_of_token & (valid_of_token == 0) & ~w.valid),
        ]
        with m.If(w.take_first | w.third):
            m.d.sync += [
                raw_id.eq(id_word.word_select(ahead[:lane_bits], 32)),
                ahead.eq(ahead + 1),
            ]
        with m.If(w.third):
            m.d.sync += [
                w.index.eq(w.index + 1), k.eq(Mux(last_of_token, 0, k + 1)),
                w.token.eq(w.token + last_of_token),
                zero_token.eq(w.token),
                w.ended.eq(w.last_pair),
                valid_of_token.eq(Mux(last_of_token, 0, valid_of_token + w.valid)),
            ]
        with m.If(w.rewind):
            m.d.sync += [
                w.index.eq(0), ahead.eq(0), k.eq(0), w.token.eq(0), valid_of_token.eq(0)]

    def _ranks(self, m, w):
        """Give ranks to experts and count their pairs, from what [ranks] says of the rank read.

        A pair is written two cycles behind its third one, while the next pair's expert is looked
        up: if that is the same, what was read does not count (``again``).
        """
        ranks_w, ranks_r = unchecked_memory(m, "ranks", w.ranked, self._config.max_experts)
        there = Signal()
        m.d.comb += [
            ranks_r.addr.eq(Mux(w.counting, w.found, w.walk)),
            w.at.eq(ranks_r.data),
            there.eq((w.at.expert == w.entry.expert) & (w.place < w.experts)),
            ranks_w.en.eq(w.known & w.counting),
            ranks_w.addr.eq(w.rank),
            ranks_w.data.eq(w.entry),
        ]
        m.d.sync += [
            w.read.eq(w.third & w.valid), w.known.eq(w.read), w.single.eq(self.i_job.tokens == 1)]
        with m.If(w.read):
            m.d.sync += w.new.eq(~there & ~w.again)
            with m.If(~w.again):
                m.d.sync += [
                    w.rank.eq(Mux(there, w.place, w.experts)),
                    w.entry.more.eq(Mux(there, w.at.more + 1, 0))]
            with m.Else():
                m.d.sync += w.entry.more.eq(w.entry.more + 1)
        with m.If(w.known & w.counting):
            m.d.sync += [w.experts.eq(w.experts + w.new), w.shared.eq(w.shared | ~w.new)]
        with m.If(w.prefixing):
            m.d.sync += w.entry.eq(w.at)

    def _list(self, m, w):
        """List experts in their order: one token's when they are counted, else with their places.

        Numbers and pairs are read by different blocks.
        """
        listing = Signal()
        m.d.comb += listing.eq(Mux(w.single, w.known & w.counting, w.placing))
        more = Signal.like(w.entry.more)
        for name, address, value, answer in (
            ("listed", self.expert_address, w.entry.expert, self.expert_data),
            ("listed_more", self.count_address, w.entry.more, more),
        ):
            write, read = unchecked_memory(m, name, len(value), self._config.max_experts)
            m.d.comb += [
                write.en.eq(listing),
                write.addr.eq(Mux(w.single, w.rank, self.o_experts)),
                write.data.eq(value),
                read.addr.eq(address),
                answer.eq(read.data),
            ]
        m.d.comb += self.count_data.eq(more + 1)
        with m.If(listing):
            m.d.sync += self.o_experts.eq(self.o_experts + (w.new | ~w.single))

    def _places(self, m, w):
        """Keep each expert's rank; then its cursor, at first the sum of the counts before it."""
        config = self._config
        places_w, places_r = unchecked_memory(m, "places", len(w.place), config.max_experts)
        sorted_w, sorted_r = unchecked_memory(
            m, "sorted", layouts.pair(config), config.max_assignments)
        m.d.comb += [
            places_r.addr.eq(w.expert),
            w.found.eq(places_r.data),
            places_w.addr.eq(w.entry.expert),
            places_w.data.eq(
                Mux(w.placing, w.prefix, Mux(w.counting, w.rank, w.place + 1))),
            places_w.en.eq(w.placing | Mux(w.counting, w.known, w.read)),
            sorted_w.addr.eq(Mux(w.counting, w.rank, w.place)),
            sorted_w.data.eq(w.pair),
            sorted_w.en.eq(Mux(w.counting, w.known & w.new, w.read)),
            sorted_r.addr.eq(self.pair_address),
            self.pair_data.eq(sorted_r.data),
            self.o_pairs.eq(Mux(w.single & ~w.shared, self.o_experts, w.prefix)),
        ]
        with m.If(w.third & w.valid):
            m.d.sync += [
                w.pair.token.eq(w.token), w.pair.index.eq(w.index), w.entry.expert.eq(w.expert),
                w.place.eq(w.found),
                w.again.eq((w.expert == w.entry.expert) & (w.experts != 0)),
            ]

    def _sequence(self, m, w):
        """Count; unless all is in its place, add up, and put into place."""
        in_place = Signal()
        m.d.comb += in_place.eq((w.single & ~w.shared) | (w.experts == 0))
        m.d.sync += [w.walk_ends.eq(w.walk + 1 == w.experts), w.placing.eq(0)]
        with m.If(w.placing):
            m.d.sync += w.prefix.eq(w.prefix + w.entry.more + 1)
        with m.FSM() as sequence:
            m.d.comb += w.rewind.eq(sequence.ongoing("IDLE") | w.prefixing)
            with m.State("IDLE"):
                with m.If(self.i_start):
                    m.d.sync += [w.counting.eq(1), w.experts.eq(0), self.o_experts.eq(0),
                                 w.shared.eq(0), w.singles.eq(0), w.walk.eq(0), w.prefix.eq(0)]
                    m.next = "FIRST"
            with m.State("FIRST"):  # id
                m.d.sync += w.take_first.eq(1)
                m.next = "TAKE"
            with m.State("TAKE"):
                m.d.sync += w.take_first.eq(0)
                m.next = "ID"
            with m.State("ID"):
                m.next = "READ"
            with m.State("READ"):
                m.d.sync += w.third.eq(1)
                m.next = "THIRD"
            with m.State("THIRD"):
                m.d.sync += w.third.eq(0)
                m.next = "ID"
                with m.If(w.no_expert):
                    m.next = "ZERO"
                with m.Elif(w.last_pair):
                    m.next = "LAST"
            with m.State("ZERO"):  # a token without any expert
                m.d.comb += self.o_zero.valid.eq(1)
                with m.If(self.o_zero.ready):
                    m.next = "ID"
                    with m.If(w.ended):
                        m.next = "LAST"
            with m.State("LAST"):  # it is being put into its place, or looked up
                m.d.comb += self.o_done.eq(~w.counting)
                m.next = "IDLE"
                with m.If(w.counting):
                    m.next = "KNOWN"
            with m.State("KNOWN"):
                m.d.sync += w.counting.eq(0)
                m.next = "COUNTED"
            with m.State("COUNTED"):
                m.d.comb += self.o_done.eq(in_place)
                m.d.sync += w.prefixing.eq(~in_place)
                m.next = "IDLE"
                with m.If(~in_place):
                    m.next = "RANK"
            with m.State("RANK"):
                m.next = "RANKED"
            with m.State("RANKED"):  # its place is written in the next cycle
                m.d.sync += [w.placing.eq(w.single | ((w.at.more == 0) == w.singles)),
                             w.walk.eq(w.walk + 1)]
                m.next = "RANK"
                with m.If(w.walk_ends):
                    m.d.sync += [w.walk.eq(0), w.singles.eq(1)]
                    with m.If(w.single | w.singles):
                        m.d.sync += w.prefixing.eq(0)
                        m.next = "FIRST"
