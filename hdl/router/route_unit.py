"""ROUTE: logits in memory become ids and weights in memory."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.router.capacity import Capacity
from moeaccel.hdl.router.pair_writer import PairWriter
from moeaccel.hdl.router.router_checks import table_units
from moeaccel.hdl.router.to_fixed import ToFixed
from moeaccel.hdl.router.token_router import TokenRouter
from moeaccel.hdl.router.word_reader import WordReader
from moeaccel.hdl.sequential_multiplier import SequentialMultiplier
from moeaccel.interface.commands import ENTRY_BYTES
from moeaccel.router.choices import Gates

__all__ = ["RouteUnit"]

_WORDS = ENTRY_BYTES // 4


class RouteUnit(wiring.Component):
    """Execute ROUTE: golden model :mod:`moeaccel.golden.router`.

    ::

        reader --> WordReader --+--> tables of TokenRouter
                      ^         +--> ToFixed --> TokenRouter --+--> PairWriter --> writer
        i_logits -----+                               ^        |
                                                      +----- Capacity

    The router's table first, then the logits of all tokens; with a capacity these once more: pairs
    of the first sweep are counted, and only those of the second written. Logits that are still
    being made are waited for; those of a single token are taken on their way to memory, which wait
    for the table. Cycles: ``moeaccel.cycles.route_unit``. Reset: idle; the memory port is flushed
    with it.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With a router.
    family : :class:`str`
        FPGA family: see :class:`~moeaccel.hdl.array.multiplier.Multiplier`.

    Members
    -------
    i_start : :py:`In(1)`
        Pulse. Not before ``o_idle``.
    i_job : :py:`In(layouts.job(config))`
        Of a ROUTE; holds from ``i_start`` to ``o_sent``.
    i_there, i_none : :py:`In(1)`
        The logits are in memory; with it, there are none: then there will be no pairs.
    o_takes, i_logits : :py:`Out(1)`, :py:`In(layouts.logit_beat(config))`
        Of a job that ``continues`` a product of a single token: its logits, in their order, as they
        go to memory; not before ``o_takes``.
    o_sent, o_idle : :py:`Out(1)`
        All pairs are on their way to memory, or none will be; all are there.
    o_saturated : :py:`Out(1)`
        Pulse for each logit beyond its range.
    o_nonfinite, o_token : :py:`Out(1)`, :py:`Out(layouts.token_bits(config))`
        A logit is NaN or infinite; the first token with one. From ``o_idle`` to ``i_start``.
    o_moves : :py:`Out(1)`
        It was at work in the cycle before, also where memory is not asked for anything.
    o_pairs : :py:`Out(layouts.pair_beat(config))`
        What went to memory in the cycle before, for who needs it at once; the last of it comes
        with ``o_sent`` at the latest.
    reader : :py:`Out(layouts.ReadClientSignature(config))`
    writer : :py:`Out(layouts.WriteClientSignature(config))`
    """

    def __init__(self, config, family="generic"):
        if not isinstance(config, AcceleratorConfig) or not config.router:
            raise TypeError(f"config must be an AcceleratorConfig with a router, not {config!r}")
        self._config = config
        self._family = family
        super().__init__({
            "i_start": In(1),
            "i_job": In(layouts.job(config)),
            "i_there": In(1),
            "i_none": In(1),
            "o_takes": Out(1),
            "i_logits": In(layouts.logit_beat(config)),
            "o_sent": Out(1),
            "o_idle": Out(1),
            "o_saturated": Out(1),
            "o_nonfinite": Out(1),
            "o_token": Out(layouts.token_bits(config)),
            "o_moves": Out(1),
            "o_pairs": Out(layouts.pair_beat(config)),
            "reader": Out(layouts.ReadClientSignature(config)),
            "writer": Out(layouts.WriteClientSignature(config)),
        })

    def elaborate(self, platform):
        m = Module()
        config, job = self._config, self.i_job
        m.submodules.router = router = TokenRouter(config, self._family)
        m.submodules.pairs = pairs = PairWriter(config)
        m.submodules.units = units = SequentialMultiplier(
            config.max_tokens.bit_length(), len(job.steps_in))
        m.submodules.words = words = WordReader(
            config, count_bits=len(units.o_product) + 1)
        m.submodules.to_fixed = to_fixed = ToFixed()
        wiring.connect(m, outside=wiring.flipped(self.reader), words=words.reader)
        wiring.connect(m, outside=wiring.flipped(self.writer), pairs=pairs.writer)
        # Registers between the memory's writer and the dispatcher's memories: both are far away.
        m.d.sync += [
            self.o_pairs.valid.eq(self.writer.data.valid & self.writer.data.ready),
            self.o_pairs.of_weights.eq(pairs.o_of_weights),
            self.o_pairs.data.eq(self.writer.data.payload),
        ]
        table, residents = table_units(config, job)
        counting, counted, walking = self._sweeps(m, router, pairs)
        m.d.sync += self.o_moves.eq(router.o_moves | walking)
        outputs, shared = layouts.router_outputs(config, job.form), job.form.shared
        if "gates" in config.router_modes:  # then the router makes the pairs of shared experts
            shared = Mux(job.form.gates == Gates.NONE, shared, 0)

        # Words are those of the table, in turn a bias and a selection bias, residents, or logits.
        index = Signal(range(2 * config.max_experts + _WORDS + 1))
        in_table, reading = Signal(), Signal()
        in_residents = Signal()  # behind the table
        expert = index >> 1
        mine, early = Signal(), Signal()
        m.d.comb += [
            router.i_form.eq(job.form),
            pairs.i_tokens.eq(job.tokens),
            pairs.i_shared.eq(shared), pairs.i_experts.eq(job.num_experts),
            pairs.i_ids_address.eq(job.ids_address),
            pairs.i_weights_address.eq(job.weights_address),
            units.i_start.eq(self.i_start), units.i_a.eq(job.tokens), units.i_b.eq(job.steps_in),
            words.i_address.eq(Mux(early, job.table_address, job.x_address)),
            words.i_count.eq(Mux(early, Mux(in_table, table, 0) + residents, units.o_product << 1)),
            early.eq(in_table | in_residents),
            mine.eq(Mux(in_table, expert < job.num_experts, index < outputs)),
        ]
        taken = words.o_word.valid & words.o_word.ready
        write = in_table & taken & mine
        for port, odd in (("bias", 0), ("extra", 1)):
            m.d.comb += [
                getattr(router, f"{port}_w_en").eq(write & (index[0] == odd)),
                getattr(router, f"{port}_w_address").eq(expert),
                getattr(router, f"{port}_w_data").eq(words.o_word.payload),
            ]

        if "prior" in config.router_modes:
            m.d.comb += [
                router.resident_w_en.eq(
                    in_residents & taken & (index < -(-config.max_experts // 32))),
                router.resident_w_address.eq(index),
                router.resident_w_data.eq(words.o_word.payload),
            ]

        # Logits that are on their way have a place.
        depth = 16
        m.submodules.logits = logits = fifo.SyncFIFOBuffered(
            width=len(to_fixed.o_logit.as_value()), depth=depth)
        # Of the cycle before, in which one more may have come. Before logits, there is room.
        room = Signal()
        m.d.sync += room.eq(early | (logits.level <= depth - 3 - ToFixed.LATENCY_CYCLES))
        m.d.comb += [
            words.o_word.ready.eq(room),
            to_fixed.i_float.eq(words.o_word.payload),
            to_fixed.i_valid.eq(words.o_word.valid & room & ~early & mine),
            logits.w_en.eq(to_fixed.o_valid), logits.w_data.eq(to_fixed.o_logit),
            router.i_logit.valid.eq(logits.r_rdy), router.i_logit.payload.eq(logits.r_data),
            logits.r_en.eq(router.i_logit.ready),
            self.o_saturated.eq(router.o_saturated & ~counting),
        ]
        done, token = Signal(range(config.max_experts + 1)), Signal(layouts.token_bits(config))
        with m.If(to_fixed.o_valid):
            m.d.sync += done.eq(done + 1)
            with m.If(done + 1 == outputs):
                m.d.sync += [done.eq(0), token.eq(token + 1)]
            with m.If(to_fixed.o_nonfinite & ~self.o_nonfinite):
                m.d.sync += [self.o_nonfinite.eq(1), self.o_token.eq(token)]

        row_last = Cat(C(31, 5), job.steps_in - 1)[:len(index)]
        table_ends = in_table & (index == Cat(C(_WORDS - 1, 4), table - 1))
        with m.If(taken):
            m.d.sync += index.eq(
                Mux(table_ends | (~early & (index == row_last)), 0, index + 1))
            with m.If(table_ends):
                m.d.sync += [in_table.eq(0), in_residents.eq(residents != 0)]
        awaiting, given = Signal(), Signal()  # a single token's logits, that come by themselves
        single = Signal()  # the job is of such a token: known long before they are
        m.d.sync += [
            single.eq(job.continues & (job.tokens == 1)),
            # The writer that they pass on their way is far away.
            words.i_beat.valid.eq(self.i_logits.valid & self.o_takes),
            words.i_beat.data.eq(self.i_logits.data),
        ]
        m.d.comb += self.o_takes.eq(awaiting | given)
        m.d.sync += Assert(~(self.o_sent & words.i_beat.valid),
                           "logits must have gone by when their pairs have")
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.o_idle.eq(~self.i_start), self.o_sent.eq(~self.i_start)]
                m.d.sync += [index.eq(0), given.eq(0)]
                with m.If(self.i_start):
                    m.d.sync += [self.o_nonfinite.eq(0), in_table.eq(job.form.tables),
                                 in_residents.eq(~job.form.tables & (residents != 0))]
                    m.next = "TABLE"
            with m.State("TABLE"):
                m.d.comb += words.i_start.eq(early)
                m.next = "TABLE_WORDS"
            with m.State("TABLE_WORDS"):
                with m.If(units.o_done & words.o_idle & ~reading):
                    m.d.sync += [in_residents.eq(0), index.eq(0)]
                    m.next = "LOGITS"
            with m.State("LOGITS"):
                m.d.comb += awaiting.eq(single & ~given)
                m.d.sync += token.eq(0)
                with m.If(awaiting & self.i_logits.valid):
                    m.d.comb += pairs.i_start.eq(1)
                    m.d.sync += given.eq(1)
                    m.next = "ROUTE"
                with m.Elif(self.i_there & self.i_none):
                    m.next = "IDLE"
                with m.Elif(self.i_there & ~awaiting):
                    m.d.comb += [words.i_start.eq(1), pairs.i_start.eq(1)]
                    m.next = "ROUTE"
            with m.State("ROUTE"):
                # Behind the last logit there may be more words of its row; of a single token's, all
                # have gone by: the port takes pairs when the row is acknowledged.
                m.d.comb += self.o_sent.eq(pairs.o_sent & words.o_idle & ~reading)
                with m.If(counted & words.o_idle & ~reading):
                    m.d.sync += counting.eq(0)
                    m.next = "LOGITS"
                with m.If(pairs.o_idle & words.o_idle & ~reading):
                    m.next = "IDLE"
        # A read has begun by the cycle behind its start.
        m.d.sync += reading.eq(words.i_start)
        return m

    def _sweeps(self, m, router, pairs):
        """Hand pairs on; with a capacity, those of a first sweep to who counts them.

        Return whether it is that sweep, whether it has ended, and whether its pairs are counted.
        """
        counting, counted = Signal(), Signal()
        if "capacity" not in self._config.router_modes:
            wiring.connect(m, router=router.o_pair, pairs=pairs.i_pair)
            return counting, counted, C(0)
        job = self.i_job
        m.submodules.capacity = capacity = Capacity(self._config)
        capped = job.form.capacity != 0
        m.d.comb += [
            capacity.i_form.eq(job.form), capacity.i_tokens.eq(job.tokens),
            capacity.i_experts.eq(job.num_experts), capacity.i_start.eq(self.i_start & capped),
            capacity.i_pair.payload.eq(router.o_pair.payload),
            pairs.i_pair.payload.eq(router.o_pair.payload),
            capacity.i_pair.valid.eq(router.o_pair.valid & counting),
            pairs.i_pair.valid.eq(router.o_pair.valid & ~counting),
            router.o_pair.ready.eq(
                Mux(counting, capacity.i_pair.ready, pairs.i_pair.ready)),
            router.i_capped.eq(capped & ~counting), router.i_left.eq(capacity.o_left),
            capacity.i_next.eq(router.o_next), counted.eq(counting & capacity.o_done),
        ]
        with m.If(self.i_start):
            m.d.sync += counting.eq(capped)
        return counting, counted, capacity.o_moves
