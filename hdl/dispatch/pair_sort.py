"""Token-expert pairs in the order of their experts: a counting sort."""

from amaranth import *
from amaranth.lib import stream, wiring
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

        # The walk over the pairs, in the order of their tokens, and the pair that it is at.
        self.rewind = Signal()
        self.take_first = Signal()  # the first id is there
        self.third = Signal()  # of a pair's cycles
        self.counting = Signal()  # the first of two walks
        self.counted = Signal()
        self.scattered = Signal()
        self.index = Signal(pairs_bits, reset_less=True)
        self.token = Signal(config.max_tokens.bit_length(), reset_less=True)
        self.expert = Signal(layouts.expert_bits(config))
        self.valid = Signal()  # it has an expert
        self.last_of_token = Signal()
        self.last_pair = Signal()
        self.no_expert = Signal()  # while counting, with the last pair of a token: none is valid

        # The walk over the experts.
        self.walk = Signal(layouts.expert_bits(config) + 1, reset_less=True)
        self.walk_ends = Signal()  # it was the last expert, a cycle ago
        self.clearing = Signal()
        self.prefixing = Signal()
        self.prefix = Signal(pairs_bits, reset_less=True)
        self.count = Signal(pairs_bits)  # of the expert that either walk was at, a cycle ago


class PairSort(wiring.Component):
    """Sort the pairs of a command by expert; those of an expert stay in the order of their tokens.

    ::

        ids_w --> [ids] --> count --> [counts] --> prefix --> [cursors] --> scatter --> [pairs]
                             |  |         |                                    ^            |
                             |  |         +--> count_data                      +-- [ids]    |
                    o_zero <-+  +--> total_w                              pair_data <-------+

    The pairs are walked over twice: to count those of each expert, and, when each expert's place
    follows from the counts, to put them there. An id that is negative or not below ``num_experts``
    makes no pair; a token without any pair is announced on ``o_zero``, and counting waits until
    that is taken. A job that is not ``routed`` has no ids: a token's pairs are of experts 0, 1, ...

    Cycles: from ``i_start`` to ``o_cleared``, 2 and 1 for each expert. From ``i_count`` to
    ``o_done``, 4 and 3 for each pair to count, 1 or more for each token without pairs, 2 for each
    expert, 4 and 3 for each pair to put into its place. Reset: idle.

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
        Pulse: a new job; drops the last one's pairs. Not before ``o_done``.
    o_cleared : :py:`Out(1)`
        It waits for ``i_count``; never in a job that is not ``routed``.
    i_count : :py:`In(1)`
        All ids have been written. Only with ``o_cleared``.
    o_counted : :py:`Out(1)`
        Pulse: what ``count_address`` asks for is complete.
    o_done : :py:`Out(1)`
        Pulse: what ``pair_address`` asks for, and ``o_pairs``, are complete.
    o_zero : :py:`Out(stream.Signature(layouts.token_bits(config)))`
        A token without any pair.
    total_w_en, total_w_address, total_w_data : :py:`Out`
        The pairs of a token have been counted: its index, and how many they are, 0 included. Once
        for each token, before ``o_counted``.
    o_pairs : :py:`Out`
        Pairs of all experts.
    count_address, count_data : :py:`In(layouts.expert_bits(config))`, :py:`Out`
        Pairs of an expert, one cycle later.
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
            "o_cleared": Out(1),
            "i_count": In(1),
            "o_counted": Out(1),
            "o_done": Out(1),
            "o_zero": Out(stream.Signature(layouts.token_bits(config))),
            "total_w_en": Out(1),
            "total_w_address": Out(layouts.token_bits(config)),
            "total_w_data": Out(5),
            "o_pairs": Out(pairs_bits),
            "count_address": In(layouts.expert_bits(config)),
            "count_data": Out(pairs_bits),
            "pair_address": In(ceil_log2(config.max_assignments)),
            "pair_data": Out(layouts.pair(config)),
        })

    def elaborate(self, platform):
        m = Module()
        wires = _Wires(self._config)
        self._pairs(m, wires)
        self._counts(m, wires)
        self._places(m, wires)
        self._sequence(m, wires)
        return m

    def _pairs(self, m, w):
        """Walk over the pairs in the order of their tokens.

        Every pair has three cycles (ID, READ, WRITE); its id is read during the pair before it, and
        all that the third needs to know comes from registers, be it that it is the third. A rewind
        sets what a reset need not.
        """
        config, job = self._config, self.i_job
        lane_bits = exact_log2(config.port_bytes // 4)
        ids_w, ids_r = unchecked_memory(
            m, "ids", 8 * config.port_bytes, 4 * config.max_assignments // config.port_bytes)
        id_word = Signal(8 * config.port_bytes, reset_less=True)
        raw_id = Signal(32, reset_less=True)
        ahead = Signal.like(w.index)  # index of the pair whose id is being read
        k = Signal(5, reset_less=True)
        valid_of_token = Signal(5, reset_less=True)
        zero_token = Signal(layouts.token_bits(config), reset_less=True)
        rewound = Signal(3)  # the first id: address, memory, register
        expert = Mux(job.routed, raw_id, k)
        m.d.comb += [
            ids_w.en.eq(self.ids_w_en),
            ids_w.addr.eq(self.ids_w_address),
            ids_w.data.eq(self.ids_w_data),
            ids_r.addr.eq(ahead >> lane_bits),
            w.take_first.eq(rewound[-1]),
            w.counted.eq(w.third & w.counting),
            w.scattered.eq(w.third & ~w.counting),
            self.total_w_en.eq(w.counted & w.last_of_token),
            self.total_w_address.eq(w.token),
            self.total_w_data.eq(valid_of_token + w.valid),
            self.o_zero.payload.eq(zero_token),
        ]
        m.d.sync += [
            rewound.eq(Cat(w.rewind, rewound)),
            id_word.eq(ids_r.data),
            w.valid.eq(expert < job.num_experts),
            w.expert.eq(expert),
            w.last_of_token.eq(k + 1 == job.top_k),
            w.last_pair.eq(w.index + 1 == self.i_pairs),
            w.no_expert.eq(w.counting & w.last_of_token & (valid_of_token == 0) & ~w.valid),
        ]
        with m.If(w.take_first | w.third):
            m.d.sync += [
                raw_id.eq(id_word.word_select(ahead[:lane_bits], 32)),
                ahead.eq(ahead + 1),
            ]
        with m.If(w.third):
            m.d.sync += [
                w.index.eq(w.index + 1), k.eq(Mux(w.last_of_token, 0, k + 1)),
                w.token.eq(w.token + w.last_of_token),
                zero_token.eq(w.token),
                w.counting.eq(w.counting & ~w.last_pair),
                w.prefixing.eq(w.counting & w.last_pair),
                valid_of_token.eq(Mux(w.last_of_token, 0, valid_of_token + w.valid)),
            ]
        with m.If(w.rewind):
            m.d.sync += [
                w.index.eq(0), ahead.eq(0), k.eq(0), w.token.eq(0), valid_of_token.eq(0)]

    def _counts(self, m, w):
        """Count the pairs of each expert, in a memory for the sort and one for those behind it."""
        for name, address, answer in (
            ("counts", Mux(w.counting, w.expert, w.walk), w.count),
            ("table_counts", self.count_address, self.count_data),
        ):
            write, read = unchecked_memory(m, name, len(self.o_pairs), self._config.max_experts)
            # Until the counts are cleared and the prefixes complete, an entry may be written twice.
            m.d.comb += [
                read.addr.eq(address),
                answer.eq(read.data),
                write.addr.eq(Mux(w.clearing, w.walk, w.expert)),
                write.data.eq(Mux(w.clearing, 0, w.count + 1)),
                write.en.eq(w.clearing | (w.counted & w.valid)),
            ]

    def _places(self, m, w):
        """Put each pair where its expert's cursor is, at first the sum of the counts before it."""
        config = self._config
        cursor_w, cursor_r = unchecked_memory(m, "cursors", len(self.o_pairs), config.max_experts)
        sorted_w, sorted_r = unchecked_memory(
            m, "sorted", layouts.pair(config), config.max_assignments)
        m.d.comb += [
            cursor_r.addr.eq(w.expert),
            cursor_w.addr.eq(Mux(w.prefixing, w.walk, w.expert)),
            cursor_w.data.eq(Mux(w.prefixing, w.prefix, cursor_r.data + 1)),
            cursor_w.en.eq(w.prefixing | (w.scattered & w.valid)),
            sorted_w.addr.eq(cursor_r.data),
            sorted_w.data.token.eq(w.token),
            sorted_w.data.index.eq(w.index),
            sorted_w.en.eq(w.scattered & w.valid),
            sorted_r.addr.eq(self.pair_address),
            self.pair_data.eq(sorted_r.data),
            self.o_pairs.eq(w.prefix),
        ]

    def _sequence(self, m, w):
        """Clear, count, add up, and put into place."""
        m.d.sync += w.walk_ends.eq(w.walk + 1 == self.i_job.num_experts)
        with m.If(w.rewind):
            m.d.sync += w.walk.eq(0)
        with m.FSM():
            with m.State("IDLE"):
                with m.If(self.i_start):
                    m.d.sync += [w.clearing.eq(1), w.counting.eq(1), w.prefix.eq(0), w.walk.eq(0),
                                 w.walk_ends.eq(0)]
                    m.next = "CLEAR"
            with m.State("CLEAR"):  # while the ids are on their way
                m.d.sync += w.walk.eq(w.walk + 1)
                with m.If(w.walk_ends):
                    m.d.sync += w.clearing.eq(0)
                    m.next = "START"
                    with m.If(self.i_job.routed):
                        m.next = "CLEARED"
            with m.State("CLEARED"):
                m.d.comb += self.o_cleared.eq(1)
                with m.If(self.i_count):
                    m.next = "START"
            with m.State("START"):  # the walk that counts, and the one that scatters
                m.d.comb += w.rewind.eq(1)
                m.next = "FIRST"
            with m.State("FIRST"):
                with m.If(w.take_first):
                    m.next = "ID"
            with m.State("ID"):
                m.next = "READ"
            with m.State("READ"):
                m.d.sync += w.third.eq(1)
                m.next = "WRITE"
            with m.State("WRITE"):
                m.d.sync += w.third.eq(0)
                m.next = "ID"
                with m.If(w.no_expert):
                    m.next = "ZERO"
                with m.Elif(w.last_pair):
                    m.d.comb += self.o_done.eq(~w.counting)
                    m.next = "IDLE"
                    with m.If(w.counting):
                        m.d.comb += self.o_counted.eq(1)
                        m.next = "PREFIX_READ"
            with m.State("ZERO"):  # a token without any expert
                m.d.comb += self.o_zero.valid.eq(1)
                with m.If(self.o_zero.ready):
                    m.next = "ID"
                    with m.If(w.prefixing):
                        m.d.comb += self.o_counted.eq(1)
                        m.next = "PREFIX_READ"
            with m.State("PREFIX_READ"):
                m.next = "PREFIX_WRITE"
            with m.State("PREFIX_WRITE"):
                m.d.sync += [w.prefix.eq(w.prefix + w.count), w.walk.eq(w.walk + 1)]
                m.next = "PREFIX_READ"
                with m.If(w.walk_ends):
                    m.d.sync += w.prefixing.eq(0)
                    m.next = "START"
