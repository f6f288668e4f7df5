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
        timing, axi, sdram = self._timing, self.axi, self.sdram
        beat_bits = (CHIP_BYTES // 8 - 1).bit_length()
        request = data.StructLayout({
            "id": self._id_width, "length": 8, "start": _CHUNK_BITS,
            "block": beat_bits - _CHUNK_BITS, "outside": 1,
        })
        chunk = data.StructLayout({
            "id": self._id_width, "write": 1, "outside": 1, "final": 1,
            "start": _CHUNK_BITS, "end": _CHUNK_BITS,
            "column": _BLOCK_BITS, "bank": BANK_BITS, "row": ROW_BITS,
        })

        phase = Signal(range(_FRAME))
        frame_end = Signal()
        m.d.sync += phase.eq(phase + 1)
        m.d.comb += frame_end.eq(phase == _FRAME - 1)

        # -- queues --------------------------------------------------------------------------------
        def address_queue(channel):
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

        reads, read = address_queue("ar")
        writes, write = address_queue("aw")

        m.submodules.acknowledgements = acknowledgements = fifo.SyncFIFO(
            width=self._id_width + 1, depth=_QUEUE)
        m.submodules.answers = answers = fifo.SyncFIFO(width=self._id_width + 2 + 64, depth=_QUEUE)

        # What is read while it is written is not used.
        m.submodules.write_data = write_data = memory.Memory(
            shape=72, depth=_WRITE_BEATS, init=[], attrs={"no_rw_check": True})
        write_in, write_out = write_data.write_port(), write_data.read_port()
        write_level = Signal(range(_WRITE_BEATS + 1))
        whole_bursts = Signal(range(_WRITE_BEATS + 1))
        take_write, take_word = Signal(), Signal()
        m.d.comb += [
            write_in.en.eq(axi.wvalid & axi.wready),
            write_in.data.eq(Cat(axi.wdata, axi.wstrb)),
        ]
        # Ready comes from a register, hence the margin.
        m.d.sync += [
            write_in.addr.eq(write_in.addr + write_in.en),
            write_out.addr.eq(write_out.addr + take_word),
            write_level.eq(write_level + write_in.en - take_word),
            axi.wready.eq(write_level < _WRITE_BEATS - 4),
            whole_bursts.eq(whole_bursts + (write_in.en & axi.wlast) - take_write),
        ]

        # -- burst: reads and writes take turns, once a frame --------------------------------------
        burst = Signal(request)
        burst_valid = Signal()
        burst_write = Signal()
        burst_new = Signal()
        burst_end = Signal(_CHUNK_BITS)
        burst_more = Signal(9 - _CHUNK_BITS)  # chunks after this one
        write_ready = Signal()
        write_next = Signal()
        may_take = Signal()
        take_read = Signal()
        # Since the latest burst was taken, in cycle 1, these have settled.
        m.d.sync += [
            write_ready.eq(writes.r_rdy & (whole_bursts != 0)
                           & (acknowledgements.w_level < _QUEUE // 2)),
            write_next.eq(write_ready & ~(reads.r_rdy & burst_write)),
        ]
        m.d.comb += [
            may_take.eq((phase == 1) & ~burst_valid),
            take_write.eq(may_take & write_next),
            take_read.eq(may_take & reads.r_rdy & ~write_next),
            reads.r_en.eq(take_read),
            writes.r_en.eq(take_write),
        ]
        m.d.sync += burst_new.eq(take_read | take_write)
        with m.If(take_read | take_write):
            m.d.sync += [
                burst_valid.eq(1),
                burst_write.eq(write_next),
                burst.eq(Mux(write_next, write, read)),
            ]
        with m.If(burst_new):
            m.d.sync += Cat(burst_end, burst_more).eq(burst.start + burst.length)

        # -- next and current chunk ----------------------------------------------------------------
        next_chunk, next_valid = Signal(chunk), Signal()
        current, current_valid = Signal(chunk), Signal()
        current_last = Signal()
        advance, may_advance = Signal(), Signal()
        last_chunk = Signal()
        m.d.comb += [
            advance.eq(frame_end & may_advance),
            current_last.eq(current.start == current.end),
            last_chunk.eq(burst_more == 0),
        ]
        with m.If(frame_end & (may_advance | ~next_valid)):
            m.d.sync += [
                next_valid.eq(burst_valid),
                next_chunk.id.eq(burst.id),
                next_chunk.write.eq(burst_write),
                next_chunk.outside.eq(burst.outside),
                next_chunk.final.eq(last_chunk),
                next_chunk.start.eq(burst.start),
                next_chunk.end.eq(burst_end | ~last_chunk.replicate(_CHUNK_BITS)),
                Cat(next_chunk.column, next_chunk.bank, next_chunk.row).eq(burst.block),
            ]
            with m.If(burst_valid):
                # Within 4 KiB the row stays the same.
                count = burst.block[:_BLOCK_BITS + BANK_BITS]
                m.d.sync += [
                    burst_valid.eq(~last_chunk),
                    burst.start.eq(0),
                    count.eq(count + 1),
                    burst_more.eq(burst_more - 1),
                ]
        with m.If(frame_end):
            m.d.sync += [
                current_valid.eq(may_advance | (current_valid & ~current_last)),
                current.start.eq(current.start + 1),
            ]
        with m.If(advance):
            m.d.sync += current.eq(next_chunk)

        # -- open rows: looked up in cycles 0 and 1 of a frame -------------------------------------
        m.submodules.rows = rows = memory.Memory(shape=ROW_BITS, depth=1 << BANK_BITS, init=[])
        rows_write, rows_read = rows.write_port(), rows.read_port(domain="comb")
        is_open = Signal(1 << BANK_BITS)
        found_open, found_row, hit, in_use = Signal(), Signal(ROW_BITS), Signal(), Signal()
        wanted = Signal()  # next_chunk is there, in the chip, and no refresh comes before it
        refresh_wanted = Signal(init=1)
        m.d.comb += [
            rows_read.addr.eq(next_chunk.bank),
            rows_write.addr.eq(next_chunk.bank),
            rows_write.data.eq(next_chunk.row),
        ]
        m.d.sync += [
            found_open.eq(is_open.bit_select(next_chunk.bank, 1)),
            found_row.eq(rows_read.data),
            hit.eq(found_open & (found_row == next_chunk.row)),
            in_use.eq(current_valid & (current.bank == next_chunk.bank)),
            wanted.eq(next_valid & ~next_chunk.outside & ~refresh_wanted),
        ]

        # -- what the next chunk needs: an open row, room for its answers, a free bus --------------
        reserved = Signal(range(_QUEUE + 1))
        room = Signal()
        released = Signal()
        m.d.sync += [
            released.eq(axi.rvalid & axi.rready),
            room.eq(reserved <= _QUEUE - (1 << _CHUNK_BITS)),
            # Settled in cycle 2, used in cycle 3: a row being opened in cycle 2 is in time.
            may_advance.eq(
                next_valid & ~refresh_wanted & (~current_valid | current_last)
                & (next_chunk.outside | hit | ~found_open)
                & Mux(next_chunk.write, ~current_valid | current.write, room)),
        ]
        reserve = Signal(range(1 + (1 << _CHUNK_BITS)))
        with m.If(advance & ~next_chunk.write):
            m.d.comb += reserve.eq(next_chunk.end - next_chunk.start + 1)
        m.d.sync += reserved.eq(reserved + reserve - released)

        # -- refreshes owed ------------------------------------------------------------------------
        interval = timing.refresh // _FRAME
        frames = Signal(range(max(interval, timing.power_up // _FRAME + 2)))
        configured = Signal()
        refresh_due, refresh = Signal(), Signal()
        owed = Signal(range(2 * _POSTPONED + 1), init=POWER_UP_REFRESHES)
        nothing_to_do = Signal()
        refresh_held = Signal(init=1)
        m.d.sync += [
            nothing_to_do.eq(~(current_valid | next_valid | burst_valid | reads.r_rdy
                               | write_ready)),
            owed.eq(owed + refresh_due - refresh),
        ]
        m.d.comb += refresh_due.eq(configured & frame_end & (frames == interval - 1))
        with m.If(frame_end):
            m.d.sync += frames.eq(frames + 1)
        with m.If(refresh_due):
            m.d.sync += frames.eq(0)

        # -- commands ------------------------------------------------------------------------------
        command = Signal(3, init=SdramCommand.NOP)
        activate, precharge, precharge_all, set_mode = Signal(), Signal(), Signal(), Signal()
        column = Signal()
        m.d.comb += [
            Cat(sdram.we_n, sdram.cas_n, sdram.ras_n).eq(command),
            column.eq((phase == _COLUMN) & current_valid),
            activate.eq((phase == _ROW) & wanted & ~found_open),
            precharge.eq((phase == _PRECHARGE) & wanted & found_open & ~hit & ~in_use),
            rows_write.en.eq(activate),
        ]
        m.d.sync += [sdram.cke.eq(1), sdram.cs_n.eq(0), command.eq(SdramCommand.NOP)]
        with m.If(column & ~current.outside):
            m.d.sync += command.eq(Mux(current.write, SdramCommand.WRITE, SdramCommand.READ))
        with m.If(activate):
            m.d.sync += [
                command.eq(SdramCommand.ACTIVATE),
                is_open.bit_select(next_chunk.bank, 1).eq(1),
            ]
        with m.If(precharge):
            m.d.sync += [
                command.eq(SdramCommand.PRECHARGE),
                is_open.bit_select(next_chunk.bank, 1).eq(0),
            ]
        with m.If(precharge_all):
            m.d.sync += command.eq(SdramCommand.PRECHARGE), is_open.eq(0)
        with m.If(refresh):
            m.d.sync += command.eq(SdramCommand.REFRESH)
        with m.If(set_mode):
            m.d.sync += command.eq(SdramCommand.MODE)
        with m.Switch(phase):
            with m.Case(_COLUMN):
                m.d.sync += [
                    sdram.ba.eq(current.bank),
                    sdram.a.eq(Cat(C(0, 2), current.start, current.column)),
                ]
            with m.Case(_ROW):
                m.d.sync += [
                    sdram.ba.eq(Mux(configured, next_chunk.bank, 0)),
                    sdram.a.eq(Mux(configured, next_chunk.row, MODE_REGISTER)),
                ]
            with m.Case(_PRECHARGE):
                m.d.sync += sdram.a[10].eq(precharge_all)  # the bank is still next_chunk's

        # -- power-up and refresh ------------------------------------------------------------------
        wait = Signal(range(max(2, -(-timing.rfc // _FRAME))))
        with m.FSM(name="sequence"):
            with m.State("POWER_UP"):
                with m.If(frame_end & (frames == timing.power_up // _FRAME + 1)):
                    m.d.comb += precharge_all.eq(1)
                    m.d.sync += frames.eq(0)
                    m.next = "REFRESH"
            with m.State("RUN"):
                with m.If(frame_end):
                    m.d.sync += [
                        refresh_wanted.eq((owed >= _POSTPONED) | ((owed != 0) & nothing_to_do)
                                          | refresh_wanted),
                        refresh_held.eq(refresh_wanted),
                    ]
                    # A row that was opened just before refresh_wanted has had its time.
                    with m.If(refresh_wanted & refresh_held & ~current_valid):
                        m.d.comb += precharge_all.eq(1)
                        m.next = "REFRESH"
            with m.State("REFRESH"):
                m.d.comb += refresh.eq((phase == _ROW) & (wait == 0))
                with m.If(frame_end):
                    m.d.sync += wait.eq(wait + 1)
                    with m.If(wait == -(-timing.rfc // _FRAME) - 1):
                        m.d.sync += wait.eq(0)
                        with m.If((owed == 0) & ~configured):
                            m.next = "MODE"
                        with m.Elif(owed == 0):
                            m.d.sync += refresh_wanted.eq(0), refresh_held.eq(0)
                            m.next = "RUN"
            with m.State("MODE"):
                m.d.comb += set_mode.eq(phase == _ROW)
                with m.If(frame_end):
                    m.d.sync += [configured.eq(1), refresh_wanted.eq(0), refresh_held.eq(0),
                                 frames.eq(0)]
                    m.next = "RUN"

        # -- words out: a beat leaves its queue in cycle 0, and the chip gets it from cycle 1 on ---
        word = Signal(72, reset_less=True)
        words = Signal(64, reset_less=True)
        masks = Signal(8, init=~0)
        m.d.comb += [
            take_word.eq((phase == _COLUMN - 1) & current_valid & current.write),
            sdram.dq_o.eq(words),
            sdram.dqm.eq(masks),
        ]
        # Block RAM is slow to answer: nothing stands between it and a register.
        m.d.sync += word.eq(write_out.data), words.eq(words >> 16)
        with m.If(configured):
            m.d.sync += masks.eq(masks >> 2)
        writing = Signal()  # in phase _COLUMN
        m.d.sync += writing.eq(take_word & ~current.outside)
        with m.If(phase == _COLUMN):
            m.d.sync += words.eq(word), sdram.dq_oe.eq(writing)
        with m.If(writing):
            m.d.sync += masks.eq(~word[64:])
        m.d.comb += [
            acknowledgements.w_en.eq(column & current.write & current_last & current.final),
            acknowledgements.w_data.eq(Cat(current.id, current.outside)),
            acknowledgements.r_en.eq(axi.bready),
            axi.bvalid.eq(acknowledgements.r_rdy),
            Cat(axi.bid, axi.bresp[0]).eq(acknowledgements.r_data),
            axi.bresp[1].eq(axi.bresp[0]),
        ]

        # -- words in: what was asked travels along ------------------------------------------------
        arrived = Signal(16, reset_less=True)
        beat = Signal(64, reset_less=True)
        m.d.sync += [arrived.eq(sdram.dq_i), beat.eq(Cat(beat[16:], arrived))]
        answer = Pipeline(m, column & ~current.write, name="answer")
        # Registers: the command, the chip's, those between, arrived, four words.
        asked = answer.delay(1 + CAS_LATENCY + self._io_cycles + 1 + BURST_WORDS, id=current.id,
                             outside=current.outside, last=current_last & current.final)
        m.d.comb += [
            answers.w_en.eq(answer.valid),
            answers.w_data.eq(Cat(beat, asked.last, asked.outside, asked.id)),
            answers.r_en.eq(axi.rready),
            axi.rvalid.eq(answers.r_rdy),
            Cat(axi.rdata, axi.rlast, axi.rresp[0], axi.rid).eq(answers.r_data),
            axi.rresp[1].eq(axi.rresp[0]),
        ]
        m.d.sync += Assert(~answer.valid | answers.w_rdy, "an answer found no room")
        return m
