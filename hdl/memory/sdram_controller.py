"""SDRAM controller: AXI4 in front of a 16-bit single-data-rate SDRAM with four banks."""

from __future__ import annotations

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, fifo, memory, wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.memory.axi import AXI4Signature
from moeaccel.hdl.memory.sdram import (
    BANK_BITS,
    BURST_WORDS,
    CAS_LATENCY,
    CHIP_BYTES,
    COLUMN_BITS,
    MODE_REGISTER,
    POWER_UP_REFRESHES,
    ROW_BITS,
    SdramCommand,
    SdramSignature,
    SdramTiming,
)
from moeaccel.hdl.pipeline import Pipeline

__all__ = ["SdramController"]

_FRAME = BURST_WORDS
# The cycle of a frame in which a command of each kind is decided.
_COLUMN, _ROW, _PRECHARGE = 1, 2, 3

# What the frame gives: limit's name -> cycles that always pass. A column command follows the
# activation in the next frame at the earliest, a precharge (of the bank, or of all) the column
# command in the next frame, an activation the precharge in the next frame.
_GIVEN = {
    "rcd": _FRAME + _COLUMN - _ROW,
    "rp": _FRAME + _ROW - _PRECHARGE,
    "wr": _FRAME + _PRECHARGE - _COLUMN - (BURST_WORDS - 1),
    "ras": 2 * _FRAME + _PRECHARGE - _ROW,
    "rc": 3 * _FRAME,
    "rrd": _FRAME,
    "mrd": _FRAME,
}

_QUEUE = 16
"""Depth of the queues of addresses, answers and acknowledgements: that of a LUT RAM."""
_WRITE_BEATS = 512
"""Beats of data that wait to be written: two of AXI's longest bursts."""
_POSTPONED = 4
"""Refreshes owed at which they are done, requests or not."""

_CHUNK_BITS = 2
_BLOCK_BITS = COLUMN_BITS - 2 - _CHUNK_BITS


class _Wires:
    """What the parts of a controller tell each other."""

    def __init__(self, id_width, timing):
        beat_bits = (CHIP_BYTES // 8 - 1).bit_length()
        self.request = data.StructLayout({
            "id": id_width, "length": 8, "start": _CHUNK_BITS,
            "block": beat_bits - _CHUNK_BITS, "outside": 1,
        })
        chunk = data.StructLayout({
            "id": id_width, "write": 1, "outside": 1, "final": 1,
            "start": _CHUNK_BITS, "end": _CHUNK_BITS,
            "column": _BLOCK_BITS, "bank": BANK_BITS, "row": ROW_BITS,
        })

        # The frame.
        self.phase = Signal(range(_FRAME))
        self.frame_end = Signal()

        # Queues; those of addresses are made with what fills them.
        self.acknowledgements = fifo.SyncFIFO(width=id_width + 1, depth=_QUEUE)
        self.answers = fifo.SyncFIFO(width=id_width + 2 + 64, depth=_QUEUE)
        self.whole_bursts = Signal(range(_WRITE_BEATS + 1))
        self.take_write = Signal()
        self.take_word = Signal()

        # The burst that is cut into chunks.
        self.burst = Signal(self.request)
        self.burst_valid = Signal()
        self.burst_write = Signal()
        self.burst_end = Signal(_CHUNK_BITS)
        self.burst_more = Signal(9 - _CHUNK_BITS)  # chunks after this one
        self.write_ready = Signal()

        # Next and current chunk.
        self.next_chunk = Signal(chunk)
        self.next_valid = Signal()
        self.current = Signal(chunk)
        self.current_valid = Signal()
        self.current_last = Signal()
        self.advance = Signal()
        self.may_advance = Signal()

        # The next chunk's row.
        self.is_open = Signal(1 << BANK_BITS)
        self.found_open = Signal()
        self.hit = Signal()
        self.in_use = Signal()
        self.wanted = Signal()  # next_chunk is there, in the chip, and no refresh comes before it

        # Commands, refreshes, power-up.
        self.column = Signal()
        self.precharge_all = Signal()
        self.refresh = Signal()
        self.set_mode = Signal()
        self.refresh_wanted = Signal(init=1)
        self.frames = Signal(range(max(timing.refresh // _FRAME, timing.power_up // _FRAME + 2)))
        self.owed = Signal(range(2 * _POSTPONED + 1), init=POWER_UP_REFRESHES)
        self.nothing_to_do = Signal()
        self.configured = Signal()


class SdramController(wiring.Component):
    """Serve AXI4 bursts of 8-byte beats from a 16-bit SDRAM.

    ::

        AR --> [queue] --+                                            +--> column command
                         +--> burst --> next chunk --> current chunk -+
        AW --> [queue] --+                  |
        W  --> [block RAM, whole bursts] ---|------> dq_o, dqm        +--> activation, precharge
        B  <-- [queue] <--- last beat       +--> [open rows] ---------+
        R  <-- [queue] <--- [four words] <--- dq_i                    +--> refresh, power-up

    Time is cut into frames of four cycles, for one beat each: its column command is decided in
    cycle 1, an activation in cycle 2 and a precharge in cycle 3, so that every limit of the chip
    but that of a refresh is kept by the order of the frames; the constructor checks this for the
    clock. Bursts are cut into chunks of at most four beats, aligned to 32 bytes. While the current
    chunk has its frames, the next one's row is opened. The current chunk is never stopped: its row
    is open, and there is room for its answers.

    A byte address is, from the top: row (13 bits), bank (2), column (9), byte. So a linear stream
    changes the bank every 1 KiB and finds the next row open. Rows stay open until another row of
    the bank, or a refresh, is wanted. Addresses of 32 MiB and more are answered with DECERR.

    Reads are served in the order of AR, writes in that of AW, and the two take turns, burst by
    burst. A write waits until all of its data has come, so a slow writer holds up nobody; B follows
    the last beat's command. A reader that does not take its beats holds up all that come after it.
    All bursts must be INCR, of whole beats, aligned to 8 bytes, and stay within 4 KiB.

    Throughput: a beat in four cycles, also across bursts and rows in other banks. What costs time:
    another row of the bank that is in use, 2 frames; a write after a read, 1 frame; a refresh,
    2 frames and the chip's rfc (rounded up to frames), once every ``refresh`` cycles. Refreshes are
    done when nothing else is, or when 4 are owed, then all together. Latency of a lone read, from
    AR to R: 19 to 22 cycles plus ``io_cycles``, and 4 more when another row of the bank is open.

    ``sdram`` comes straight from registers, and ``dq_i`` goes straight to one. Reset: power-up
    sequence of ``timing.power_up`` cycles and about 100 more; requests wait meanwhile. The chip's
    content is lost only if refreshes are.

    Parameters
    ----------
    timing : :class:`SdramTiming`
    id_width : :class:`int`
        Bits of AXI ids.
    io_cycles : :class:`int`
        Registers between ``sdram`` and the chip, those of commands and those of ``dq_i`` together:
        ``dq_i`` holds a read's first word ``3 + io_cycles`` cycles after the command on ``sdram``.

    Members
    -------
    axi : :py:`In(AXI4Signature(32, 64, id_width))`
    sdram : :py:`Out(SdramSignature())`
    """

    def __init__(self, *, timing, id_width, io_cycles=0):
        if not isinstance(timing, SdramTiming):
            raise TypeError(f"timing must be a SdramTiming, not {timing!r}")
        for name, given in _GIVEN.items():
            if getattr(timing, name) > given:
                raise ValueError(
                    f"clock_hz must be low enough for {name} in {given} cycles, not "
                    f"{timing.clock_hz!r}: {name} takes {getattr(timing, name)} cycles of it")
        if timing.ras_max < (_POSTPONED + 2) * timing.refresh:
            raise ValueError("ras_max must be longer than refreshes may be postponed, "
                             f"not {timing.ras_max!r} cycles")
        if not isinstance(io_cycles, int) or not 0 <= io_cycles <= 4:
            raise ValueError(f"io_cycles must be from 0 to 4, not {io_cycles!r}")
        self._timing = timing
        self._id_width = id_width
        self._io_cycles = io_cycles
        super().__init__({
            "axi": In(AXI4Signature(32, 64, id_width)),
            "sdram": Out(SdramSignature()),
        })

    @property
    def timing(self):
        """Limits of the chip."""
        return self._timing

    @property
    def io_cycles(self):
        """Registers on the way to the chip and back."""
        return self._io_cycles

    def elaborate(self, platform):
        m = Module()
        wires = _Wires(self._id_width, self._timing)
        m.d.sync += wires.phase.eq(wires.phase + 1)
        m.d.comb += wires.frame_end.eq(wires.phase == _FRAME - 1)
        self._queues(m, wires)
        self._write_data(m, wires)
        self._bursts(m, wires)
        self._chunks(m, wires)
        self._open_rows(m, wires)
        self._next_chunk(m, wires)
        self._refreshes(m, wires)
        self._commands(m, wires)
        self._sequence(m, wires)
        self._words_out(m, wires)
        self._words_in(m, wires)
        return m

    def _queues(self, m, w):
        """Addresses wait in two queues; so do acknowledgements and answers."""
        w.reads, w.read = self._address_queue(m, "ar", w.request)
        w.writes, w.write = self._address_queue(m, "aw", w.request)
        m.submodules.acknowledgements = w.acknowledgements
        m.submodules.answers = w.answers

    def _address_queue(self, m, channel, request):
        axi = self.axi
        beat_bits = request["start"].width + request["block"].width
        queue = fifo.SyncFIFO(width=request.size, depth=_QUEUE)
        m.submodules[f"{channel}_queue"] = queue
        valid, address = getattr(axi, f"{channel}valid"), getattr(axi, f"{channel}addr")
        legal = (getattr(axi, f"{channel}size") == 3) & (getattr(axi, f"{channel}burst") == 1) \
            & (address[:3] == 0)
        m.d.comb += [
            queue.w_en.eq(valid),
            getattr(axi, f"{channel}ready").eq(queue.w_rdy),
            queue.w_data.eq(Cat(getattr(axi, f"{channel}id"), getattr(axi, f"{channel}len"),
                                address[3:3 + beat_bits], address[3 + beat_bits:].any())),
        ]
        m.d.sync += Assert(~valid | legal, "a burst must be INCR, of aligned 8-byte beats")
        return queue, data.View(request, queue.r_data)

    def _write_data(self, m, w):
        """Data waits in block RAM until all of its burst is there."""
        axi = self.axi
        # What is read while it is written is not used.
        m.submodules.write_data = write_data = memory.Memory(
            shape=72, depth=_WRITE_BEATS, init=[], attrs={"no_rw_check": True})
        write_in = write_data.write_port()
        w.write_out = write_data.read_port()
        write_level = Signal(range(_WRITE_BEATS + 1))
        m.d.comb += [
            write_in.en.eq(axi.wvalid & axi.wready),
            write_in.data.eq(Cat(axi.wdata, axi.wstrb)),
        ]
        # Ready comes from a register, hence the margin.
        m.d.sync += [
            write_in.addr.eq(write_in.addr + write_in.en),
            w.write_out.addr.eq(w.write_out.addr + w.take_word),
            write_level.eq(write_level + write_in.en - w.take_word),
            axi.wready.eq(write_level < _WRITE_BEATS - 4),
            w.whole_bursts.eq(w.whole_bursts + (write_in.en & axi.wlast) - w.take_write),
        ]

    def _bursts(self, m, w):
        """Reads and writes take turns, once a frame."""
        burst_new = Signal()
        write_next = Signal()
        may_take = Signal()
        take_read = Signal()
        # Since the latest burst was taken, in cycle 1, these have settled.
        m.d.sync += [
            w.write_ready.eq(w.writes.r_rdy & (w.whole_bursts != 0)
                             & (w.acknowledgements.w_level < _QUEUE // 2)),
            write_next.eq(w.write_ready & ~(w.reads.r_rdy & w.burst_write)),
        ]
        m.d.comb += [
            may_take.eq((w.phase == 1) & ~w.burst_valid),
            w.take_write.eq(may_take & write_next),
            take_read.eq(may_take & w.reads.r_rdy & ~write_next),
            w.reads.r_en.eq(take_read),
            w.writes.r_en.eq(w.take_write),
        ]
        m.d.sync += burst_new.eq(take_read | w.take_write)
        with m.If(take_read | w.take_write):
            m.d.sync += [
                w.burst_valid.eq(1),
                w.burst_write.eq(write_next),
                w.burst.eq(Mux(write_next, w.write, w.read)),
            ]
        with m.If(burst_new):
            m.d.sync += Cat(w.burst_end, w.burst_more).eq(w.burst.start + w.burst.length)

    def _chunks(self, m, w):
        """The burst gives the next chunk, which becomes the current one."""
        burst, next_chunk, current = w.burst, w.next_chunk, w.current
        last_chunk = Signal()
        m.d.comb += [
            w.advance.eq(w.frame_end & w.may_advance),
            w.current_last.eq(current.start == current.end),
            last_chunk.eq(w.burst_more == 0),
        ]
        with m.If(w.frame_end & (w.may_advance | ~w.next_valid)):
            m.d.sync += [
                w.next_valid.eq(w.burst_valid),
                next_chunk.id.eq(burst.id),
                next_chunk.write.eq(w.burst_write),
                next_chunk.outside.eq(burst.outside),
                next_chunk.final.eq(last_chunk),
                next_chunk.start.eq(burst.start),
                next_chunk.end.eq(w.burst_end | ~last_chunk.replicate(_CHUNK_BITS)),
                Cat(next_chunk.column, next_chunk.bank, next_chunk.row).eq(burst.block),
            ]
            with m.If(w.burst_valid):
                # Within 4 KiB the row stays the same.
                count = burst.block[:_BLOCK_BITS + BANK_BITS]
                m.d.sync += [
                    w.burst_valid.eq(~last_chunk),
                    burst.start.eq(0),
                    count.eq(count + 1),
                    w.burst_more.eq(w.burst_more - 1),
                ]
        with m.If(w.frame_end):
            m.d.sync += [
                w.current_valid.eq(w.may_advance | (w.current_valid & ~w.current_last)),
                current.start.eq(current.start + 1),
            ]
        with m.If(w.advance):
            m.d.sync += current.eq(next_chunk)

    def _open_rows(self, m, w):
        """Look the next chunk's row up, in cycles 0 and 1 of a frame."""
        next_chunk = w.next_chunk
        m.submodules.rows = rows = memory.Memory(shape=ROW_BITS, depth=1 << BANK_BITS, init=[])
        w.rows_write = rows.write_port()
        rows_read = rows.read_port(domain="comb")
        found_row = Signal(ROW_BITS)
        m.d.comb += [
            rows_read.addr.eq(next_chunk.bank),
            w.rows_write.addr.eq(next_chunk.bank),
            w.rows_write.data.eq(next_chunk.row),
        ]
        m.d.sync += [
            w.found_open.eq(w.is_open.bit_select(next_chunk.bank, 1)),
            found_row.eq(rows_read.data),
            w.hit.eq(w.found_open & (found_row == next_chunk.row)),
            w.in_use.eq(w.current_valid & (w.current.bank == next_chunk.bank)),
            w.wanted.eq(w.next_valid & ~next_chunk.outside & ~w.refresh_wanted),
        ]

    def _next_chunk(self, m, w):
        """The next chunk needs an open row, room for its answers, and a free bus."""
        next_chunk = w.next_chunk
        reserved = Signal(range(_QUEUE + 1))
        room = Signal()
        released = Signal()
        m.d.sync += [
            released.eq(self.axi.rvalid & self.axi.rready),
            room.eq(reserved <= _QUEUE - (1 << _CHUNK_BITS)),
            # Settled in cycle 2, used in cycle 3: a row being opened in cycle 2 is in time.
            w.may_advance.eq(
                w.next_valid & ~w.refresh_wanted & (~w.current_valid | w.current_last)
                & (next_chunk.outside | w.hit | ~w.found_open)
                & Mux(next_chunk.write, ~w.current_valid | w.current.write, room)),
        ]
        reserve = Signal(range(1 + (1 << _CHUNK_BITS)))
        with m.If(w.advance & ~next_chunk.write):
            m.d.comb += reserve.eq(next_chunk.end - next_chunk.start + 1)
        m.d.sync += reserved.eq(reserved + reserve - released)

    def _refreshes(self, m, w):
        """Count the refreshes that are owed."""
        interval = self._timing.refresh // _FRAME
        refresh_due = Signal()
        m.d.sync += [
            w.nothing_to_do.eq(~(w.current_valid | w.next_valid | w.burst_valid | w.reads.r_rdy
                                 | w.write_ready)),
            w.owed.eq(w.owed + refresh_due - w.refresh),
        ]
        m.d.comb += refresh_due.eq(w.configured & w.frame_end & (w.frames == interval - 1))
        with m.If(w.frame_end):
            m.d.sync += w.frames.eq(w.frames + 1)
        with m.If(refresh_due):
            m.d.sync += w.frames.eq(0)

    def _commands(self, m, w):
        """Give the chip its command, bank and address."""
        sdram, next_chunk, current = self.sdram, w.next_chunk, w.current
        command = Signal(3, init=SdramCommand.NOP)
        activate = Signal()
        precharge = Signal()
        m.d.comb += [
            Cat(sdram.we_n, sdram.cas_n, sdram.ras_n).eq(command),
            w.column.eq((w.phase == _COLUMN) & w.current_valid),
            activate.eq((w.phase == _ROW) & w.wanted & ~w.found_open),
            precharge.eq((w.phase == _PRECHARGE) & w.wanted & w.found_open & ~w.hit & ~w.in_use),
            w.rows_write.en.eq(activate),
        ]
        m.d.sync += [sdram.cke.eq(1), sdram.cs_n.eq(0), command.eq(SdramCommand.NOP)]
        with m.If(w.column & ~current.outside):
            m.d.sync += command.eq(Mux(current.write, SdramCommand.WRITE, SdramCommand.READ))
        with m.If(activate):
            m.d.sync += [
                command.eq(SdramCommand.ACTIVATE),
                w.is_open.bit_select(next_chunk.bank, 1).eq(1),
            ]
        with m.If(precharge):
            m.d.sync += [
                command.eq(SdramCommand.PRECHARGE),
                w.is_open.bit_select(next_chunk.bank, 1).eq(0),
            ]
        with m.If(w.precharge_all):
            m.d.sync += command.eq(SdramCommand.PRECHARGE), w.is_open.eq(0)
        with m.If(w.refresh):
            m.d.sync += command.eq(SdramCommand.REFRESH)
        with m.If(w.set_mode):
            m.d.sync += command.eq(SdramCommand.MODE)
        with m.Switch(w.phase):
            with m.Case(_COLUMN):
                m.d.sync += [
                    sdram.ba.eq(current.bank),
                    sdram.a.eq(Cat(C(0, 2), current.start, current.column)),
                ]
            with m.Case(_ROW):
                m.d.sync += [
                    sdram.ba.eq(Mux(w.configured, next_chunk.bank, 0)),
                    sdram.a.eq(Mux(w.configured, next_chunk.row, MODE_REGISTER)),
                ]
            with m.Case(_PRECHARGE):
                m.d.sync += sdram.a[10].eq(w.precharge_all)  # the bank is still next_chunk's

    def _sequence(self, m, w):
        """Power-up, and refreshes when it is their turn."""
        timing = self._timing
        refresh_held = Signal(init=1)
        wait = Signal(range(max(2, -(-timing.rfc // _FRAME))))
        with m.FSM(name="sequence"):
            with m.State("POWER_UP"):
                with m.If(w.frame_end & (w.frames == timing.power_up // _FRAME + 1)):
                    m.d.comb += w.precharge_all.eq(1)
                    m.d.sync += w.frames.eq(0)
                    m.next = "REFRESH"
            with m.State("RUN"):
                with m.If(w.frame_end):
                    m.d.sync += [
                        w.refresh_wanted.eq((w.owed >= _POSTPONED)
                                            | ((w.owed != 0) & w.nothing_to_do)
                                            | w.refresh_wanted),
                        refresh_held.eq(w.refresh_wanted),
                    ]
                    # A row that was opened just before refresh_wanted has had its time.
                    with m.If(w.refresh_wanted & refresh_held & ~w.current_valid):
                        m.d.comb += w.precharge_all.eq(1)
                        m.next = "REFRESH"
            with m.State("REFRESH"):
                m.d.comb += w.refresh.eq((w.phase == _ROW) & (wait == 0))
                with m.If(w.frame_end):
                    m.d.sync += wait.eq(wait + 1)
                    with m.If(wait == -(-timing.rfc // _FRAME) - 1):
                        m.d.sync += wait.eq(0)
                        with m.If((w.owed == 0) & ~w.configured):
                            m.next = "MODE"
                        with m.Elif(w.owed == 0):
                            m.d.sync += w.refresh_wanted.eq(0), refresh_held.eq(0)
                            m.next = "RUN"
            with m.State("MODE"):
                m.d.comb += w.set_mode.eq(w.phase == _ROW)
                with m.If(w.frame_end):
                    m.d.sync += [w.configured.eq(1), w.refresh_wanted.eq(0), refresh_held.eq(0),
                                 w.frames.eq(0)]
                    m.next = "RUN"

    def _words_out(self, m, w):
        """A beat leaves block RAM in cycle 0, and the chip gets it from cycle 1 on."""
        axi, sdram, current = self.axi, self.sdram, w.current
        word = Signal(72, reset_less=True)
        words = Signal(64, reset_less=True)
        masks = Signal(8, init=~0)
        m.d.comb += [
            w.take_word.eq((w.phase == _COLUMN - 1) & w.current_valid & current.write),
            sdram.dq_o.eq(words),
            sdram.dqm.eq(masks),
        ]
        # Block RAM is slow to answer: nothing stands between it and a register.
        m.d.sync += word.eq(w.write_out.data), words.eq(words >> 16)
        with m.If(w.configured):
            m.d.sync += masks.eq(masks >> 2)
        writing = Signal()  # in phase _COLUMN
        m.d.sync += writing.eq(w.take_word & ~current.outside)
        with m.If(w.phase == _COLUMN):
            m.d.sync += words.eq(word), sdram.dq_oe.eq(writing)
        with m.If(writing):
            m.d.sync += masks.eq(~word[64:])
        acknowledgements = w.acknowledgements
        m.d.comb += [
            acknowledgements.w_en.eq(w.column & current.write & w.current_last & current.final),
            acknowledgements.w_data.eq(Cat(current.id, current.outside)),
            acknowledgements.r_en.eq(axi.bready),
            axi.bvalid.eq(acknowledgements.r_rdy),
            Cat(axi.bid, axi.bresp[0]).eq(acknowledgements.r_data),
            axi.bresp[1].eq(axi.bresp[0]),
        ]

    def _words_in(self, m, w):
        """Words become beats; what was asked travels along."""
        axi, current, answers = self.axi, w.current, w.answers
        arrived = Signal(16, reset_less=True)
        beat = Signal(64, reset_less=True)
        m.d.sync += [arrived.eq(self.sdram.dq_i), beat.eq(Cat(beat[16:], arrived))]
        answer = Pipeline(m, w.column & ~current.write, name="answer")
        # Registers: the command, the chip's, those between, arrived, four words.
        asked = answer.delay(1 + CAS_LATENCY + self._io_cycles + 1 + BURST_WORDS, id=current.id,
                             outside=current.outside, last=w.current_last & current.final)
        m.d.comb += [
            answers.w_en.eq(answer.valid),
            answers.w_data.eq(Cat(beat, asked.last, asked.outside, asked.id)),
            answers.r_en.eq(axi.rready),
            axi.rvalid.eq(answers.r_rdy),
            Cat(axi.rdata, axi.rlast, axi.rresp[0], axi.rid).eq(answers.r_data),
            axi.rresp[1].eq(axi.rresp[0]),
        ]
        m.d.sync += Assert(~answer.valid | answers.w_rdy, "an answer found no room")
