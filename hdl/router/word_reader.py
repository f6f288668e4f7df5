"""A linear read of memory, word by word."""

from amaranth import *
from amaranth.lib import fifo, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.interface.commands import ENTRY_BYTES

__all__ = ["CHUNKS", "WordReader"]

CHUNKS = 16
"""Units of 64 bytes that are under way or waiting: 1 KiB covers 256 cycles at a word a cycle."""


class WordReader(wiring.Component):
    """Read memory, and hand on its words of 32 bits.

    Throughput: one word a cycle, where memory has answered. Asks for 64 bytes at a time, as long as
    there is room for them. Beats may be given instead, a token's logits at most, for all of which
    there is room. Reset: idle; the memory port is flushed with it.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    count_bits : :class:`int`
        Of the units in one read.

    Members
    -------
    i_start, i_address, i_count : :py:`In(1)`, :py:`In(config.address_bits)`, :py:`In(count_bits)`
        Pulse: read so many units of 64 bytes, 1 or more, from a multiple of 64 on. Not before
        ``o_idle``.
    i_beat : :py:`In(layouts.logit_beat(config))`
        Comes in place of a read: 64 bytes and more. Between beats it may be ``o_idle``.
    o_idle : :py:`Out(1)`
        All that was asked for, or has come, is handed on.
    reader : :py:`Out(layouts.ReadClientSignature(config))`
    o_word : :py:`Out(stream.Signature(32))`
    """

    def __init__(self, config, *, count_bits):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "i_start": In(1),
            "i_address": In(config.address_bits),
            "i_count": In(count_bits),
            "i_beat": In(layouts.logit_beat(config)),
            "o_idle": Out(1),
            "reader": Out(layouts.ReadClientSignature(config)),
            "o_word": Out(stream.Signature(32)),
        })

    def elaborate(self, platform):
        m = Module()
        beats = ENTRY_BYTES // self._config.port_bytes
        words = self._config.port_bytes // 4
        row = -(-self._config.max_experts // BLOCK) * BLOCK  # of a token's logits
        m.submodules.beats = queue = fifo.SyncFIFOBuffered(
            width=8 * self._config.port_bytes, depth=max(CHUNKS * beats, row // words))
        unit = Signal(self._config.address_bits - exact_log2(ENTRY_BYTES))
        left = Signal.like(self.i_count)
        used = Signal(range(CHUNKS + 1))  # those that are given are not counted
        some = Signal()  # left is not 0
        asked, taken = Signal(), Signal()
        beat = Signal(range(max(beats, 2)))
        # Block RAM is slow to answer: the words of a beat leave from a register.
        held, count = Signal(8 * self._config.port_bytes, reset_less=True), Signal(range(words + 1))
        m.d.comb += [
            self.reader.request.p.address.eq(Cat(C(0, exact_log2(ENTRY_BYTES)), unit)),
            self.reader.request.p.beats.eq(beats),
            self.reader.request.valid.eq(some & (used != CHUNKS)),
            asked.eq(self.reader.request.valid & self.reader.request.ready),
            queue.w_data.eq(Mux(self.i_beat.valid, self.i_beat.data, self.reader.data)),
            queue.w_en.eq(self.i_beat.valid | self.reader.valid),
            self.o_word.valid.eq(count != 0),
            self.o_word.payload.eq(held[:32]),
            queue.r_en.eq((count == 0) | (self.o_word.ready & (count == 1))),
            self.o_idle.eq(~some & (used == 0) & ~queue.r_rdy & (count == 0)),
        ]
        # A cycle late: the words of what is taken are still here.
        m.d.sync += [taken.eq(queue.r_rdy & queue.r_en & (beat == beats - 1)),
                     used.eq(used + asked - (taken & (used != 0)))]
        with m.If(queue.r_en):
            m.d.sync += [held.eq(queue.r_data), count.eq(Mux(queue.r_rdy, words, 0))]
            with m.If(queue.r_rdy):
                m.d.sync += beat.eq(Mux(beat == beats - 1, 0, beat + 1))
        with m.Elif(self.o_word.ready):
            m.d.sync += [held.eq(held >> 32), count.eq(count - 1)]
        with m.If(asked):
            m.d.sync += [unit.eq(unit + 1), left.eq(left - 1), some.eq(left != 1)]
        with m.If(self.i_start):
            m.d.sync += [unit.eq(self.i_address[exact_log2(ENTRY_BYTES):]), left.eq(self.i_count),
                         some.eq(1)]
        return m
