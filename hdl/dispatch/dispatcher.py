"""Pairs of tokens and experts, sorted by expert and handed out as passes."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.dispatch.expert_table import ExpertTable
from moeaccel.hdl.dispatch.pair_sort import PairSort
from moeaccel.hdl.dispatch.slot_filler import SlotFiller
from moeaccel.interface.commands import ENTRY_BYTES, SECTIONS_MAX


class _Wires:
    """What the parts of a dispatcher tell each other."""

    def __init__(self, config):
        self.sort = PairSort(config)
        self.table = ExpertTable(config)
        self.filler = SlotFiller(config)

        # The job.
        self.job = Signal(layouts.job(config))
        self.accepted = Signal()
        self.held = Signal()  # its ids and weights are there
        self.running = Signal()
        self.pairs = Signal(config.max_assignments.bit_length())
        self.drop_entries = Signal()

        # What is fetched.
        self.fetching = Signal()
        self.fetching_weights = Signal()
        self.ids_arrived = Signal()
        self.weights_arrived = Signal()

        # Passes.
        self.expert = Signal(layouts.expert(config), reset_less=True)
        self.place = Signal(layouts.expert_bits(config))  # of the next expert among all
        self.left = Signal.like(self.pairs)  # pairs of this expert not yet in a pass
        self.remaining = Signal.like(self.pairs)  # pairs of the command not yet in a pass
        self.slots = Signal(range(config.max_slots + 1))
        self.expert_ends = Signal()
        self.ahead = Signal(range(config.slot_banks + 1))  # passes handed out and not retired
        self.passed = Signal()
        self.x_bank = Signal()
        self.x_bank_free = Signal()
        self.told = Signal()  # the pass's weights and sections are somebody else's now
        self.teller_free = Signal()
        self.no_more = Signal()  # no pass of the command comes any more


class Dispatcher(wiring.Component):
    """Sort the assignments of a command by expert and hand them out as passes.

    ::

        i_job --> fetch --- ids -----> [PairSort] --- experts ---> [ExpertTable]
                    |                      |                             |
                    |                 pairs, counts                   entries
                    |                      v                             v
                    +----- weights --> [SlotFiller] <--- passes: weights, sections, slots, x, pass

    The token-expert pairs, at most ``max_assignments``, are sorted by
    :class:`~moeaccel.hdl.dispatch.pair_sort.PairSort` by expert, in its order: those of one token
    are known while its ids are walked over, so that their entries are on their way meanwhile. Ids
    that are negative or not below ``num_experts`` are skipped; a token without any pair is
    announced on ``o_zero`` before the first pass. What is to be computed for an expert comes from
    the :class:`~moeaccel.hdl.dispatch.expert_table.ExpertTable`; at a bad entry the command ends
    when the passes handed out before have retired. A pass takes at most as many pairs as there are
    slots (``max_slots``, half of it in ``a16``); a
    :class:`~moeaccel.hdl.dispatch.slot_filler.SlotFiller` writes its slot table. Consecutive passes
    over the very same tokens keep x and y on the chip (``same``). A pass is begun when fewer than
    ``slot_banks`` are handed out and not retired, so that nobody reads the bank of the slot table
    that it fills; its x is asked for when nobody needs that of the set of tokens before the last.

    With several banks, sections are announced while slot tables are filled and x is loaded. With
    two banks of h, passes overlap: the last section of an expert with two is announced, as the
    Sequencer runs it, behind the first one of the pass after, ahead of a pass with a single one, or
    when no pass comes any more.

    Sorting begins when all ids have come, the first slot table when all weights have, and a
    command is done when both have. All else that goes out is a stream.

    A job that is a ``prefetch`` has no weights and no passes: after ids and entries only
    ``o_weights`` comes of it, for each expert in its turn, and is done when that is taken. A token
    without an expert is announced as ever.

    Cycles: those of PairSort, then about 6 for each slot of a pass. From the last beat of a token's
    ids to the request for the first one's entry 13 if the port takes requests at once, 3 more for
    each expert behind it. A job that is not ``routed`` needs no ids: every token goes to experts 0
    to ``top_k`` - 1 with weight 1.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_job : :py:`In(stream.Signature(layouts.job(config)))`
        Accepted when idle; the job's fields are held on ``o_job`` until the next one.
    i_pairs : :py:`In(layouts.pair_beat(config))`
        With a router: ids and weights of the next job that ``continues``, which fetches none.
        Between jobs.
    reader : :py:`Out(layouts.ReadClientSignature(config))`
        Fetches ids, then weights, then entries of the expert table.
    o_weights : :py:`Out(stream.Signature(layouts.weight_request(config)))`
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
    i_x_free : :py:`In(range(3))`
        So many passes need their x no more, in their order; each counts once.
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
                **({"i_pairs": In(layouts.pair_beat(config))} if config.router else {}),
                "o_job": Out(layouts.job(config)),
                "reader": Out(layouts.ReadClientSignature(config)),
                "o_weights": Out(stream.Signature(layouts.weight_request(config))),
                "o_section": Out(stream.Signature(layouts.section(config))),
                "o_load": Out(stream.Signature(load_request(config))),
                "o_pass": Out(stream.Signature(pass_descriptor(config))),
                "o_zero": Out(stream.Signature(layouts.token_bits(config))),
                "i_retired": In(1),
                "i_x_free": In(range(3)),
                "slot_w_en": Out(1),
                "slot_w_address": Out(layouts.slot_address_bits(config)),
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
        wires = _Wires(self._config)
        m.submodules.sort = wires.sort
        m.submodules.table = ResetInserter(wires.drop_entries)(wires.table)
        m.submodules.filler = wires.filler
        self._job(m, wires)
        self._fetch(m, wires)
        self._experts(m, wires)
        self._passes(m, wires)
        self._sequence(m, wires)
        if self._config.slot_banks > 2:
            self._announce(m, wires)
        return m

    def _job(self, m, w):
        """Hold the job while it runs."""
        m.d.comb += [
            self.o_job.eq(w.job),
            self.i_job.ready.eq(~w.running),
            self.o_done.eq(~w.running),
            w.accepted.eq(self.i_job.valid & self.i_job.ready),
            w.sort.i_job.eq(w.job),
            w.sort.i_pairs.eq(w.pairs),
            w.table.i_job.eq(w.job),
            w.filler.i_routed.eq(w.job.routed),
            w.filler.i_clear.eq(w.accepted),
        ]
        with m.If(w.accepted):
            m.d.sync += [w.job.eq(self.i_job.payload), w.running.eq(1), self.o_bad.eq(0),
                         w.no_more.eq(0)]

    def _fetch(self, m, w):
        """Fetch ids, then weights, then entries."""
        reader, table = self.reader, w.table.reader
        per_beat = self._config.port_bytes // 4
        beat = Signal.like(w.sort.ids_w_address)
        list_beats = Signal.like(reader.request.p.beats)
        brings = Signal()  # ids or weights
        m.d.sync += list_beats.eq((w.pairs + (per_beat - 1)) >> exact_log2(per_beat))
        m.d.comb += [
            brings.eq(reader.valid & ~w.weights_arrived),
            reader.request.valid.eq(w.fetching | table.request.valid),
            table.request.ready.eq(reader.request.ready & ~w.fetching),
            reader.request.p.address.eq(Mux(
                w.fetching, Mux(w.fetching_weights, w.job.weights_address, w.job.ids_address),
                table.request.p.address)),
            reader.request.p.beats.eq(Mux(w.fetching, list_beats, table.request.p.beats)),
            table.valid.eq(reader.valid & w.weights_arrived),
            table.data.eq(reader.data),
            table.last.eq(reader.last),
            w.sort.ids_w_en.eq(brings & ~w.fetching_weights),
            w.sort.ids_w_address.eq(beat),
            w.sort.ids_w_data.eq(reader.data),
            w.filler.weights_w_en.eq(brings & w.fetching_weights),
            w.filler.weights_w_address.eq(beat),
            w.filler.weights_w_data.eq(reader.data),
            w.filler.i_weights.eq(w.weights_arrived),
        ]
        with m.If(w.accepted):
            m.d.sync += [w.ids_arrived.eq(0), w.weights_arrived.eq(~self.i_job.p.routed)]
        if self._config.router:
            self._take_pairs(m, w)
        with m.If(brings):
            m.d.sync += beat.eq(Mux(reader.last, 0, beat + 1))
            with m.If(reader.last & w.fetching_weights):
                m.d.sync += w.weights_arrived.eq(1)
            with m.If(reader.last & ~w.fetching_weights):
                m.d.sync += w.ids_arrived.eq(1)
                if self._config.buffer_slots:
                    with m.If(w.job.prefetch):  # entries are all that comes now
                        m.d.sync += w.weights_arrived.eq(1)

    def _take_pairs(self, m, w):
        """Keep ids and weights that come from the router."""
        pairs, sort, filler = self.i_pairs, w.sort, w.filler
        at = [Signal.like(sort.ids_w_address, name=f"{name}_at") for name in ("ids", "weights")]
        m.d.comb += w.held.eq(w.job.continues & w.job.routed)
        with m.If(w.accepted):
            m.d.sync += [*(place.eq(0) for place in at), w.weights_arrived.eq(
                ~self.i_job.p.routed | self.i_job.p.continues)]
        with m.If(pairs.valid):
            m.d.comb += [
                sort.ids_w_en.eq(~pairs.of_weights), sort.ids_w_address.eq(at[0]),
                sort.ids_w_data.eq(pairs.data), filler.weights_w_en.eq(pairs.of_weights),
                filler.weights_w_address.eq(at[1]), filler.weights_w_data.eq(pairs.data),
            ]
            m.d.sync += [at[0].eq(at[0] + ~pairs.of_weights), at[1].eq(at[1] + pairs.of_weights)]

    def _experts(self, m, w):
        """The sort tells the others what it has counted and sorted, and who has no expert."""
        sort, table, filler = w.sort, w.table, w.filler
        wiring.connect(m, sort=sort.o_zero, outside=wiring.flipped(self.o_zero))
        m.d.sync += w.drop_entries.eq(sort.i_start)  # when those of the last job do not count more
        m.d.comb += [
            table.i_experts.eq(sort.o_experts),
            sort.expert_address.eq(table.expert_address),
            table.expert_data.eq(sort.expert_data),
            sort.count_address.eq(w.place),
            filler.total_w_en.eq(sort.total_w_en),
            filler.total_w_address.eq(sort.total_w_address),
            filler.total_w_data.eq(sort.total_w_data),
            sort.pair_address.eq(filler.pair_address),
            filler.pair_data.eq(sort.pair_data),
            self.o_bad_expert.eq(w.expert.expert),
            self.o_bad_word.eq(w.expert.word),
        ]

    def _passes(self, m, w):
        """Count the pairs that are left, and the passes that are ahead; drive what goes out."""
        config, expert, filler = self._config, w.expert, w.filler
        slot_bank = Signal(layouts.slot_bank_bits(config))
        last_pass = Signal()
        handed = Signal()  # a pass, in the cycle before
        m.d.comb += [
            filler.i_count.eq(w.slots),
            filler.i_bank.eq(slot_bank),
            self.slot_w_en.eq(filler.slot_w_en),
            self.slot_w_address.eq(filler.slot_w_address),
            self.slot_w_data.eq(filler.slot_w_data),
            self.o_assignments.eq(filler.o_assignments),
            self.o_nonfinite.eq(filler.o_nonfinite),
            self.o_nonfinite_token.eq(filler.o_nonfinite_token),
            self.o_load.p.bank.eq(w.x_bank),
            self.o_load.p.slot_bank.eq(slot_bank),
            self.o_load.p.count.eq(w.slots),
            self.o_pass.p.slot_bank.eq(slot_bank),
            self.o_pass.p.x_bank.eq(w.x_bank),
            self.o_pass.p.count.eq(w.slots),
            self.o_pass.p.same.eq(filler.o_same),
            self.o_pass.p.last.eq(last_pass),
            self.o_pass.p.work.eq(expert.work),
        ]
        m.d.sync += [
            w.ahead.eq(w.ahead + w.passed - self.i_retired),
            Assert(~self.i_retired | (w.ahead != 0), "a pass must be handed out before it retires"),
            Assert(~w.passed | (w.ahead != config.slot_banks),
                   "as many passes are handed out as there are slot tables"),
            handed.eq(w.passed),
            # Known long before they are used.
            last_pass.eq(w.remaining == w.slots),
            w.expert_ends.eq(w.left == w.slots),
        ]
        with m.If(handed):
            m.d.sync += [
                w.left.eq(w.left - w.slots),
                w.remaining.eq(w.remaining - w.slots),
                slot_bank.eq(slot_bank + 1),
            ]
        if config.slot_banks == 2:
            m.d.comb += [
                w.x_bank_free.eq(1),  # all but one have retired when a pass is begun
                self.o_weights.p.address.eq(expert.image_address),
                self.o_weights.p.words.eq(expert.words),
            ]
            if config.buffer_slots:
                m.d.comb += self.o_weights.p.fill.eq(w.job.prefetch)
        else:
            # Those that still need their x are the last to be handed out. When the next set of
            # tokens comes, all of them must be of the last one: the other bank is free then.
            needing = Signal.like(w.ahead)
            of_set = Signal.like(w.ahead)  # passes of the last set, as many as may count
            m.d.sync += [
                needing.eq(needing + w.passed - self.i_x_free),
                w.x_bank_free.eq(needing <= of_set),
            ]
            with m.If(w.passed):
                m.d.sync += of_set.eq(Mux(
                    ~filler.o_same, 1, Mux(of_set == config.slot_banks, of_set, of_set + 1)))

    def _sequence(self, m, w):
        """Sort, then pass by pass: weights, sections, slot table, x, the pass itself."""
        config, job = self._config, w.job
        sort, expert, filler = w.sort, w.table.o_expert, w.filler
        capacity = Mux(job.two_planes, config.max_slots // 2, config.max_slots)
        buffered = config.buffer_slots > 0
        # Additions: synthesis makes a multiplier's block of a product, without its registers.
        pairs = sum(Mux(bit, job.tokens << i, 0) for i, bit in enumerate(job.top_k))
        with m.FSM():
            with m.State("IDLE"):
                with m.If(self.i_job.valid):
                    m.next = "PREPARE"
            with m.State("PREPARE"):
                m.d.sync += [w.pairs.eq(pairs), w.fetching_weights.eq(0), w.place.eq(0)]
                m.next = "PREPARE_REQUEST"
                with m.If(~job.routed | w.held):
                    m.d.comb += sort.i_start.eq(1)
                    m.next = "SORT"
            with m.State("PREPARE_REQUEST"):
                m.next = "REQUEST_IDS"
            with m.State("REQUEST_IDS"):
                m.d.comb += w.fetching.eq(1)
                with m.If(self.reader.request.ready):
                    m.next = "WAIT_IDS"
            with m.State("WAIT_IDS"):
                with m.If(w.ids_arrived):
                    m.d.sync += w.fetching_weights.eq(1)
                    m.next = "REQUEST_WEIGHTS"
                    if buffered:
                        with m.If(job.prefetch):
                            m.d.sync += w.fetching_weights.eq(0)
                            m.d.comb += sort.i_start.eq(1)
                            m.next = "SORT"
            with m.State("REQUEST_WEIGHTS"):
                m.d.comb += w.fetching.eq(1)
                with m.If(self.reader.request.ready):
                    m.d.comb += sort.i_start.eq(1)
                    m.next = "SORT"
            with m.State("SORT"):
                m.d.sync += w.remaining.eq(sort.o_pairs)
                with m.If(sort.o_done):
                    m.next = "EXPERT"
            with m.State("EXPERT"):
                with m.If(w.remaining == 0):
                    m.d.sync += w.no_more.eq(1)
                    with m.If(w.weights_arrived):  # also if no pair needs them: not in the next job
                        m.d.sync += w.running.eq(0)
                        m.next = "IDLE"
                with m.Elif(expert.valid):
                    # A bad one is not taken, so that the table asks for no more than it has.
                    m.d.comb += expert.ready.eq(~expert.p.bad)
                    m.d.sync += [w.expert.eq(expert.payload), w.left.eq(sort.count_data),
                                 w.place.eq(w.place + 1)]
                    m.next = "PASS"
                    with m.If(expert.p.bad):
                        m.next = "BAD"
            with m.State("BAD"):
                m.d.sync += [self.o_bad.eq(1), w.no_more.eq(1)]
                with m.If((w.ahead == 0) & w.table.o_quiet):
                    m.d.sync += w.running.eq(0)
                    m.next = "IDLE"
            with m.State("PASS"):  # weights are asked for at once
                m.d.sync += w.slots.eq(Mux(w.left > capacity, capacity, w.left))
                if config.slot_banks > 2:
                    m.d.comb += w.told.eq(w.teller_free & (w.ahead < config.slot_banks))
                    with m.If(w.told):
                        m.next = "TOLD"
                        if buffered:
                            with m.If(job.prefetch):
                                m.next = "BROUGHT"
                else:
                    m.d.comb += self.o_weights.valid.eq(w.ahead < config.slot_banks)
                    with m.If(self.o_weights.valid & self.o_weights.ready):
                        m.next = "SECTION_0"
                        if buffered:
                            with m.If(job.prefetch):
                                m.next = "BROUGHT"
            if buffered:
                with m.State("BROUGHT"):  # or under way: no pass of it
                    m.d.sync += w.remaining.eq(w.remaining - w.left)
                    m.next = "EXPERT"
            if config.slot_banks > 2:
                with m.State("TOLD"):
                    m.d.comb += filler.i_start.eq(1)
                    m.next = "FILL"
            else:
                for i, section in enumerate(w.expert.work.sections):
                    with m.State(f"SECTION_{i}"):
                        m.d.comb += [
                            self.o_section.valid.eq(1), self.o_section.payload.eq(section.dims)]
                        last = 1 if i == SECTIONS_MAX - 1 else w.expert.work.single
                        with m.If(self.o_section.ready):
                            m.d.comb += filler.i_start.eq(last)
                            m.next = "FILL"
                            if i < SECTIONS_MAX - 1:
                                with m.If(~last):
                                    m.next = f"SECTION_{i + 1}"
            with m.State("FILL"):
                with m.If(filler.o_done):
                    m.next = "PASS_OUT"
                    with m.If(~filler.o_same):
                        m.d.sync += w.x_bank.eq(~w.x_bank)
                        m.next = "LOAD"
            with m.State("LOAD"):
                m.d.comb += self.o_load.valid.eq(w.x_bank_free)
                with m.If(self.o_load.valid & self.o_load.ready):
                    m.next = "PASS_OUT"
            with m.State("PASS_OUT"):
                m.d.comb += self.o_pass.valid.eq(1)
                with m.If(self.o_pass.ready):
                    m.d.comb += w.passed.eq(1)
                    m.next = "PASSED"
            with m.State("PASSED"):
                m.next = "PASS"
                with m.If(w.expert_ends):
                    m.next = "EXPERT"

    def _announce(self, m, w):
        """Ask for the weights of each pass and announce its sections, while it is prepared.

        With two banks of h a section may be owed, until it is its turn.
        """
        overlaps = self._config.hidden_banks > 1
        expert = Signal(layouts.expert(self._config), reset_less=True)
        work = expert.work
        owed = Signal()  # the section behind ``rest``
        rest = Signal(layouts.weight_request(self._config), reset_less=True)
        rest_dims = Signal(layouts.section(self._config), reset_less=True)
        second = Signal()  # what is announced is owed
        pending = Signal()  # there is a pass behind the one that owes it: that of ``expert``
        m.d.comb += [
            self.o_weights.p.address.eq(expert.image_address),
            self.o_weights.p.words.eq(expert.words),
            self.o_section.payload.eq(work.sections[0].dims),
        ]
        buffered = self._config.buffer_slots > 0
        if buffered:
            m.d.comb += self.o_weights.p.fill.eq(w.job.prefetch)
        if overlaps:
            whole = work.single | w.job.prefetch if buffered else work.single
            m.d.comb += self.o_weights.p.words.eq(Mux(whole, expert.words, expert.first_words))
            with m.If(second):
                m.d.comb += [self.o_weights.payload.eq(rest), self.o_section.payload.eq(rest_dims)]

        def owe():
            """The second section of this expert comes when it is its turn."""
            word_log2 = exact_log2(self._config.word_bytes)
            return [
                owed.eq(1), rest_dims.eq(work.sections[1].dims),
                rest.address.eq(expert.image_address + (expert.first_words << word_log2)),
                rest.words.eq(expert.words - expert.first_words),
                *([rest.before.eq(expert.first_words)] if buffered else [])]

        with m.FSM(name="announce"):
            with m.State("IDLE"):
                m.d.comb += w.teller_free.eq(~w.no_more)
                m.d.sync += [expert.eq(w.expert), second.eq(0), pending.eq(w.told)]
                with m.If(w.told):
                    m.next = "WEIGHTS"
                    with m.If(w.expert.work.single & owed):
                        m.d.sync += second.eq(1)
                with m.Elif(w.no_more & owed):
                    m.d.sync += second.eq(1)
                    m.next = "WEIGHTS"
            with m.State("WEIGHTS"):
                m.d.comb += self.o_weights.valid.eq(1)
                with m.If(self.o_weights.ready):
                    m.next = "SECTION"
                    if buffered:
                        with m.If(w.job.prefetch):
                            m.next = "IDLE"
            with m.State("SECTION"):
                m.d.comb += self.o_section.valid.eq(1)
                with m.If(self.o_section.ready):
                    m.next = "IDLE"
                    if overlaps:
                        m.d.sync += second.eq(0)
                        with m.If(second):
                            m.d.sync += owed.eq(0)
                            with m.If(pending & work.single):  # its only one comes behind this
                                m.next = "WEIGHTS"
                            with m.Elif(pending):  # its first one went ahead
                                m.d.sync += owe()
                        with m.Elif(~work.single):
                            with m.If(owed):
                                m.d.sync += second.eq(1)
                                m.next = "WEIGHTS"
                            with m.Else():
                                m.d.sync += owe()
                    else:
                        with m.If(~work.single):
                            m.next = "SECOND"
            if not overlaps:
                with m.State("SECOND"):
                    m.d.comb += [self.o_section.valid.eq(1),
                                 self.o_section.payload.eq(work.sections[1].dims)]
                    with m.If(self.o_section.ready):
                        m.next = "IDLE"


def load_request(config: AcceleratorConfig) -> data.StructLayout:
    """Return a request for the x of the first ``count`` slots of a slot table."""
    return data.StructLayout({
        "bank": 1, "slot_bank": layouts.slot_bank_bits(config),
        "count": range(config.max_slots + 1)})


def pass_descriptor(config: AcceleratorConfig) -> data.StructLayout:
    """Return a pass: one expert over ``count`` slots.

    ``same``: the tokens of the pass before, in the same slots. ``last``: the command's last pass.
    """
    return data.StructLayout(
        {
            "work": layouts.expert_work(config),
            "slot_bank": layouts.slot_bank_bits(config),
            "x_bank": 1,
            "count": range(config.max_slots + 1),
            "same": 1,
            "last": 1,
        }
    )
