"""Slot tables: which token a pass has in each slot, with what weight, and what becomes of it."""

from amaranth import *
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.arithmetic import SUBNORMAL_EXPONENT
from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.unchecked_memory import unchecked_memory

__all__ = ["FILL_CYCLES", "SlotFiller"]

FILL_CYCLES = 4
"""From a pair to its entry in the slot table: its weight becomes an internal float."""


class _Wires:
    """What the parts of a slot filler tell each other."""

    def __init__(self, config):
        self.slot = Signal(range(config.max_slots + 1))
        self.same = Signal()
        self.pair = Signal(layouts.pair(config))
        self.filled = Signal()  # ``pair`` goes into ``slot``
        self.filling = Signal(FILL_CYCLES)  # one was, so many cycles ago
        self.resident_token = Signal(layouts.token_bits(config))


class SlotFiller(wiring.Component):
    """Fill slot tables with the sorted pairs of a command, pass by pass.

    ::

        pair_data ---> compare with [resident tokens] --> o_same
             |
             +-------> [weights] --> internal float --+
             |                                        +--> slot_w
             +-------> [totals], [done] --> flags ----+

    Each pass takes the next pairs. If these are of the very tokens of the pass before, in the same
    slots, x and y stay on the chip (``o_same``). An entry is ``first`` if no partial sum of its
    token is in memory: the pass is the token's first, or the same as one that was; it is ``last``
    if the token has no pair in a later pass. A weight that is NaN or infinite counts as zero and is
    reported; weights of a job that is not routed are 1.

    Cycles from ``i_start`` to ``o_done``: 5 and 4 for each slot, after those to compare: 1 if the
    number of slots is another one; else, for S slots, 2 S + 1, or 2 s + 5 if that is less and slot
    s is the first with another token. More while weights are missing. Reset: idle, nothing
    resident.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_clear : :py:`In(1)`
        Pulse: a new job. Between passes.
    i_routed : :py:`In(1)`
        Constant from the cycle after ``i_clear`` on.
    weights_w_en, weights_w_address, weights_w_data : :py:`In`
        Write port of the weights, float32: as many as a beat of memory holds, from token 0's on.
    i_weights : :py:`In(1)`
        All weights have been written, or none is needed. Until then no slot is filled.
    total_w_en, total_w_address, total_w_data : :py:`In`
        Pairs of a token. Once for each token that has any, before the first pass.
    pair_address, pair_data : :py:`Out`, :py:`In(layouts.pair(config))`
        Asks for a sorted pair, and has it one cycle later.
    i_start : :py:`In(1)`
        Pulse: the next pass. Not before ``o_done``.
    i_count, i_bank : :py:`In`
        Its slots, 1 or more, and the bank of the slot table; constant from ``i_start`` to
        ``o_done``.
    slot_w_en, slot_w_address, slot_w_data : :py:`Out`
        Write port of the slot table; address {bank, slot}.
    o_done : :py:`Out(1)`
        Pulse: the last entry has been written, or is in this cycle.
    o_same : :py:`Out(1)`
        The tokens of the pass before, in the same slots. From ``o_done`` to ``i_start``.
    o_assignments : :py:`Out(1)`
        Pulse for each pair put into a pass.
    o_nonfinite, o_nonfinite_token : :py:`Out(1)`, :py:`Out(layouts.token_bits(config))`
        The weight of a pair is NaN or infinite; the lowest such token. Complete a cycle after
        ``o_done``, forgotten with ``i_clear``.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "i_clear": In(1),
            "i_routed": In(1),
            "weights_w_en": In(1),
            "weights_w_address": In(layouts.pair_beat_bits(config)),
            "weights_w_data": In(8 * config.port_bytes),
            "i_weights": In(1),
            "total_w_en": In(1),
            "total_w_address": In(layouts.token_bits(config)),
            "total_w_data": In(5),
            "pair_address": Out(ceil_log2(config.max_assignments)),
            "pair_data": In(layouts.pair(config)),
            "i_start": In(1),
            "i_count": In(range(config.max_slots + 1)),
            "i_bank": In(layouts.slot_bank_bits(config)),
            "slot_w_en": Out(1),
            "slot_w_address": Out(layouts.slot_address_bits(config)),
            "slot_w_data": Out(layouts.slot(config)),
            "o_done": Out(1),
            "o_same": Out(1),
            "o_assignments": Out(1),
            "o_nonfinite": Out(1),
            "o_nonfinite_token": Out(layouts.token_bits(config)),
        })

    def elaborate(self, platform):
        m = Module()
        wires = _Wires(self._config)
        self._entries(m, wires)
        self._sequence(m, wires)
        return m

    def _entries(self, m, w):
        """Look a pair up and write its entry: a pipeline of FILL_CYCLES."""
        config = self._config
        lane_bits = exact_log2(config.port_bytes // 4)
        weights_w, weights_r = unchecked_memory(
            m, "weights", 8 * config.port_bytes, 4 * config.max_assignments // config.port_bytes)
        total_w, total_r = unchecked_memory(m, "totals", 5, config.max_tokens)
        done_w, done_r = unchecked_memory(m, "done", 5, config.max_tokens)
        resident = data.StructLayout({"token": layouts.token_bits(config), "first": 1})
        resident_w, resident_r = unchecked_memory(m, "resident", resident, config.max_slots)

        p = Pipeline(m, w.filled, "fill")
        s = p.stage(
            word=weights_r.data, part=w.pair.index[:lane_bits], slot=w.slot,
            address=Cat(w.slot[: layouts.slot_bits(config)], self.i_bank), token=w.pair.token,
            done=done_r.data, total=total_r.data, resident_first=resident_r.data.first)
        first = Signal()
        m.d.comb += [
            weights_w.en.eq(self.weights_w_en),
            weights_w.addr.eq(self.weights_w_address),
            weights_w.data.eq(self.weights_w_data),
            weights_r.addr.eq(w.pair.index >> lane_bits),
            total_r.addr.eq(w.pair.token),
            done_r.addr.eq(w.pair.token),
            resident_r.addr.eq(w.slot),
            w.resident_token.eq(resident_r.data.token),
            first.eq(Mux(w.same, s.resident_first, s.done == 0)),
            resident_w.en.eq(p.valid),
            resident_w.addr.eq(s.slot),
            resident_w.data.token.eq(s.token),
            resident_w.data.first.eq(first),
        ]
        # Read three cycles later and more: a register in front of memories that may be far away.
        m.d.sync += [
            done_w.en.eq(p.valid | self.total_w_en),
            done_w.addr.eq(Mux(self.total_w_en, self.total_w_address, s.token)),
            done_w.data.eq(Mux(self.total_w_en, 0, s.done + 1)),
            total_w.en.eq(self.total_w_en),
            total_w.addr.eq(self.total_w_address),
            total_w.data.eq(self.total_w_data),
        ]
        s = p.stage(
            raw=s.word.word_select(s.part, 32),
            address=s.address, token=s.token, first=first, last=s.done + 1 == s.total)
        s, weight = self._weight(m, p, s)
        assert p.depth == FILL_CYCLES
        m.d.sync += w.filling.eq(Cat(w.filled, w.filling))
        m.d.comb += [
            self.slot_w_en.eq(p.valid),
            self.slot_w_address.eq(s.address),
            self.slot_w_data.token.eq(s.token),
            self.slot_w_data.weight.eq(weight),
            self.slot_w_data.first.eq(s.first),
            self.slot_w_data.last.eq(s.last),
        ]
        with m.If(p.valid & s.nonfinite):
            m.d.sync += self.o_nonfinite.eq(1)
            with m.If(~self.o_nonfinite | (s.token < self.o_nonfinite_token)):
                m.d.sync += self.o_nonfinite_token.eq(s.token)
        with m.If(self.i_clear):
            m.d.sync += self.o_nonfinite.eq(0)

    def _weight(self, m, p, s):
        """Make an internal float of ``s.raw`` (arithmetic.float32_to_internal), in two stages."""
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
            nonfinite=s.nonfinite & self.i_routed,
            address=s.address, token=s.token, first=s.first, last=s.last)
        weight = Signal(layouts.internal_float())
        with m.If(~self.i_routed):
            m.d.comb += [weight.mantissa.eq(1 << 16), weight.exponent.eq(-16)]
        with m.Elif(~s.zero):
            carried = Mux(s.power, 1 << 16, s.magnitude)
            m.d.comb += [
                weight.mantissa.eq(Mux(s.sign, -carried, carried)),
                weight.exponent.eq(
                    Mux(s.subnormal, SUBNORMAL_EXPONENT, s.field - 143 + s.carry)),
            ]
        return s, weight

    def _sequence(self, m, w):
        """Compare the pass's tokens with those of the one before, then fill its slots."""
        position = Signal.like(self.pair_address, reset_less=True)  # of the pass's first pair
        resident_count = Signal.like(self.i_count)
        last_slot = Signal()
        sorted_token, resident_token = (Signal.like(w.resident_token) for _ in range(2))
        equal = Signal()
        m.d.comb += [
            self.pair_address.eq(position + w.slot),
            self.o_same.eq(w.same),
            self.o_assignments.eq(w.filled),
            equal.eq(sorted_token == resident_token),
        ]
        m.d.sync += last_slot.eq(w.slot + 1 == self.i_count)
        with m.If(self.i_clear):
            m.d.sync += [position.eq(0), resident_count.eq(0)]
        with m.FSM():
            with m.State("IDLE"):
                with m.If(self.i_start):
                    m.d.sync += [w.slot.eq(0), w.same.eq(self.i_count == resident_count)]
                    m.next = "COMPARE_READ"
            with m.State("COMPARE_READ"):
                with m.If(w.slot != 0):
                    m.d.sync += w.same.eq(w.same & equal)
                m.next = "COMPARE"
                with m.If(~w.same):
                    m.next = "START"
            with m.State("COMPARE"):
                m.d.sync += [
                    w.slot.eq(w.slot + 1),
                    sorted_token.eq(self.pair_data.token),
                    resident_token.eq(w.resident_token),
                ]
                m.next = "COMPARE_READ"
                with m.If(last_slot):
                    m.next = "COMPARE_LAST"
            with m.State("COMPARE_LAST"):
                m.d.sync += w.same.eq(w.same & equal)
                m.next = "START"
            with m.State("START"):
                m.d.sync += w.slot.eq(0)
                with m.If(self.i_weights):  # asked for long before, but memory may be slow
                    m.next = "SORTED"
            with m.State("SORTED"):
                m.next = "PAIR"
            with m.State("PAIR"):
                m.d.sync += w.pair.eq(self.pair_data)
                m.next = "LOOKUP"
            with m.State("LOOKUP"):
                m.next = "FILL"
            with m.State("FILL"):
                m.d.comb += w.filled.eq(1)
                m.d.sync += w.slot.eq(w.slot + 1)
                m.next = "SORTED"
                with m.If(last_slot):
                    m.next = "END"
            with m.State("END"):  # until the slot table is complete
                with m.If(~w.filling[:-1].any()):
                    m.d.comb += self.o_done.eq(1)
                    m.d.sync += [resident_count.eq(self.i_count),
                                 position.eq(position + self.i_count)]
                    m.next = "IDLE"
