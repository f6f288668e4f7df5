"""Hands each token's sum to memory, where need be by way of the workspace."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.activations.activation_loader import PACE
from moeaccel.hdl.combine.row_sums import SUM_BITS, RowSums, stripe, stripe_address
from moeaccel.hdl.combine.to_float32 import ToFloat32
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.sequential_multiplier import SequentialMultiplier

__all__ = ["Combiner", "drain_request"]


def drain_request(config: AcceleratorConfig) -> data.StructLayout:
    """Return a request to empty a bank of the y buffer: the slot table of the set's last pass, its
    slots."""
    return data.StructLayout({
        "slot_bank": layouts.slot_bank_bits(config), "y_bank": layouts.y_bank_bits(config),
        "count": range(config.max_slots + 1)})


class Combiner(wiring.Component):
    """Empty the y buffer, which every core has a part of (RowSums), and write rows of zeros.

    ::

        i_drain --> for each slot: workspace --> [+] --> y buffer --> float --> y
                                                                  \\-> workspace
        i_zero ---------------------------------------------> 0 --> float --> y

    Floats are float32, or bfloat16 where ``i_narrow`` says so.

    Draining goes slot by slot; partial sums of an earlier set are added first (unless ``first``),
    and the row goes to y (``last``) or back to the workspace. While a row leaves, the next one is
    looked up and its partial sums are added. What is read was written by an earlier drain, which
    has been acknowledged, or, where a token occupies several slots, by the slot before: then all
    writes are acknowledged first.

    With several banks, rows leave while the array works; while they can wait (``i_can_wait``), a
    row takes the time of PACE, so that weights come, too.

    A row of zeros takes nothing from the y buffer: the buffer stays the cores' until ``i_drain`` is
    accepted, however long memory needs for the row. Both requests wait until the one before is
    acknowledged. ``o_drained`` needs no answer: it comes cycles after ``i_drain``
    was accepted, and the next request only after it.

    Throughput: Q = quantiser_lanes elements, or one beat, per cycle, but for the cycles in which
    partial sums come, and one from row to row. Reset forgets everything under way.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Its ``quantiser_lanes`` keep up with the port.

    Members
    -------
    i_grid_exponent, i_steps_out, i_y_address, i_narrow, i_workspace_address
        Of the command.
    i_can_wait : :py:`In(1)`
        Nobody waits for the drain.
    slot_address, slot_data
        Slot table: {bank, slot} -> layouts.slot, one cycle later; its weights are not looked at.
    o_draining : :py:`Out(config.y_banks)`
        That bank of the y buffer is the Combiner's, by ``r_*`` and ``w_*``: from the cycle after
        ``i_drain`` is accepted to that of ``o_drained``.
    r_address, r_data : :py:`Out(stripe_address(config))`, :py:`In(stripe(config))`
        ``RowSums.READ_LATENCY_CYCLES`` later.
    w_en, w_address, w_data
        An enable for each sum.
    i_drain : :py:`In(stream.Signature(drain_request(config)))`
    o_drained : :py:`Out(1)`
        Pulse: every write of the drain is acknowledged.
    i_zero : :py:`In(stream.Signature(token))`
        Writes a row of zeros; goes before ``i_drain``.
    o_idle : :py:`Out(1)`
        No drain and no row of zeros is under way.
    reader, writer
        Ports to memory.
    """

    def __init__(self, config: AcceleratorConfig):
        self._config = config
        super().__init__({
            "i_grid_exponent": In(signed(8)),
            "i_steps_out": In(layouts.steps_bits(config)),
            "i_y_address": In(config.address_bits),
            "i_narrow": In(1),
            "i_workspace_address": In(config.address_bits),
            "i_can_wait": In(1),
            "slot_address": Out(layouts.slot_address_bits(config)),
            "slot_data": In(layouts.slot(config)),
            "i_drain": In(stream.Signature(drain_request(config))),
            "o_drained": Out(1),
            "i_zero": In(stream.Signature(layouts.token_bits(config))),
            "o_idle": Out(1),
            "o_draining": Out(config.y_banks),
            "r_address": Out(stripe_address(config)),
            "r_data": In(stripe(config)),
            "w_en": Out(stripe(config).length),
            "w_address": Out(stripe_address(config)),
            "w_data": Out(stripe(config)),
            "reader": Out(layouts.ReadClientSignature(config)),
            "writer": Out(layouts.WriteClientSignature(config)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        lanes = config.quantiser_lanes
        lanes_log2 = exact_log2(lanes)
        # A word is what leaves in a cycle; a stripe, one word of each core, has one or more.
        words_log2 = exact_log2(stripe(config).length // lanes)
        row_bits = ceil_log2(config.max_dim // lanes)
        port_log2 = exact_log2(config.port_bytes)
        draining = Signal()
        y_bank = Signal(layouts.y_bank_bits(config))
        m.d.comb += self.o_draining.eq(draining << y_bank)

        # One row after another: which it is, where it goes, its partial sums
        slot = Signal(range(config.max_slots + 1))
        count = Signal(range(config.max_slots + 1))
        slot_bank = Signal(layouts.slot_bank_bits(config))
        zeroing = Signal()
        token = Signal(layouts.token_bits(config))
        first, last = Signal(), Signal()
        repeated = Signal()  # the token is that of the slot before
        words_last = Signal(row_bits + 1)  # of a row, counted from 0
        last_row = Signal()
        m.submodules.offset = offset = SequentialMultiplier(
            layouts.token_bits(config), layouts.steps_bits(config))
        slot_index = slot[:layouts.slot_bits(config)]
        workspace_row = Signal(config.address_bits)

        def row_size(log2, whole, blocks=self.i_steps_out):
            """Return how much a row to be written takes; a block of bfloat16 is ``2 ** log2``."""
            narrow = blocks << log2
            return Mux(whole, narrow << 2, Mux(self.i_narrow, narrow, narrow << 1))

        m.d.comb += [
            offset.i_a.eq(token), offset.i_b.eq(self.i_steps_out),
            self.slot_address.eq(Cat(slot_index, slot_bank)),
            self.reader.request.p.address.eq(workspace_row),
            self.reader.request.p.beats.eq(self.i_steps_out << (8 - port_log2)),
        ]
        m.d.sync += [
            words_last.eq((self.i_steps_out << (5 - lanes_log2)) - 1),
            last_row.eq(zeroing | (slot + 1 == count)),
            workspace_row.eq(self.i_workspace_address + (offset.o_product << 8)),
        ]
        # The row that is written
        row = Signal(config.address_bits)
        leaving = Signal.like(slot_index)  # its slot
        whole_row = Signal()  # it is of integers
        asking, emitting = Signal(), Signal()
        row_ends = Signal()
        row_free = Signal()  # the next one may come, when all partial sums are there
        unacknowledged = Signal()
        emitted = Signal(row_bits + 1)
        arriving = Signal(row_bits + 3)  # beats of partial sums
        added = Signal()
        beats = self.writer.request.p.beats
        waits = Signal()  # until it is the next row's turn
        if config.y_banks > 1:
            pace = Signal(len(beats) + exact_log2(PACE))
            with m.If(asking & self.writer.request.ready):
                m.d.sync += pace.eq(beats << exact_log2(PACE))
            with m.Elif(pace != 0):
                m.d.sync += pace.eq(pace - 1)
            m.d.sync += waits.eq(self.i_can_wait & (pace != 0))
        m.d.comb += [
            self.writer.request.valid.eq(asking),
            self.writer.request.p.address.eq(row),
            beats.eq(row_size(6 - port_log2, whole_row)),
        ]
        m.d.sync += unacknowledged.eq(
            (asking & self.writer.request.ready) | (unacknowledged & ~self.writer.done))
        with m.If(asking & self.writer.request.ready):
            m.d.sync += [asking.eq(0), emitting.eq(1), emitted.eq(0)]
        with m.If(row_ends):
            m.d.sync += emitting.eq(0)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.o_idle.eq(~self.i_zero.valid & ~self.i_drain.valid),
                             self.i_zero.ready.eq(1), self.i_drain.ready.eq(~self.i_zero.valid)]
                m.d.sync += [slot.eq(0), zeroing.eq(self.i_zero.valid), arriving.eq(0)]
                with m.If(self.i_zero.valid):
                    m.d.sync += [token.eq(self.i_zero.payload), first.eq(1), last.eq(1)]
                    m.next = "OFFSET"
                with m.Elif(self.i_drain.valid):
                    m.d.sync += [count.eq(self.i_drain.p.count), y_bank.eq(self.i_drain.p.y_bank),
                                 slot_bank.eq(self.i_drain.p.slot_bank), draining.eq(1)]
                    m.next = "SLOT"
            with m.State("SLOT"):
                m.next = "SLOT_DATA"
            with m.State("SLOT_DATA"):
                m.d.sync += [token.eq(self.slot_data.token), first.eq(self.slot_data.first),
                             last.eq(self.slot_data.last),
                             repeated.eq((slot != 0) & (token == self.slot_data.token))]
                m.next = "OFFSET"
            with m.State("OFFSET"):
                m.d.comb += offset.i_start.eq(1)
                m.next = "ROW"
            with m.State("ROW"):
                with m.If(offset.o_done):
                    m.next = "READ"
                    with m.If(first):
                        m.next = "ROW_OUT"
            with m.State("READ"):
                m.d.comb += self.reader.request.valid.eq(
                    ~repeated | ~(asking | emitting | unacknowledged))
                with m.If(self.reader.request.valid & self.reader.request.ready):
                    m.next = "ADD"
            with m.State("ADD"):
                with m.If(added):
                    m.d.sync += arriving.eq(0)
                    m.next = "ROW_OUT"
            with m.State("ROW_OUT"):
                with m.If(row_free):
                    m.d.sync += [
                        row.eq(Mux(last, self.i_y_address, self.i_workspace_address)
                               + row_size(6, ~last, offset.o_product)),
                        leaving.eq(slot_index), whole_row.eq(~last), asking.eq(1),
                        slot.eq(slot + 1),
                    ]
                    m.next = "SLOT"
                    with m.If(last_row):
                        m.next = "END"
            with m.State("END"):
                with m.If(~(asking | emitting) & (self.writer.done | ~unacknowledged)):
                    m.d.comb += self.o_drained.eq(~zeroing)
                    m.d.sync += draining.eq(0)
                    m.next = "IDLE"

        # Partial sums of earlier sets are added as they arrive: a beat is a word, or part of one.
        per_beat = config.port_bytes // 8
        parts = lanes // per_beat
        parts_log2 = exact_log2(parts)

        def word_of(index):
            return (index >> parts_log2)[:row_bits]

        def word_at(index):
            """Return the sums of a word of the stripe that was read."""
            starts = range(0, len(self.r_data), lanes)
            if not words_log2:
                return list(self.r_data)
            return [Array(self.r_data[start + i] for start in starts)[index[:words_log2]]
                    for i in range(lanes)]

        beats = Pipeline(m, self.reader.valid, name="beat")
        b = beats.delay(RowSums.READ_LATENCY_CYCLES, data=self.reader.data, index=arriving,
                        last=self.reader.last)
        old_words = word_at(word_of(b.index))
        b = beats.stage(data=b.data, index=b.index, last=b.last, old=old_words)
        m.d.comb += added.eq(beats.valid & b.last)
        with m.If(self.reader.valid):
            m.d.sync += arriving.eq(arriving + 1)

        # The y buffer's ports: partial sums come in, or sums go out
        can_emit, emit = Signal(), Signal()
        part = b.index[:parts_log2] if parts_log2 else C(0)
        m.d.comb += [
            self.r_address.word.eq(
                Mux(self.reader.valid, word_of(arriving), emitted[:row_bits]) >> words_log2),
            self.r_address.slot.eq(Mux(self.reader.valid, slot_index, leaving)),
            self.w_address.word.eq(word_of(b.index) >> words_log2),
            self.w_address.slot.eq(slot_index),
        ]
        for i in range(len(self.w_data)):
            word, lane = divmod(i, lanes)
            m.d.comb += [
                self.w_en[i].eq(
                    beats.valid & (part == lane // per_beat)
                    & (word_of(b.index)[:words_log2] == word)),
                self.w_data[i].eq(
                    b.old[lane]
                    + b.data.word_select(lane % per_beat, 64)[:SUM_BITS].as_signed()),
            ]

        # The way out: a word of sums becomes float32 or int64, then beats. A row of the other kind
        # begins when all of the one before is in the FIFO.
        depth, under_way = 32, RowSums.READ_LATENCY_CYCLES + ToFloat32.LATENCY_CYCLES + 6
        m.submodules.out_beats = out_beats = fifo.SyncFIFOBuffered(
            width=8 * config.port_bytes, depth=depth)
        pauses = Signal(range(parts))  # a word of n beats leaves in n cycles
        room = Signal()
        on_way = Signal(under_way)  # words, so many cycles ago
        whole = Signal()  # those are of integers
        same_kind = Signal()
        float_beats = max(1, parts // 2)
        m.d.comb += [
            same_kind.eq((whole == whole_row) | ~on_way.any()),
            can_emit.eq(emitting & (pauses == 0) & room & same_kind),
            emit.eq(can_emit & ~self.reader.valid),
            row_ends.eq(emit & (emitted == words_last)),
            # Nothing comes from the reader by then: its port, far away, need not be looked at.
            row_free.eq(~asking & (~emitting | (can_emit & (emitted == words_last))) & ~waits),
        ]
        m.d.sync += [
            pauses.eq(Mux(
                emit, Mux(whole_row, parts - 1, Mux(self.i_narrow, 0, float_beats - 1)),
                Mux(pauses == 0, 0, pauses - 1))),
            room.eq(out_beats.level <= depth - under_way),
            on_way.eq(Cat(emit, on_way)),
        ]
        with m.If(emit):
            m.d.sync += [emitted.eq(emitted + 1), whole.eq(whole_row)]
        out = Pipeline(m, emit, name="out")
        o = out.delay(RowSums.READ_LATENCY_CYCLES, word=emitted[:max(1, words_log2)])
        sums = [Mux(zeroing, 0, value)[:SUM_BITS] for value in word_at(o.word)]
        converters = [ToFloat32() for _ in range(lanes)]
        for i, (convert, value) in enumerate(zip(converters, sums, strict=True)):
            m.submodules[f"to_float32_{i}"] = convert
            m.d.comb += [convert.i_valid.eq(out.valid & ~whole), convert.i_sum.eq(value),
                         convert.i_grid_exponent.eq(self.i_grid_exponent),
                         convert.i_narrow.eq(self.i_narrow)]
        floats = Cat(convert.o_float for convert in converters)
        floats_valid = converters[0].o_valid
        piece = Signal(2)  # which part of a beat the next floats are
        held = Signal(8 * config.port_bytes)  # those before, shifted in from above
        narrow = Cat(convert.o_float[16:] for convert in converters)
        joined = Mux(self.i_narrow, *(
            Cat(held, part)[-len(held):] if len(part) < len(held) else part[:len(held)]
            for part in (narrow, floats)))
        whole_beat = piece == Mux(self.i_narrow, *(
            max(1, len(held) // len(part)) - 1 for part in (narrow, floats)))
        # Whole sums need no conversion.
        integer_words = Pipeline(m, out.valid & whole, name="whole")
        w = integer_words.stage(sums=sums)
        integers = Cat(Cat(x, x[-1].replicate(64 - SUM_BITS)) for x in w.sums)
        rest = Signal(len(held) * (parts - 1))  # further beats of a word
        rest_beats = Signal(range(parts))
        m.d.sync += [
            rest.eq(rest >> len(held)),
            rest_beats.eq(Mux(rest_beats == 0, 0, rest_beats - 1)),
            Assert(~out_beats.w_en | out_beats.w_rdy, "a beat must have a place"),
            Assert((rest_beats == 0) | ~(integer_words.valid | floats_valid),
                   "a word must not meet the one before"),
        ]
        m.d.comb += [self.writer.data.payload.eq(out_beats.r_data),
                     self.writer.data.valid.eq(out_beats.r_rdy),
                     out_beats.r_en.eq(self.writer.data.ready)]
        with m.If(integer_words.valid):
            m.d.comb += [out_beats.w_data.eq(integers), out_beats.w_en.eq(1)]
            m.d.sync += [rest.eq(integers >> 8 * config.port_bytes), rest_beats.eq(parts - 1)]
        with m.Elif(floats_valid):
            m.d.sync += [held.eq(joined), piece.eq(Mux(whole_beat, 0, piece + 1)),
                         rest.eq(floats >> len(held)),
                         rest_beats.eq(Mux(self.i_narrow, 0, float_beats - 1))]
            m.d.comb += [out_beats.w_data.eq(joined), out_beats.w_en.eq(whole_beat)]
        with m.Else():
            m.d.comb += [out_beats.w_data.eq(rest), out_beats.w_en.eq(rest_beats != 0)]
        return m
