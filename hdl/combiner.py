"""Weights an expert's outputs, sums them exactly, and hands each token's sum to memory."""

from amaranth import *
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.multiplier import Multiplier
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.sequential_multiplier import SequentialMultiplier

__all__ = ["Combiner", "drain_request"]

SUM_BITS = 48
TERM_LIMIT = 43
"""Magnitude bits of a weighted output on the grid (arithmetic.TERM_BITS)."""
LEFT = 10
"""Largest left shift of a product that still fits: its 33 bits become 43."""


def drain_request(config: AcceleratorConfig) -> data.StructLayout:
    """Return a request to empty the y buffer: the slot table of the set's last pass, its slots."""
    return data.StructLayout({"slot_bank": 1, "count": range(config.max_slots + 1)})


class _ToFloat32(wiring.Component):
    """Convert a 48-bit sum on the grid to float32: bit for bit ``arithmetic.grid_to_float32``.

    Latency LATENCY_CYCLES, one per cycle, no flow control.
    """

    LATENCY_CYCLES = 6

    def __init__(self):
        super().__init__({"i_sum": In(signed(SUM_BITS)), "i_grid_exponent": In(signed(8)),
                          "o_float": Out(32)})

    def elaborate(self, platform):
        m = Module()
        pipe = Pipeline(m, C(1))
        s = pipe.stage(sign=self.i_sum[-1],
                       magnitude=Mux(self.i_sum[-1], -self.i_sum, self.i_sum)[:SUM_BITS])
        lost = None  # leading zeros shifted out so far
        for shifts in ((32, 16), (8, 4), (2, 1)):
            value, taken = s.magnitude, []
            for shift in shifts:
                empty = value[SUM_BITS - shift:] == 0
                taken.append(empty)
                value = Mux(empty, value << shift, value)[:SUM_BITS]
            lost = Cat(*reversed(taken), *([] if lost is None else [s.lost]))
            s = pipe.stage(sign=s.sign, magnitude=value, lost=lost)
        value = s.magnitude  # bit 47 is set, unless it is zero
        keep, half, sticky = value[24:], value[23], value[:23].any()
        s = pipe.stage(
            sign=s.sign, zero=~value[-1], rounded=(keep + (half & (sticky | keep[0])))[:25],
            exponent=(self.i_grid_exponent + (127 + SUM_BITS - 1) - s.lost)[:9])
        carry = s.rounded[24]
        s = pipe.stage(value=Mux(s.zero, 0, Cat(
            Mux(carry, 0, s.rounded[:23]), (s.exponent + carry)[:8], s.sign)))
        assert pipe.depth == self.LATENCY_CYCLES
        m.d.comb += self.o_float.eq(s.value)
        return m


class Combiner(wiring.Component):
    """Sum weighted outputs on a fixed-point grid: order cannot matter (DESIGN section 3).

    ::

        i_element --> (x) weight of its slot --> round to the grid --> [+] --> y buffer, 48 bits
        i_drain --> for each slot: workspace --> [+] --> y buffer --> float32 --> y
                                                                  \\-> workspace

    term = round(value * weight / 2**grid_exponent), zero and counted if it needs more than 43 bits.
    The first pass of a set of tokens (``i_fresh``) stores, later ones add. Draining goes slot by
    slot; partial sums of an earlier set are added first (unless ``first``), and the row goes to y
    (``last``) or back to the workspace. One slot's writes are acknowledged before the next slot's
    reads, so that a token may occupy two slots.

    Throughput: one element per cycle; draining Q = quantiser_lanes elements, or one beat, per
    cycle. Elements must not come while draining. Reset forgets everything under way.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        ``quantiser_lanes`` must be ``port_bytes / 8`` or ``port_bytes / 4``: a word of the y buffer
        keeps up with the port.
    family : :class:`str`
        FPGA family of the multiplier.

    Members
    -------
    i_grid_exponent, i_steps_out, i_y_address, i_workspace_address
        Of the command.
    i_valid, i_element : an output; ``i_slot_bank``, ``i_fresh``: of its pass; ``i_last``: its
        pass's last one
    o_pass_done : :py:`Out(1)`
        Pulse: the element marked ``i_last`` is in the y buffer.
    slot_address, slot_data
        Slot table: {bank, slot} -> layouts.slot, one cycle later.
    i_drain : :py:`In(stream.Signature(drain_request(config)))`
    o_drained : :py:`Out(1)`
        Pulse: every write of the drain is acknowledged.
    i_zero : :py:`In(stream.Signature(token))`
        Writes a row of zeros.
    o_idle : :py:`Out(1)`
        No drain and no row of zeros is under way.
    o_overflow : :py:`Out(1)`
        Pulse for each output beyond the grid.
    reader, writer
        Ports to memory.
    """

    def __init__(self, config: AcceleratorConfig, family="generic"):
        if config.quantiser_lanes * 8 not in (config.port_bytes, 2 * config.port_bytes):
            raise ValueError(
                f"Quantiser lanes must be {config.port_bytes // 8} or {config.port_bytes // 4} "
                f"behind a port of {config.port_bytes} bytes, not {config.quantiser_lanes!r}")
        self._config = config
        self._family = family
        super().__init__({
            "i_grid_exponent": In(signed(8)),
            "i_steps_out": In(layouts.steps_bits(config)),
            "i_y_address": In(config.address_bits),
            "i_workspace_address": In(config.address_bits),
            "i_valid": In(1),
            "i_element": In(layouts.element(config)),
            "i_slot_bank": In(1),
            "i_fresh": In(1),
            "i_last": In(1),
            "o_pass_done": Out(1),
            "slot_address": Out(1 + layouts.slot_bits(config)),
            "slot_data": In(layouts.slot(config)),
            "i_drain": In(stream.Signature(drain_request(config))),
            "o_drained": Out(1),
            "i_zero": In(stream.Signature(layouts.token_bits(config))),
            "o_idle": Out(1),
            "o_overflow": Out(1),
            "reader": Out(layouts.ReadClientSignature(config)),
            "writer": Out(layouts.WriteClientSignature(config)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        lanes = config.quantiser_lanes
        lanes_log2 = exact_log2(lanes)
        row_bits = ceil_log2(config.max_dim // lanes)
        port_log2 = exact_log2(config.port_bytes)
        words = Memory(shape=data.ArrayLayout(signed(SUM_BITS), lanes),
                       depth=config.max_slots << row_bits, init=[])
        m.submodules.words = words
        write = words.write_port(granularity=1)
        read = words.read_port()
        draining = Signal()

        # Elements: weight, round, add
        element = self.i_element
        pipe = Pipeline(m, self.i_valid & ~draining)
        along = {"slot": element.slot, "row": element.row, "fresh": self.i_fresh,
                 "last": self.i_last}

        def carried(s, **more):
            return {name: getattr(s, name) for name in along} | more

        s = pipe.stage(**along, mantissa=element.value.mantissa, exponent=element.value.exponent)
        m.submodules.multiplier = multiplier = Multiplier(18, 18, self._family)
        weight = self.slot_data.weight
        m.d.comb += [multiplier.i_a.eq(s.mantissa), multiplier.i_b.eq(weight.mantissa)]
        s = pipe.delay(Multiplier.LATENCY_CYCLES, **carried(
            s, zero=(s.mantissa == 0) | (weight.mantissa == 0),
            shift=s.exponent + weight.exponent))
        product = multiplier.o_product
        s = pipe.stage(**carried(
            s, zero=s.zero, product=product, large=product[33] ^ product[35],
            shift=s.shift - self.i_grid_exponent))
        # (product << 10) >> amount, with a rounding and a sticky bit below
        amount = LEFT - s.shift
        s = pipe.stage(**carried(
            s, overflow=~s.zero & (s.shift > LEFT - s.large), product=s.product,
            amount=Mux(amount < 0, 0, Mux(amount > 63, 63, amount))[:6]))
        wide = Cat(C(0, LEFT + 2), s.product).as_signed()
        coarse = Cat(C(0, 3), s.amount[3:])
        below = (1 << coarse) - 1
        s = pipe.stage(**carried(s, overflow=s.overflow, amount=s.amount[:3],
                                 value=wide >> coarse, sticky=(wide & below[:len(wide)]).any()))
        below = (1 << s.amount) - 1
        s = pipe.stage(**carried(s, overflow=s.overflow, value=s.value >> s.amount,
                                 sticky=s.sticky | (s.value & below).any()))
        value = s.value
        up = value[1] & (value[0] | s.sticky | value[2])
        s = pipe.stage(**carried(s, overflow=s.overflow, term=Mux(
            s.overflow, 0, (value[2:].as_signed() + up)[:TERM_LIMIT + 1].as_signed())))
        element_read = Signal(read.addr.shape())
        m.d.comb += element_read.eq(Cat((s.row >> lanes_log2)[:row_bits], s.slot))
        reading = pipe.valid
        s = pipe.stage(**carried(s, overflow=s.overflow, term=s.term))
        chosen = Array(read.data[i] for i in range(lanes))[s.row[:lanes_log2]]
        s = pipe.stage(**carried(s, overflow=s.overflow, term=s.term,
                                 old=Mux(s.fresh, 0, chosen)[:SUM_BITS].as_signed()))
        s = pipe.stage(**carried(s, overflow=s.overflow, total=(s.old + s.term)[:SUM_BITS]))
        total_valid = pipe.valid
        m.d.comb += [self.o_overflow.eq(pipe.valid & s.overflow),
                     self.o_pass_done.eq(pipe.valid & s.last)]

        # Drain: one slot after another
        slot = Signal(range(config.max_slots + 1))
        count = Signal(range(config.max_slots + 1))
        slot_bank = Signal()
        zeroing = Signal()
        token = Signal(layouts.token_bits(config))
        first, last = Signal(), Signal()
        row = Signal(config.address_bits)
        words_in_row = Signal(row_bits + 1)
        m.submodules.offset = offset = SequentialMultiplier(
            layouts.token_bits(config), layouts.steps_bits(config))
        slot_index = slot[:layouts.slot_bits(config)]
        m.d.comb += [
            words_in_row.eq(self.i_steps_out << (5 - lanes_log2)),
            offset.i_a.eq(token), offset.i_b.eq(self.i_steps_out),
            self.slot_address.eq(Mux(draining, Cat(slot_index, slot_bank),
                                     Cat(element.slot, self.i_slot_bank))),
            self.reader.request.p.address.eq(row),
            self.reader.request.p.beats.eq(self.i_steps_out << (8 - port_log2)),
            self.writer.request.p.address.eq(row),
            self.writer.request.p.beats.eq(Mux(
                last, self.i_steps_out << (7 - port_log2), self.i_steps_out << (8 - port_log2))),
        ]
        emitting = Signal()
        emitted = Signal(row_bits + 1)
        arriving = Signal(row_bits + 2)  # beats of partial sums
        added = Signal()
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.o_idle.eq(~self.i_zero.valid & ~self.i_drain.valid),
                             self.i_zero.ready.eq(1), self.i_drain.ready.eq(~self.i_zero.valid)]
                m.d.sync += [slot.eq(0), zeroing.eq(self.i_zero.valid)]
                with m.If(self.i_zero.valid):
                    m.d.sync += [token.eq(self.i_zero.payload), first.eq(1), last.eq(1),
                                 draining.eq(1)]
                    m.next = "OFFSET"
                with m.Elif(self.i_drain.valid):
                    m.d.sync += [count.eq(self.i_drain.p.count),
                                 slot_bank.eq(self.i_drain.p.slot_bank), draining.eq(1)]
                    m.next = "SLOT"
            with m.State("SLOT"):
                m.next = "SLOT_DATA"
            with m.State("SLOT_DATA"):
                m.d.sync += [token.eq(self.slot_data.token), first.eq(self.slot_data.first),
                             last.eq(self.slot_data.last)]
                m.next = "OFFSET"
            with m.State("OFFSET"):
                m.d.comb += offset.i_start.eq(1)
                m.next = "ROW"
            with m.State("ROW"):
                with m.If(offset.o_done):
                    m.d.sync += [arriving.eq(0), emitted.eq(0)]
                    with m.If(first):
                        m.next = "WRITE_ROW"
                    with m.Else():
                        m.d.sync += row.eq(self.i_workspace_address + (offset.o_product << 8))
                        m.next = "READ"
            with m.State("READ"):
                m.d.comb += self.reader.request.valid.eq(1)
                with m.If(self.reader.request.ready):
                    m.next = "ADD"
            with m.State("ADD"):
                with m.If(added):
                    m.next = "WRITE_ROW"
            with m.State("WRITE_ROW"):
                m.d.sync += row.eq(Mux(last, self.i_y_address + (offset.o_product << 7),
                                       self.i_workspace_address + (offset.o_product << 8)))
                m.next = "WRITE"
            with m.State("WRITE"):
                m.d.comb += self.writer.request.valid.eq(1)
                with m.If(self.writer.request.ready):
                    m.d.sync += emitting.eq(1)
                    m.next = "WRITING"
            with m.State("WRITING"):
                with m.If(self.writer.done):
                    m.d.sync += [emitting.eq(0), slot.eq(slot + 1)]
                    m.next = "SLOT"
                    with m.If(zeroing | (slot + 1 == count)):
                        m.d.comb += self.o_drained.eq(~zeroing)
                        m.d.sync += draining.eq(0)
                        m.next = "IDLE"

        # Partial sums of earlier sets are added as they arrive: a beat is a word, or half of one.
        per_beat = config.port_bytes // 8
        halves = lanes // per_beat
        halves_log2 = exact_log2(halves)

        def word_of(index):
            return (index >> halves_log2)[:row_bits]

        beats = Pipeline(m, self.reader.valid, name="beat")
        b = beats.stage(data=self.reader.data, index=arriving, last=self.reader.last)
        old_words = [read.data[i] for i in range(lanes)]
        b = beats.stage(data=b.data, index=b.index, last=b.last, old=old_words)
        m.d.comb += added.eq(beats.valid & b.last)
        with m.If(self.reader.valid):
            m.d.sync += arriving.eq(arriving + 1)

        # The y buffer's ports: elements, or partial sums and the way out
        emit = Signal()
        with m.If(draining):
            m.d.comb += [
                read.addr.eq(Cat(Mux(self.reader.valid, word_of(arriving), emitted[:row_bits]),
                                 slot_index)),
                write.addr.eq(Cat(word_of(b.index), slot_index)),
            ]
            half = b.index[0] if halves == 2 else C(0)
            for i in range(lanes):
                m.d.comb += [
                    write.en[i].eq(beats.valid & (half == i // per_beat)),
                    write.data[i].eq(b.old[i]
                                     + b.data.word_select(i % per_beat, 64)[:SUM_BITS].as_signed()),
                ]
        with m.Else():
            m.d.comb += [read.addr.eq(element_read), read.en.eq(reading),
                         write.addr.eq(Cat((s.row >> lanes_log2)[:row_bits], s.slot))]
            for i in range(lanes):
                m.d.comb += [write.en[i].eq(total_valid & (s.row[:lanes_log2] == i)),
                             write.data[i].eq(s.total)]

        # The way out: a word of sums becomes float32 or int64, then beats
        depth, under_way = 32, _ToFloat32.LATENCY_CYCLES + 4
        m.submodules.out_beats = out_beats = fifo.SyncFIFOBuffered(
            width=8 * config.port_bytes, depth=depth)
        pause = Signal()  # a word of two beats leaves in two cycles
        m.d.comb += emit.eq(emitting & ~pause & (emitted != words_in_row)
                            & (out_beats.level <= depth - under_way))
        m.d.sync += pause.eq(emit & ~last if halves == 2 else 0)
        with m.If(emit):
            m.d.sync += emitted.eq(emitted + 1)
        out = Pipeline(m, emit, name="out")
        o = out.stage(odd=emitted[0])
        sums = [Mux(zeroing, 0, read.data[i])[:SUM_BITS] for i in range(lanes)]
        floats = []
        for i in range(lanes):
            m.submodules[f"to_float32_{i}"] = convert = _ToFloat32()
            m.d.comb += [convert.i_sum.eq(sums[i]),
                         convert.i_grid_exponent.eq(self.i_grid_exponent)]
            floats.append(convert.o_float)
        for _ in range(_ToFloat32.LATENCY_CYCLES):
            o = out.stage(odd=o.odd, sums=sums)
            sums = o.sums
        integers = [Cat(x, x[-1].replicate(64 - SUM_BITS)) for x in sums]
        low = Signal(4 * config.port_bytes)  # float32 of the even word
        high = Signal(8 * config.port_bytes)  # second beat of a word of integers
        high_valid = Signal()
        m.d.sync += high_valid.eq(0)
        m.d.comb += [self.writer.data.payload.eq(out_beats.r_data),
                     self.writer.data.valid.eq(out_beats.r_rdy),
                     out_beats.r_en.eq(self.writer.data.ready)]
        with m.If(high_valid):
            m.d.comb += [out_beats.w_data.eq(high), out_beats.w_en.eq(1)]
        with m.Elif(out.valid):
            with m.If(~last):
                m.d.comb += [out_beats.w_data.eq(Cat(*integers[:per_beat])), out_beats.w_en.eq(1)]
                if halves == 2:
                    m.d.sync += [high.eq(Cat(*integers[per_beat:])), high_valid.eq(1)]
            with m.Else():
                if halves == 2:
                    m.d.comb += [out_beats.w_data.eq(Cat(*floats)), out_beats.w_en.eq(1)]
                else:
                    m.d.sync += low.eq(Cat(*floats))
                    m.d.comb += [out_beats.w_data.eq(Cat(low, *floats)), out_beats.w_en.eq(o.odd)]
        return m
