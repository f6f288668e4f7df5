"""Which tokens go to which expert: counting sort, passes, slot tables."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.arithmetic import SUBNORMAL_EXPONENT
from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.dispatch.expert_table import ExpertTable
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.interface.commands import ENTRY_BYTES, SECTIONS_MAX

FILL_CYCLES = 4
"""From a pair to its entry in the slot table: its weight becomes an internal float."""


class Dispatcher(wiring.Component):
    """Sort the assignments of a command by expert and hand them out as passes.

    ::

        i_job --> fetch ids, weights --> count --> prefix --> scatter --> for each busy expert:
                                           |                    weights, sections, slot table, x,
                                           v                    pass
                                     [ExpertTable] -----------------^

    A stable counting sort by expert id over at most ``max_assignments`` token-expert pairs. Ids
    that are negative or not below ``num_experts`` are skipped; a token without any pair is
    announced on ``o_zero`` before the first pass. What is to be computed for an expert comes from
    the :class:`~moeaccel.hdl.dispatch.expert_table.ExpertTable`; at a bad entry the command ends
    when the passes handed out before have retired. A pass takes at most as many pairs as there are
    slots (``max_slots``, half of it in ``a16``); consecutive passes over the very same tokens keep
    x and y on the chip (``same``). At most one pass is prepared while another runs: a pass is begun
    when fewer than two are handed out and not retired, so that nobody reads the bank of the slot
    table, or of x, that it fills.

    Counting begins when all ids have come, the first slot table when all weights have, and a
    command is done when both have. All else that goes out is a stream.

    Cycles: 3 for each pair to count and 3 to scatter, 2 for each expert, then about 6 for each slot
    of a pass, and FILL_CYCLES. A job that is not ``routed`` needs no ids: every token goes to
    expert 0 with weight 1.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_job : :py:`In(stream.Signature(layouts.job(config)))`
        Accepted when idle; the job's fields are held on ``o_job`` until the next one.
    reader : :py:`Out(layouts.ReadClientSignature(config))`
        Fetches ids, then weights, then entries of the expert table.
    o_weights : :py:`Out(stream.Signature(weight_request(config)))`
        Image of each pass, for the weight streamer.
    o_section : :py:`Out(stream.Signature(layouts.section(config)))`
        Shape of each section, for the tile buffer.
    o_load : :py:`Out(stream.Signature(load_request(config)))`
        Asks for the x of a new set of tokens.
    o_pass : :py:`Out(stream.Signature(pass_descriptor(config)))`
        The pass, once its slot table is complete.
    o_zero : :py:`Out(stream.Signature(token))`
        A token without any expert.
    i_retired : :py:`In(1)`
        Pulse: the oldest pass has left the machine; its slot table may be overwritten.
    slot_w_en, slot_w_address, slot_w_data
        Write port of the slot table; address {bank, slot}.
    o_assignments : :py:`Out(1)`
        Pulse for each pair put into a pass.
    o_done : :py:`Out(1)`
        High when every pass of the command has been handed out.
    o_bad, o_bad_expert, o_bad_word : :py:`Out(1)`, :py:`Out`, :py:`Out`
        The entry of that expert is bad, for its 32-bit word: no pass comes any more. Until the next
        job is accepted.
    o_nonfinite, o_nonfinite_token : :py:`Out(1)`, :py:`Out(layouts.token_bits(config))`
        The weight of a pair is NaN or infinite, and counts as zero; the lowest such token. Complete
        with ``o_done``, forgotten when the next job is accepted.
    """

    def __init__(self, config: AcceleratorConfig):
        self._config = config
        super().__init__(
            {
                "i_job": In(stream.Signature(layouts.job(config))),
                "o_job": Out(layouts.job(config)),
                "reader": Out(layouts.ReadClientSignature(config)),
                "o_weights": Out(stream.Signature(weight_request(config))),
                "o_section": Out(stream.Signature(layouts.section(config))),
                "o_load": Out(stream.Signature(load_request(config))),
                "o_pass": Out(stream.Signature(pass_descriptor(config))),
                "o_zero": Out(stream.Signature(layouts.token_bits(config))),
                "i_retired": In(1),
                "slot_w_en": Out(1),
                "slot_w_address": Out(1 + layouts.slot_bits(config)),
                "slot_w_data": Out(layouts.slot(config)),
                "o_assignments": Out(1),
                "o_done": Out(1),
                "o_bad": Out(1),
                "o_bad_expert": Out(layouts.expert_bits(config)),
                "o_bad_word": Out(range(ENTRY_BYTES // 4)),
                "o_nonfinite": Out(1),
                "o_nonfinite_token": Out(layouts.token_bits(config)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        pairs_bits = config.max_assignments.bit_length()
        index_bits = ceil_log2(config.max_assignments)
        expert_bits = layouts.expert_bits(config)
        per_beat = config.port_bytes // 4
        lane_bits = exact_log2(per_beat)
        beats = config.max_assignments // per_beat

        job = Signal(layouts.job(config))
        running = Signal()
        m.d.comb += [
            self.o_job.eq(job), self.i_job.ready.eq(~running), self.o_done.eq(~running)]
        two = job.two_planes

        # -- storage; what is read while it is written is not used
        def memory(name, shape, depth):
            m.submodules[name] = mem = Memory(
                shape=shape, depth=depth, init=[], attrs={"no_rw_check": 1})
            return mem.write_port(), mem.read_port()

        ids_w, ids_r = memory("ids", 8 * config.port_bytes, beats)
        weights_w, weights_r = memory("weights", 8 * config.port_bytes, beats)
        count_w, count_r = memory("counts", pairs_bits, config.max_experts)
        table_count_w, table_count_r = memory("table_counts", pairs_bits, config.max_experts)
        cursor_w, cursor_r = memory("cursors", pairs_bits, config.max_experts)
        pair = data.StructLayout({"token": layouts.token_bits(config), "index": index_bits})
        sorted_w, sorted_r = memory("sorted", pair, config.max_assignments)
        total_w, total_r = memory("totals", 5, config.max_tokens)
        done_w, done_r = memory("done", 5, config.max_tokens)
        resident = data.StructLayout({"token": layouts.token_bits(config), "first": 1})
        resident_w, resident_r = memory("resident", resident, config.max_slots)

        # -- walking over the pairs in token order; a rewind sets what a reset need not
        pairs = Signal(pairs_bits)
        index = Signal(pairs_bits, reset_less=True)
        k = Signal(5, reset_less=True)
        token = Signal(config.max_tokens.bit_length(), reset_less=True)
        zero_token = Signal(layouts.token_bits(config), reset_less=True)
        valid_of_token = Signal(5, reset_less=True)
        # Every pair has three cycles (ID, READ, WRITE); its id is read during the pair before it,
        # and all that the third needs to know comes from registers, be it that it is the third.
        raw_id = Signal(32, reset_less=True)
        ahead_index = Signal(pairs_bits, reset_less=True)  # of the pair whose id is being read
        expert_id = Signal(expert_bits)
        id_valid = Signal()
        last_of_token, last_pair = Signal(), Signal()
        id_word = Signal(8 * config.port_bytes, reset_less=True)
        no_expert = Signal()  # while counting, with the last pair of a token: none is valid
        rewind, take_first, third, counting = Signal(), Signal(), Signal(), Signal()
        clearing, prefixing, counted, scattered = Signal(), Signal(), Signal(), Signal()
        m.d.comb += ids_r.addr.eq(ahead_index >> lane_bits)
        m.d.sync += [
            id_word.eq(ids_r.data),
            id_valid.eq(~job.routed | (raw_id < job.num_experts)),
            expert_id.eq(Mux(job.routed, raw_id, 0)),
            last_of_token.eq(k + 1 == job.top_k),
            last_pair.eq(index + 1 == pairs),
            third.eq(0),
            no_expert.eq(counting & last_of_token & (valid_of_token == 0) & ~id_valid),
        ]
        rewound = Signal(3)  # the first id: address, memory, register
        m.d.sync += rewound.eq(Cat(rewind, rewound))
        m.d.comb += take_first.eq(rewound[-1])
        m.d.comb += [counted.eq(third & counting), scattered.eq(third & ~counting)]
        with m.If(take_first | third):
            m.d.sync += [
                raw_id.eq(id_word.word_select(ahead_index[:lane_bits], 32)),
                ahead_index.eq(ahead_index + 1),
            ]
        with m.If(third):
            m.d.sync += [
                index.eq(index + 1), k.eq(Mux(last_of_token, 0, k + 1)),
                token.eq(token + last_of_token),
                zero_token.eq(token),
                counting.eq(counting & ~last_pair),
                prefixing.eq(counting & last_pair),
                valid_of_token.eq(Mux(last_of_token, 0, valid_of_token + id_valid)),
            ]
        with m.If(rewind):
            m.d.sync += [
                index.eq(0), ahead_index.eq(0), k.eq(0), token.eq(0), valid_of_token.eq(0)]

        # -- the expert table; it is reset between jobs
        begins, clear = Signal(), Signal()
        table = ExpertTable(config)
        m.submodules.table = ResetInserter(clear)(table)
        m.d.comb += [
            table.i_job.eq(job),
            table.i_start.eq(begins),
            table_count_r.addr.eq(table.count_address),
            table.count_data.eq(table_count_r.data),
        ]

        # -- fetch: ids, then weights, then entries
        fetch_beat = Signal(ceil_log2(beats) if beats > 1 else 1)
        request_beats = Signal(self.reader.request.p.beats.shape())
        m.d.sync += request_beats.eq((pairs + (per_beat - 1)) >> lane_bits)
        fetching, fetching_weights = Signal(), Signal()
        ids_arrived, weights_arrived = Signal(), Signal()
        brings = Signal()  # ids or weights
        m.d.comb += [
            brings.eq(self.reader.valid & ~weights_arrived),
            self.reader.request.valid.eq(fetching | table.reader.request.valid),
            table.reader.request.ready.eq(self.reader.request.ready & ~fetching),
            self.reader.request.p.address.eq(Mux(
                fetching, Mux(fetching_weights, job.weights_address, job.ids_address),
                table.reader.request.p.address)),
            self.reader.request.p.beats.eq(
                Mux(fetching, request_beats, table.reader.request.p.beats)),
            table.reader.valid.eq(self.reader.valid & weights_arrived),
            table.reader.data.eq(self.reader.data),
            table.reader.last.eq(self.reader.last),
            ids_w.addr.eq(fetch_beat),
            ids_w.data.eq(self.reader.data),
            weights_w.addr.eq(fetch_beat),
            weights_w.data.eq(self.reader.data),
            ids_w.en.eq(brings & ~fetching_weights),
            weights_w.en.eq(brings & fetching_weights),
        ]
        with m.If(self.i_job.valid & self.i_job.ready):
            m.d.sync += [
                job.eq(self.i_job.payload), running.eq(1),
                ids_arrived.eq(0), weights_arrived.eq(~self.i_job.p.routed),
                self.o_nonfinite.eq(0), self.o_bad.eq(0),
            ]
        with m.If(brings):
            with m.If(self.reader.last & fetching_weights):
                m.d.sync += weights_arrived.eq(1)
            with m.If(self.reader.last & ~fetching_weights):
                m.d.sync += ids_arrived.eq(1)
            m.d.sync += fetch_beat.eq(Mux(self.reader.last, 0, fetch_beat + 1))

        # -- passes
        ahead = Signal(2)  # passes handed out and not retired
        passed = Signal()
        m.d.sync += [
            ahead.eq(ahead + passed - self.i_retired),
            Assert(~self.i_retired | (ahead != 0), "a pass must be handed out before it retires"),
            Assert(~passed | (ahead != 2), "two passes are handed out already"),
        ]
        walk = Signal(expert_bits + 1, reset_less=True)
        walk_ends = Signal()  # it was the last expert, a cycle ago
        expert = Signal(layouts.expert(config), reset_less=True)
        left = Signal(pairs_bits)  # pairs of this expert not yet in a pass
        position = Signal(pairs_bits, reset_less=True)
        remaining = Signal(pairs_bits)  # pairs of the command not yet in a pass
        slots = Signal(range(config.max_slots + 1))
        slot = Signal(range(config.max_slots + 1))
        capacity = Mux(two, config.max_slots // 2, config.max_slots)
        resident_count = Signal(range(config.max_slots + 1))
        same = Signal()
        last_pass, expert_ends, last_slot = Signal(), Signal(), Signal()
        slot_bank = Signal()
        x_bank = Signal()
        prefix = Signal(pairs_bits, reset_less=True)

        m.d.comb += [
            self.o_weights.p.address.eq(expert.image_address),
            self.o_weights.p.words.eq(expert.words),
            self.o_load.p.bank.eq(x_bank),
            self.o_load.p.slot_bank.eq(slot_bank),
            self.o_load.p.count.eq(slots),
            self.o_pass.p.slot_bank.eq(slot_bank),
            self.o_pass.p.x_bank.eq(x_bank),
            self.o_pass.p.count.eq(slots),
            self.o_pass.p.same.eq(same),
            self.o_pass.p.last.eq(last_pass),
            self.o_pass.p.work.eq(expert.work),
            self.o_bad_expert.eq(expert.expert),
            self.o_bad_word.eq(expert.word),
        ]
        # Known long before they are used.
        m.d.sync += [
            last_slot.eq(slot + 1 == slots),
            walk_ends.eq(walk + 1 == job.num_experts),
            last_pass.eq(remaining == slots),
            expert_ends.eq(left == slots),
        ]

        handed = Signal()  # a pass, in the cycle before
        m.d.sync += handed.eq(passed)
        with m.If(handed):
            m.d.sync += [
                left.eq(left - slots),
                position.eq(position + slots),
                remaining.eq(remaining - slots),
                slot_bank.eq(~slot_bank),
            ]
        with m.If(counted):
            m.d.sync += remaining.eq(remaining + id_valid)
        with m.If(rewind):
            m.d.sync += [walk.eq(0), prefix.eq(0), position.eq(0)]

        # Weight of a pair: float32 to internal float (arithmetic.float32_to_internal).
        entry = Signal(pair)
        m.d.comb += weights_r.addr.eq(entry.index >> lane_bits)
        filled = Signal()
        p = Pipeline(m, filled, "fill")
        s = p.stage(
            word=weights_r.data, part=entry.index[:max(1, lane_bits)], slot=slot,
            address=Cat(slot[: layouts.slot_bits(config)], slot_bank), token=entry.token,
            done=done_r.data, total=total_r.data, resident_first=resident_r.data.first)
        first = Signal()
        m.d.comb += [
            first.eq(Mux(same, s.resident_first, s.done == 0)),
            resident_w.en.eq(p.valid),
            resident_w.addr.eq(s.slot),
            resident_w.data.token.eq(s.token),
            resident_w.data.first.eq(first),
        ]
        # Read three cycles later and more: a register in front of memories that may be far away.
        m.d.sync += [
            done_w.en.eq(p.valid | (counted & last_of_token)),
            done_w.addr.eq(Mux(counting, token, s.token)),
            done_w.data.eq(Mux(counting, 0, s.done + 1)),
            total_w.addr.eq(token),
            total_w.data.eq(valid_of_token + id_valid),
            total_w.en.eq(counted & last_of_token),
        ]
        s = p.stage(
            raw=s.word.word_select(s.part[:lane_bits], 32) if lane_bits else s.word,
            address=s.address, token=s.token, first=first, last=s.done + 1 == s.total)
        s = p.stage(
            magnitude=Cat(s.raw[7:23], C(1, 1)), sign=s.raw[31], field=s.raw[23:31],
            round_up=s.raw[6] & (s.raw[:6].any() | s.raw[7]), fraction=s.raw[:23].any(),
            tiny=s.raw[23:31] == 0, nonfinite=s.raw[23:31].all(),
            address=s.address, token=s.token, first=s.first, last=s.last)
        rounded = s.magnitude + s.round_up
        subnormal = s.tiny & s.fraction
        s = p.stage(
            magnitude=rounded[:17], power=rounded[17] | subnormal, sign=s.sign, field=s.field,
            carry=rounded[17], subnormal=subnormal, zero=s.nonfinite | (s.tiny & ~s.fraction),
            nonfinite=s.nonfinite & job.routed,
            address=s.address, token=s.token, first=s.first, last=s.last)
        weight = Signal(layouts.internal_float())
        with m.If(~job.routed):
            m.d.comb += [weight.mantissa.eq(1 << 16), weight.exponent.eq(-16)]
        with m.Elif(~s.zero):
            carried = Mux(s.power, 1 << 16, s.magnitude)
            m.d.comb += [
                weight.mantissa.eq(Mux(s.sign, -carried, carried)),
                weight.exponent.eq(
                    Mux(s.subnormal, SUBNORMAL_EXPONENT, s.field - 143 + s.carry)),
            ]
        assert p.depth == FILL_CYCLES
        with m.If(p.valid & s.nonfinite):
            m.d.sync += self.o_nonfinite.eq(1)
            with m.If(~self.o_nonfinite | (s.token < self.o_nonfinite_token)):
                m.d.sync += self.o_nonfinite_token.eq(s.token)
        m.d.comb += [
            total_r.addr.eq(entry.token),
            done_r.addr.eq(entry.token),
            resident_r.addr.eq(slot),
            cursor_r.addr.eq(expert_id),
            count_r.addr.eq(Mux(counting, expert_id, walk)),
            self.slot_w_en.eq(p.valid),
            self.slot_w_address.eq(s.address),
            self.slot_w_data.token.eq(s.token),
            self.slot_w_data.weight.eq(weight),
            self.slot_w_data.first.eq(s.first),
            self.slot_w_data.last.eq(s.last),
            sorted_r.addr.eq(position + slot),
            sorted_w.data.token.eq(token),
            sorted_w.data.index.eq(index),
            sorted_w.addr.eq(cursor_r.data),
            sorted_w.en.eq(scattered & id_valid),
            # Until the counts are cleared and the prefixes complete, an entry may be written twice.
            count_w.addr.eq(Mux(clearing, walk, expert_id)),
            count_w.data.eq(Mux(clearing, 0, count_r.data + 1)),
            count_w.en.eq(clearing | (counted & id_valid)),
            table_count_w.addr.eq(count_w.addr),
            table_count_w.data.eq(count_w.data),
            table_count_w.en.eq(count_w.en),
            cursor_w.addr.eq(Mux(prefixing, walk, expert_id)),
            cursor_w.data.eq(Mux(prefixing, prefix, cursor_r.data + 1)),
            cursor_w.en.eq(prefixing | (scattered & id_valid)),
        ]
        filling = Signal(FILL_CYCLES)
        m.d.sync += filling.eq(Cat(filled, filling))
        sorted_token, resident_token = (Signal(layouts.token_bits(config)) for _ in range(2))
        equal = Signal()
        m.d.comb += equal.eq(sorted_token == resident_token)
        m.d.comb += self.o_zero.payload.eq(zero_token)

        with m.FSM():
            with m.State("IDLE"):
                with m.If(self.i_job.valid):
                    m.next = "PREPARE"
            with m.State("PREPARE"):
                m.d.sync += [
                    pairs.eq(job.tokens * job.top_k),
                    walk.eq(0),
                    fetching_weights.eq(0),
                    resident_count.eq(0),
                    remaining.eq(0),
                    clearing.eq(1),
                    counting.eq(1),
                    walk_ends.eq(0),
                ]
                m.d.comb += clear.eq(1)
                m.next = "CLEAR"
                with m.If(job.routed):
                    m.next = "PREPARE_REQUEST"
            with m.State("PREPARE_REQUEST"):
                m.next = "REQUEST_IDS"
            with m.State("REQUEST_IDS"):
                m.d.comb += fetching.eq(1)
                with m.If(self.reader.request.ready):
                    m.next = "CLEAR"
            with m.State("CLEAR"):  # while the ids are on their way
                m.d.sync += walk.eq(walk + 1)
                with m.If(walk_ends):
                    m.d.sync += clearing.eq(0)
                    m.next = "START"
                    with m.If(job.routed):
                        m.next = "WAIT_IDS"
            with m.State("WAIT_IDS"):
                with m.If(ids_arrived):
                    m.d.sync += fetching_weights.eq(1)
                    m.next = "REQUEST_WEIGHTS"
            with m.State("REQUEST_WEIGHTS"):
                m.d.comb += fetching.eq(1)
                with m.If(self.reader.request.ready):
                    m.next = "START"
            with m.State("START"):  # the walk that counts, and the one that scatters
                m.d.comb += rewind.eq(1)
                m.next = "FIRST"
            with m.State("FIRST"):
                with m.If(take_first):
                    m.next = "ID"
            with m.State("ID"):
                m.next = "READ"
            with m.State("READ"):
                m.d.sync += third.eq(1)
                m.next = "WRITE"
            with m.State("WRITE"):
                m.next = "ID"
                with m.If(no_expert):
                    m.next = "ZERO"
                with m.Elif(last_pair):
                    m.next = "EXPERT"
                    with m.If(counting):
                        m.d.comb += begins.eq(1)
                        m.next = "PREFIX_READ"
            with m.State("ZERO"):  # a token without any expert
                m.d.comb += self.o_zero.valid.eq(1)
                with m.If(self.o_zero.ready):
                    m.next = "ID"
                    with m.If(prefixing):
                        m.d.comb += begins.eq(1)
                        m.next = "PREFIX_READ"
            with m.State("PREFIX_READ"):
                m.next = "PREFIX_WRITE"
            with m.State("PREFIX_WRITE"):
                m.d.sync += [prefix.eq(prefix + count_r.data), walk.eq(walk + 1)]
                m.next = "PREFIX_READ"
                with m.If(walk_ends):
                    m.d.sync += prefixing.eq(0)
                    m.next = "START"
            with m.State("EXPERT"):
                with m.If(remaining == 0):
                    with m.If(weights_arrived):  # also if no pair needs them: not in the next job
                        m.d.sync += running.eq(0)
                        m.next = "IDLE"
                with m.Elif(table.o_expert.valid):
                    m.d.comb += table.o_expert.ready.eq(1)
                    m.d.sync += [expert.eq(table.o_expert.payload),
                                 left.eq(table.o_expert.p.pairs)]
                    m.next = "PASS"
                    with m.If(table.o_expert.p.bad):
                        m.next = "BAD"
            with m.State("BAD"):
                m.d.sync += self.o_bad.eq(1)
                with m.If((ahead == 0) & table.o_quiet):
                    m.d.sync += running.eq(0)
                    m.next = "IDLE"
            with m.State("PASS"):  # one pass runs, one is prepared; weights are asked for at once
                m.d.comb += self.o_weights.valid.eq(ahead < 2)
                m.d.sync += [slots.eq(Mux(left > capacity, capacity, left)), slot.eq(0)]
                with m.If(self.o_weights.valid & self.o_weights.ready):
                    m.next = "SECTION_0"
            for i, section in enumerate(expert.work.sections):
                with m.State(f"SECTION_{i}"):
                    m.d.comb += [
                        self.o_section.valid.eq(1), self.o_section.payload.eq(section.dims)]
                    m.d.sync += same.eq(slots == resident_count)
                    with m.If(self.o_section.ready):
                        m.next = "COMPARE_READ"
                        if i < SECTIONS_MAX - 1:
                            with m.If(~expert.work.single):
                                m.next = f"SECTION_{i + 1}"
            with m.State("COMPARE_READ"):
                with m.If(slot != 0):
                    m.d.sync += same.eq(same & equal)
                m.next = "COMPARE"
                with m.If(~same):
                    m.next = "FILL_START"
            with m.State("COMPARE"):
                m.d.sync += [
                    slot.eq(slot + 1),
                    sorted_token.eq(sorted_r.data.token),
                    resident_token.eq(resident_r.data.token),
                ]
                m.next = "COMPARE_READ"
                with m.If(last_slot):
                    m.next = "COMPARE_LAST"
            with m.State("COMPARE_LAST"):
                m.d.sync += same.eq(same & equal)
                m.next = "FILL_START"
            with m.State("FILL_START"):
                m.d.sync += slot.eq(0)
                with m.If(weights_arrived):  # asked for long before, but memory may be slow
                    with m.If(~same):
                        m.d.sync += x_bank.eq(~x_bank)
                    m.next = "FILL_SORTED"
            with m.State("FILL_SORTED"):
                m.next = "FILL_ENTRY"
            with m.State("FILL_ENTRY"):
                m.d.sync += entry.eq(sorted_r.data)
                m.next = "FILL_LOOKUP"
            with m.State("FILL_LOOKUP"):
                m.next = "FILL_WRITE"
            with m.State("FILL_WRITE"):
                m.d.comb += [filled.eq(1), self.o_assignments.eq(1)]
                m.d.sync += slot.eq(slot + 1)
                m.next = "FILL_SORTED"
                with m.If(last_slot):
                    m.next = "FILL_END"
            with m.State("FILL_END"):  # until the slot table is complete
                m.d.sync += resident_count.eq(slots)
                with m.If(~filling[:-1].any()):
                    m.next = "PASS_OUT"
                    with m.If(~same):
                        m.next = "LOAD"
            with m.State("LOAD"):
                m.d.comb += self.o_load.valid.eq(1)
                with m.If(self.o_load.ready):
                    m.next = "PASS_OUT"
            with m.State("PASS_OUT"):
                m.d.comb += self.o_pass.valid.eq(1)
                with m.If(self.o_pass.ready):
                    m.d.comb += passed.eq(1)
                    m.next = "PASSED"
            with m.State("PASSED"):
                m.next = "PASS"
                with m.If(expert_ends):
                    m.next = "EXPERT"

        return m


def weight_request(config: AcceleratorConfig) -> data.StructLayout:
    """Return a linear read of array words."""
    return data.StructLayout({"address": config.address_bits, "words": 32})


def load_request(config: AcceleratorConfig) -> data.StructLayout:
    """Return a request for the x of the first ``count`` slots of a slot table."""
    return data.StructLayout({"bank": 1, "slot_bank": 1, "count": range(config.max_slots + 1)})


def pass_descriptor(config: AcceleratorConfig) -> data.StructLayout:
    """Return a pass: one expert over ``count`` slots.

    ``same``: the tokens of the pass before, in the same slots. ``last``: the command's last pass.
    """
    return data.StructLayout(
        {
            "work": layouts.expert_work(config),
            "slot_bank": 1,
            "x_bank": 1,
            "count": range(config.max_slots + 1),
            "same": 1,
            "last": 1,
        }
    )
