"""Frames of the serial link (moeaccel.interface.link) from bytes, and bytes from frames."""

from amaranth import *
from amaranth.lib import crc, data, memory, stream, wiring
from amaranth.lib.crc.catalog import CRC32_ISO_HDLC
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.interface.link import CRC_BYTES, HEADER_BYTES

__all__ = ["FrameReceiver", "FrameTransmitter", "ReplyByte"]

BUFFER_BYTES = 2048
"""Of each direction: one block RAM, room for more than three of the largest frames."""

_BLOCK_END = 255  # code of a COBS block that no zero follows

ReplyByte = data.StructLayout({"byte": 8, "last": 1})
"""A byte of a frame's content, and whether it is the last one."""


def _ram(m):
    """Add a byte buffer and return its write and read port."""
    m.submodules.buffer = buffer = memory.Memory(
        shape=8, depth=BUFFER_BYTES, init=[], attrs={"no_rw_check": True})
    return buffer.write_port(), buffer.read_port()


def _drain(m, out, read_port, end):
    """Offer the bytes up to ``end`` on a stream, one every three cycles; return the position.

    Block RAM is slow to answer, so its output meets a register; a byte may be written in the cycle
    in which ``end`` moves behind it.
    """
    position = Signal(range(BUFFER_BYTES))
    seen = Signal(range(BUFFER_BYTES))
    take, took = Signal(), Signal()
    m.d.comb += [take.eq(out.valid & out.ready), read_port.addr.eq(position)]
    m.d.sync += [
        seen.eq(end), took.eq(take), position.eq(position + take),
        out.payload.eq(read_port.data), out.valid.eq((position != seen) & ~take & ~took),
    ]
    return position


class FrameReceiver(wiring.Component):
    """Find frames in received bytes and pass on the content of the good ones, without its CRC.

    ::

        i_stream --> [COBS] --> [CRC] --> ring of BUFFER_BYTES --> o_stream
                                  +--> at the delimiter: keep or forget

    Content becomes visible only when its frame has ended with a correct CRC and has the length that
    its header asks for; o_stream.valid then stays high, but for two cycles after each byte, until
    that content is taken. A frame that does not fit the ring's free room counts as damaged, which
    is told by ``o_damaged``; empty frames are ignored.

    Latency: 4 cycles from the delimiter to o_stream.valid. Throughput: one byte in every 3 cycles
    or more on i_stream, one byte every 3 cycles on o_stream. Reset: outside any frame, empty.

    Members
    -------
    i_stream : :py:`In(stream.Signature(8, always_ready=True))`
    o_stream : :py:`Out(stream.Signature(8))`
    o_damaged : :py:`Out(1)`
        High for one cycle.
    """

    def __init__(self):
        super().__init__({
            "i_stream": In(stream.Signature(8, always_ready=True)),
            "o_stream": Out(stream.Signature(8)),
            "o_damaged": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.crc = check = crc.Parameters(CRC32_ISO_HDLC, data_width=8).create()
        write_port, read_port = _ram(m)

        # COBS: a code says how many bytes follow it; a zero follows those, but for a full block
        # and at the end of the frame.
        left = Signal(8)
        zero_due = Signal()
        byte = Signal(8, reset_less=True)
        byte_valid = Signal()
        end = Signal()
        complete = Signal()
        m.d.sync += [byte_valid.eq(0), end.eq(0)]
        with m.If(self.i_stream.valid):
            with m.If(self.i_stream.payload == 0):
                m.d.sync += [end.eq(1), complete.eq(left == 0), left.eq(0), zero_due.eq(0)]
            with m.Elif(left == 0):
                m.d.sync += [
                    left.eq(self.i_stream.payload - 1), byte.eq(0), byte_valid.eq(zero_due),
                    zero_due.eq(self.i_stream.payload != _BLOCK_END),
                ]
            with m.Else():
                m.d.sync += [left.eq(left - 1), byte.eq(self.i_stream.payload), byte_valid.eq(1)]

        # The ring: a frame's content is written behind what is kept, and kept or forgotten at once.
        kept = Signal(range(BUFFER_BYTES))
        position = Signal(range(BUFFER_BYTES))
        taken = _drain(m, self.o_stream, read_port, kept)
        length = Signal(exact_log2(BUFFER_BYTES) + 1)
        overrun = Signal()
        full = Signal()
        m.d.comb += [
            check.valid.eq(byte_valid),
            check.data.eq(byte),
            check.start.eq(end),
            write_port.en.eq(byte_valid & ~full),
            write_port.addr.eq(position),
            write_port.data.eq(byte),
        ]
        m.d.sync += full.eq(position + 1 == taken)
        with m.If(byte_valid):
            m.d.sync += overrun.eq(overrun | full)
            with m.If(~full):
                m.d.sync += [position.eq(position + 1), length.eq(length + 1)]

        # Of the header, what says how long the frame is: opcode bit 0 and the count.
        writes = Signal()
        count = Signal(16)
        with m.If(byte_valid):
            with m.Switch(length):
                with m.Case(1):
                    m.d.sync += writes.eq(byte[0])
                with m.Case(2):
                    m.d.sync += count[:8].eq(byte)
                with m.Case(3):
                    m.d.sync += count[8:].eq(byte)
        wanted = Signal(17)
        good = Signal()
        m.d.sync += [
            wanted.eq(Mux(writes, count, 0) + HEADER_BYTES + CRC_BYTES),
            good.eq(check.match_detected & (length == wanted) & ~overrun),
        ]
        content_end = Signal(range(BUFFER_BYTES))
        m.d.sync += [content_end.eq(position - CRC_BYTES), self.o_damaged.eq(0)]
        with m.If(end):
            m.d.sync += [length.eq(0), overrun.eq(0)]
            with m.If(good & complete):
                m.d.sync += [kept.eq(content_end), position.eq(content_end)]
            with m.Else():
                m.d.sync += [position.eq(kept), self.o_damaged.eq((length != 0) | overrun)]
        return m


class FrameTransmitter(wiring.Component):
    """Put CRC, COBS and delimiter around content.

    ::

        i_stream --> [CRC] --> [COBS] --> ring of BUFFER_BYTES --> o_stream

    The code in front of a COBS block is written when the block ends, so a block becomes visible at
    once. Latency: up to 254 bytes wait for the end of their block. Throughput: one byte of content
    in 3 cycles while the ring has room; o_stream one byte every 3 cycles. Reset: empty, outside any
    frame.

    Members
    -------
    i_stream : :py:`In(stream.Signature(ReplyByte))`
    o_stream : :py:`Out(stream.Signature(8))`
    """

    def __init__(self):
        super().__init__({
            "i_stream": In(stream.Signature(ReplyByte)),
            "o_stream": Out(stream.Signature(8)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.crc = check = crc.Parameters(CRC32_ISO_HDLC, data_width=8).create()
        write_port, read_port = _ram(m)

        # The open block: its code, its place for the code, the place behind its last byte.
        code = Signal(8, init=1)
        code_position = Signal(range(BUFFER_BYTES))
        position = Signal(range(BUFFER_BYTES), init=1)
        visible = Signal(range(BUFFER_BYTES))
        written = Signal(range(BUFFER_BYTES))  # the same, once it is in the ring
        taken = _drain(m, self.o_stream, read_port, written)
        room = Signal(range(BUFFER_BYTES))
        has_room = Signal()
        m.d.sync += [room.eq(taken - position), has_room.eq(room[3:].any())]

        byte = Signal(8, reset_less=True)
        is_zero = Signal()
        put = Signal()
        close = Signal()
        full = Signal()
        closing = Signal()
        m.d.sync += is_zero.eq(byte == 0)
        m.d.comb += [
            closing.eq(close | (put & is_zero)),
            check.data.eq(byte),
        ]
        m.d.sync += [
            write_port.en.eq(put | close),
            write_port.addr.eq(Mux(closing, code_position, position)),
            write_port.data.eq(Mux(closing, code, byte)),
            written.eq(visible),
        ]
        with m.If(put | close):
            m.d.sync += position.eq(position + 1)
        with m.If(closing):
            m.d.sync += [code.eq(1), code_position.eq(position), visible.eq(position), full.eq(0)]
        with m.Elif(put):
            m.d.sync += [code.eq(code + 1), full.eq(code == _BLOCK_END - 1)]

        last = Signal()
        tail = Signal(range(CRC_BYTES))
        tail_byte = check.crc.word_select(tail, 8)
        with m.FSM():
            with m.State("TAKE"):
                m.d.comb += [close.eq(full), self.i_stream.ready.eq(has_room)]
                m.d.sync += [
                    byte.eq(self.i_stream.payload.byte), last.eq(self.i_stream.payload.last)]
                with m.If(self.i_stream.valid & has_room):
                    m.next = "TEST"
            with m.State("TEST"):
                m.next = "PUT"
            with m.State("PUT"):
                m.d.comb += [put.eq(1), check.valid.eq(1)]
                with m.If(last):
                    m.next = "TAKE CRC"
                with m.Else():
                    m.next = "TAKE"
            with m.State("TAKE CRC"):
                m.d.comb += close.eq(full)
                m.d.sync += byte.eq(tail_byte)
                m.next = "TEST CRC"
            with m.State("TEST CRC"):
                m.next = "PUT CRC"
            with m.State("PUT CRC"):
                m.d.comb += put.eq(1)
                m.d.sync += tail.eq(tail + 1)
                with m.If(tail == CRC_BYTES - 1):
                    m.next = "CLOSE"
                with m.Else():
                    m.next = "TAKE CRC"
            with m.State("CLOSE"):
                m.d.comb += [close.eq(full), check.start.eq(1)]
                m.next = "END"
            with m.State("END"):
                # The delimiter takes the place of the next block's code.
                m.d.comb += close.eq(1)
                m.d.sync += code.eq(0)
                m.next = "DELIMITER"
            with m.State("DELIMITER"):
                m.d.comb += close.eq(1)
                m.next = "TAKE"
        return m
