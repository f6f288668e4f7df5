"""The part of the expert buffer that a channel has: leading beats of images."""

from amaranth import *
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.unchecked_memory import unchecked_memory

__all__ = ["BeatBuffer"]


class BeatBuffer(wiring.Component):
    """Put beats that are held ahead of those that memory brings, or keep these.

    ::

        i_part --> [queue] --> {held, place, beats, fill}
        i_beat --+------------------------------------------> o_beat
                 +--> [buffer_slots x buffer_beats] --> held -->+

    Requests are served one after the other: the ``held`` beats from ``place`` on, then ``beats`` of
    ``i_beat``, as they come; of one that fills, ``beats`` of ``i_beat`` are stored from ``place``
    on, and nothing goes out. What is stored outlives a reset, but who resets it forgets what it
    was.

    Latency: 4 cycles from ``i_part`` to the first beat that is held; beats of memory pass in the
    cycle in which they come. Throughput: one beat a cycle; a cycle without one between
    requests. Stalls for ``o_beat.ready`` and, by ``i_part.ready``, when as many requests wait as
    there are passes ahead, so that it never holds up a pass.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With an expert buffer.

    Members
    -------
    i_part : :py:`In(stream.Signature(layouts.stream_part(config)))`
        Requests in the order of their beats; of at least one beat.
    i_beat, o_beat : :py:`In(stream.Signature(8 * config.port_bytes))` and :py:`Out`
    o_idle : :py:`Out(1)`
        No request is here.
    """

    def __init__(self, config: AcceleratorConfig):
        if not config.buffer_slots:
            raise ValueError(f"config must have buffer_slots, and {config.name!r} has none")
        self._config = config
        beat = stream.Signature(8 * config.port_bytes)
        super().__init__({
            "i_part": In(stream.Signature(layouts.stream_part(config))),
            "i_beat": In(beat),
            "o_beat": Out(beat),
            "o_idle": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        beat, out = self.i_beat, self.o_beat
        shape = layouts.stream_part(config)
        m.submodules.parts = parts = fifo.SyncFIFOBuffered(
            width=shape.size, depth=config.slot_banks * config.hidden_banks)
        write, read = unchecked_memory(
            m, "beats", 8 * config.port_bytes, config.buffer_slots << exact_log2(
                config.buffer_beats))
        now = Signal(shape)
        held = Signal()  # a beat of the memory here is at its output
        fetch, taken = Signal(), Signal()
        m.d.comb += [
            self.i_part.ready.eq(parts.w_rdy), parts.w_en.eq(self.i_part.valid),
            parts.w_data.eq(self.i_part.payload),
            write.addr.eq(now.place), write.data.eq(beat.payload),
            read.addr.eq(now.place), read.en.eq(fetch),
        ]
        with m.If(fetch | write.en):
            m.d.sync += now.place.eq(now.place + 1)
        with m.If(beat.valid & beat.ready):
            m.d.sync += now.beats.eq(now.beats - 1)
        with m.If(fetch | taken):
            m.d.sync += held.eq(fetch)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [parts.r_en.eq(1), self.o_idle.eq(parts.level == 0)]
                with m.If(parts.r_rdy):
                    m.d.sync += now.eq(parts.r_data)
                    m.next = "MEMORY"
                    with m.If(data.View(shape, parts.r_data).held != 0):
                        m.next = "HELD"
            with m.State("HELD"):
                m.d.comb += [
                    out.valid.eq(held), out.payload.eq(read.data), taken.eq(held & out.ready),
                    fetch.eq((now.held != 0) & (~held | taken)),
                ]
                m.d.sync += now.held.eq(now.held - fetch)
                with m.If(taken & (now.held == 0)):
                    m.next = "MEMORY"
                    with m.If(now.beats == 0):
                        m.next = "IDLE"
            with m.State("MEMORY"):
                m.d.comb += [
                    out.valid.eq(beat.valid & ~now.fill), out.payload.eq(beat.payload),
                    beat.ready.eq(out.ready | now.fill), write.en.eq(beat.valid & now.fill),
                ]
                with m.If(beat.valid & beat.ready & (now.beats == 1)):
                    m.next = "IDLE"
        return m
