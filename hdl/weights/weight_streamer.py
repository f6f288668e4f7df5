"""Reads the weight stream: bursts far ahead, a FIFO of beats, a gearbox to array words."""

from itertools import pairwise

from amaranth import *
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.weights.beat_buffer import BeatBuffer

__all__ = ["WeightStreamer"]


class WeightStreamer(wiring.Component):
    """Turn requests for array words into bursts, far ahead of their use, and bursts into words.

    ::

        i_request --> [pending] --> [split into bursts] --(credits)--> reader.request
                                                                            |
        o_word <-- [gearbox: beats_per_word] <-- [beat FIFO, read_ahead_beats] <-- reader.data

    With an expert buffer there is a BeatBuffer between FIFO and gearbox, which puts the beats that
    are held ahead of those of memory; bursts are asked for only for these, meanwhile.

    A burst is requested as soon as the FIFO has room for all of it, what is already on its way
    included: the memory's answers are never refused. Bursts are as long as
    ``config.max_burst_beats`` allows and end at multiples of it, so none crosses a 4 KiB page. The
    bursts of one request follow those of the one before without a gap, one in BURST_CYCLES; one
    request is split while another waits, so what the next pass needs is fetched while this one is
    used.

    Throughput: one beat per cycle and one word per ``config.beats_per_word`` cycles, sustained for
    every memory latency up to ``config.read_ahead_beats - 2 * config.max_burst_beats``. Latency
    from the last beat of a word to ``o_word.valid``: 2 cycles if a beat is a word, else 3. Stalls
    only for credits, for ``reader.request.ready`` and for ``o_word.ready``. Reset drops everything:
    it must wait until the memory owes no beats (``o_outstanding`` is 0) or the port discards them.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_request : :py:`In(stream.Signature(layouts.stream_request(config)))`
        A linear read of ``words`` (at least 1) array words from a byte address, a multiple of
        ``port_bytes``; with an expert buffer, of beats there and in memory.
    reader : :py:`Out(layouts.ReadClientSignature(config))`
    o_word : :py:`Out(stream.Signature(8 * config.word_bytes))`
    o_outstanding : :py:`Out(range(config.read_ahead_beats + 1))`
        Beats asked of memory that have not come yet.
    o_idle : :py:`Out(1)`
        Nothing is requested, outstanding or stored.
    """

    BURST_CYCLES = 3
    """Cycles between bursts, at least: measure one, compare with the credits, grant."""

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "i_request": In(stream.Signature(layouts.stream_request(config))),
            "reader": Out(layouts.ReadClientSignature(config)),
            "o_word": Out(stream.Signature(8 * config.word_bytes)),
            "o_outstanding": Out(range(config.read_ahead_beats + 1)),
            "o_idle": Out(1),
        })

    @property
    def config(self):
        """Configuration."""
        return self._config

    def elaborate(self, platform):
        config = self._config
        m = Module()
        depth, burst = config.read_ahead_beats, config.max_burst_beats
        beat_shift, burst_bits = exact_log2(config.port_bytes), exact_log2(burst)
        request = self.reader.request

        # -- requests: one waits, one is split ----------------------------------------------------
        pending = Signal(self.i_request.payload.shape())
        pending_valid = Signal()
        active = Signal()
        offset = Signal(burst_bits)  # of the next beat within its aligned burst
        block = Signal(config.address_bits - beat_shift - burst_bits)
        words_to_beats = exact_log2(config.beats_per_word)
        left = Signal(32 + words_to_beats)
        load = Signal()
        m.d.comb += self.i_request.ready.eq(~pending_valid)
        with m.If(~pending_valid):
            m.d.sync += [pending_valid.eq(self.i_request.valid), pending.eq(self.i_request.payload)]
        with m.Elif(load):
            m.d.sync += pending_valid.eq(0)
        asked = self.i_request.p
        buffer = BeatBuffer(config) if config.buffer_slots else None
        if buffer is not None:
            m.submodules.buffer = buffer
            some, of_memory, more = Cat(asked.held, asked.beats), pending.beats, pending.beats != 0
            told = buffer.i_part.ready
            m.d.comb += [buffer.i_part.valid.eq(load),
                         *(buffer.i_part.p[name].eq(pending[name])
                           for name in layouts.stream_part(config).members)]
        else:
            some, of_memory, more = asked.words, pending.words << words_to_beats, 1
            told = 1
        with m.If(self.i_request.valid & self.i_request.ready):
            m.d.sync += [
                Assert(some != 0, "a request must be for at least one word"),
                Assert(asked.address[:beat_shift] == 0,
                       "an address must be a multiple of port_bytes"),
            ]

        # A burst takes BURST_CYCLES: measure it, see that it fits, grant it.
        measured, fits = Signal(), Signal()
        room, next_room = Signal(range(burst + 1)), Signal(range(burst + 1))
        beats = Signal(range(burst + 1))
        last, next_last = Signal(), Signal()
        grant = Signal()
        m.d.comb += [
            next_room.eq(burst - offset),  # beats to the end of this aligned burst
            next_last.eq(left <= next_room),
            load.eq(pending_valid & (~active | (grant & last)) & told),
        ]
        m.d.sync += measured.eq(active & ~grant)
        with m.If(~measured):
            m.d.sync += [room.eq(next_room), last.eq(next_last),
                         beats.eq(Mux(next_last, left[:len(beats)], next_room))]

        # -- credits: free beats of the FIFO that nothing was requested for -----------------------
        fetch = Signal()  # a beat leaves the FIFO's memory
        fetched = Signal()
        credits = Signal(range(depth + 1), init=depth)
        m.d.comb += grant.eq(fits & ~request.valid)
        m.d.sync += [
            fits.eq(measured & ~grant & (credits >= beats)),
            fetched.eq(fetch),
            credits.eq(credits - Mux(grant, beats, 0) + fetched),
        ]

        with m.If(grant):
            m.d.sync += [left.eq(left - room), block.eq(block + 1), offset.eq(0)]
            with m.If(last):
                m.d.sync += active.eq(0)
        with m.If(load):
            m.d.sync += [
                active.eq(more),
                Cat(offset, block).eq(pending.address >> beat_shift),
                left.eq(of_memory),
            ]

        with m.If(request.ready):
            m.d.sync += request.valid.eq(0)
        with m.If(grant):
            m.d.sync += [
                request.valid.eq(1),
                request.p.address.eq(Cat(C(0, beat_shift), offset, block)),
                request.p.beats.eq(beats),
            ]

        outstanding = Signal(range(depth + 1))
        accepted = request.valid & request.ready
        m.d.sync += outstanding.eq(
            outstanding + Mux(accepted, request.p.beats[:len(beats)], 0) - self.reader.valid)
        m.d.comb += self.o_outstanding.eq(outstanding)

        # -- beat FIFO ----------------------------------------------------------------------------
        m.submodules.beats = beat_memory = memory.Memory(
            shape=8 * config.port_bytes, depth=depth, init=[],
            attrs={"no_rw_check": 1})  # a word is never read in the cycle in which it is written
        write, read = beat_memory.write_port(), beat_memory.read_port()
        head = Signal(range(2 * depth))  # one bit more than an address: full and empty differ
        tail = Signal(range(2 * depth))
        beat_valid, beat_taken = Signal(), Signal()
        m.d.comb += [
            write.addr.eq(tail[:-1]), write.data.eq(self.reader.data),
            write.en.eq(self.reader.valid),
            read.addr.eq(head[:-1]), read.en.eq(fetch),
            fetch.eq((head != tail) & (~beat_valid | beat_taken)),
        ]
        with m.If(self.reader.valid):
            m.d.sync += [
                tail.eq(tail + 1),
                Assert(outstanding != 0, "memory brought a beat that nobody asked for"),
            ]
        with m.If(fetch):
            m.d.sync += head.eq(head + 1)
        with m.If(fetch | beat_taken):
            m.d.sync += beat_valid.eq(fetch)

        # -- gearbox ------------------------------------------------------------------------------
        word, beat = self.o_word, read.data
        gets, taken = beat_valid, beat_taken  # a beat is there, and leaves
        if buffer is not None:
            gets, beat, taken = buffer.o_beat.valid, buffer.o_beat.payload, buffer.o_beat.ready
            m.d.comb += [buffer.i_beat.valid.eq(beat_valid), buffer.i_beat.payload.eq(read.data),
                         beat_taken.eq(beat_valid & buffer.i_beat.ready)]
        if config.beats_per_word == 1:
            m.d.comb += [word.valid.eq(gets), word.payload.eq(beat), taken.eq(gets & word.ready)]
            busy = gets
        else:
            index = Signal(range(config.beats_per_word))
            parts = [Signal(8 * config.port_bytes, name=f"part{i}", reset_less=True)
                     for i in range(config.beats_per_word)]
            m.d.comb += [word.payload.eq(Cat(parts)),
                         taken.eq(gets & (~word.valid | word.ready))]
            with m.If(word.ready):
                m.d.sync += word.valid.eq(0)
            with m.If(taken):
                m.d.sync += [index.eq(index + 1),
                             word.valid.eq(index == config.beats_per_word - 1)]
                # Shifted, for a beat that went to any of the parts would have to reach them all.
                m.d.sync += [part.eq(after) for part, after in pairwise([*parts, beat])]
            busy = gets | word.valid | (index != 0)
        if buffer is not None:
            busy = busy | ~buffer.o_idle

        m.d.sync += self.o_idle.eq(~(self.i_request.valid | pending_valid | active | request.valid
                                     | (credits != depth) | busy))
        return m
