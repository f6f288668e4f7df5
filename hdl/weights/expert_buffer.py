"""Which experts the chip holds leading beats of, and where."""

import functools
import operator

from amaranth import *
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.interface.registers import BUFFER_COUNTERS

__all__ = ["ExpertBuffer", "amount_bits"]


def amount_bits(config: AcceleratorConfig) -> int:
    """Return the bits of a number of beats on all channels that are counted at once."""
    return (config.buffer_beats * config.channels).bit_length()


class ExpertBuffer(wiring.Component):
    """Split requests for weights into what the chip holds and what memory brings.

    ::

        i_request --> [all tags at once] --> [held, missing] --> o_request
                             ^                      |
                 [list of slots, the latest first] <+ to the front

    The beats themselves are in the streamer of each channel, in slots of ``buffer_beats``; as
    images have the same address on all channels, one list is for all. An entry of it is a tag,
    the image's address, how many of its beats are held, how many of these no pass has used, and
    which slot has them. An expert that is used, or brought, goes to the front; one that is brought
    and not there takes the slot of the last. So slots are taken in the order in which they were
    filled or used, which is :class:`moeaccel.golden.expert_buffer.ExpertBuffer`.

    A request that does not ``fill`` is for a pass: what is held comes from the chip. One that
    fills asks for what is missing of the leading ``buffer_beats``, or for nothing. What an
    entry says that it holds may still be on its way: nobody may ask for a pass before all
    streamers are idle.

    After ``i_forget`` all entries leave, one a cycle, and requests wait. Reset: all entries are
    empty, nothing is counted.

    Latency: 4 cycles from a request to ``o_request``. Throughput: a request in 5 cycles.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With an expert buffer.

    Members
    -------
    i_request : :py:`In(stream.Signature(layouts.weight_request(config)))`
    o_request : :py:`Out(stream.Signature(layouts.stream_request(config)))`
    i_forget : :py:`In(1)`
    o_idle : :py:`Out(1)`
        No request is here or offered.
    count_buffer_hits, count_buffer_misses : :py:`Out(1)`
        Pulse: a pass of which something, or nothing, is held.
    count_bytes_buffered, count_bytes_prefetched, count_bytes_wasted : :py:`Out(amount_bits)`
        Beats of all channels, for a cycle: taken from the chip, brought, unused when they left.
    """

    def __init__(self, config: AcceleratorConfig):
        if not config.buffer_slots:
            raise ValueError(f"config must have buffer_slots, and {config.name!r} has none")
        self._config = config
        super().__init__({
            "i_request": In(stream.Signature(layouts.weight_request(config))),
            "o_request": Out(stream.Signature(layouts.stream_request(config))),
            "i_forget": In(1),
            "o_idle": Out(1),
            **{f"count_{name}": Out(amount_bits(config) if name.startswith("bytes") else 1)
               for name in BUFFER_COUNTERS},
        })

    def elaborate(self, platform):
        m = Module()
        config, request, out = self._config, self.i_request, self.o_request
        slots, most = config.buffer_slots, config.buffer_beats
        per_word, port = exact_log2(config.beats_per_word), exact_log2(config.port_bytes)
        beats_of = range(most + 1)
        entry = data.StructLayout({
            "tag": config.address_bits - port, "held": beats_of, "fresh": beats_of,
            "slot": range(slots)})
        entries = [Signal(entry, name=f"entry{i}", init={"slot": i}) for i in range(slots)]
        last = entries[-1]

        # An entry comes to the front, those ahead of its place move back.
        head = Signal(entry)
        moving = Signal(slots)  # what takes the place of the one before it
        for before, one, moves in zip([head, *entries], entries, moving, strict=False):
            with m.If(moves):
                m.d.sync += one.eq(before)

        # The request, the entry that it is about, and what comes of it.
        address = Signal(config.address_bits)
        tag = Signal(config.address_bits - port)
        beats = Signal(32 + per_word)
        before = Signal.like(beats)  # beats of the image ahead of these
        fill = Signal()
        wanted = Signal(beats_of)  # of the leading beats
        match = Signal(slots)
        old = Signal(entry)
        ahead = Signal(slots)  # the places up to the entry's
        forgetting = Signal()
        left = Signal(range(slots + 1))
        m.d.sync += [getattr(self, f"count_{name}").eq(0) for name in BUFFER_COUNTERS]
        with m.If(self.i_forget):
            m.d.sync += forgetting.eq(1)

        def count(name, beats):
            return getattr(self, f"count_{name}").eq(beats << exact_log2(config.channels))

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [
                    self.o_idle.eq(~request.valid),
                    request.ready.eq(~forgetting & ~self.i_forget),
                ]
                m.d.sync += [
                    left.eq(slots), fill.eq(request.p.fill),
                    address.eq(request.p.address), beats.eq(request.p.words << per_word)]
                ahead_of_it = C(0)
                if config.hidden_banks > 1:
                    ahead_of_it = request.p.before << per_word
                    m.d.sync += before.eq(ahead_of_it)
                m.d.sync += tag.eq((request.p.address >> port) - ahead_of_it)
                with m.If(forgetting):
                    m.next = "FORGET"
                with m.Elif(request.valid & request.ready):
                    m.next = "MATCH"
            with m.State("MATCH"):
                m.d.sync += [
                    match.eq(Cat((one.tag == tag) & (one.held != 0) for one in entries)),
                    wanted.eq(Mux(beats > most, most, beats[:len(wanted)])),
                ]
                m.next = "CHOOSE"
            with m.State("CHOOSE"):
                m.d.sync += [
                    old.eq(functools.reduce(operator.or_, (
                        one.as_value() & found.replicate(entry.size)
                        for one, found in zip(entries, match, strict=True)))),
                    ahead.eq(Cat(match[i:].any() for i in range(slots))),
                ]
                with m.If(fill & ~match.any()):  # the last leaves
                    m.d.sync += [old.slot.eq(last.slot), ahead.eq(~0),
                                 count("bytes_wasted", last.fresh)]
                m.next = "SPLIT"
            with m.State("SPLIT"):
                there, missing = Signal(beats_of), Signal(beats_of)
                rest = Signal(beats_of)  # what is held from the request's first beat on
                first = before == 0
                m.d.comb += [
                    rest.eq(Mux(before < old.held, old.held - before, 0)),
                    there.eq(Mux(rest < beats, rest, beats)),
                    missing.eq(Mux(wanted > old.held, wanted - old.held, 0)),
                    head.tag.eq(tag), head.slot.eq(old.slot),
                    head.held.eq(old.held + Mux(fill, missing, 0)),
                    head.fresh.eq(Mux(fill, old.fresh + missing, 0)),
                    moving.eq(Mux(fill | first, ahead, 0)),
                ]
                skipped = Mux(fill, old.held, there)  # beats ahead of those that memory brings
                m.d.sync += [
                    out.p.address.eq(address + (skipped << port)),
                    out.p.beats.eq(Mux(fill, missing, beats - there)),
                    out.p.fill.eq(fill),
                    out.p.held.eq(Mux(fill, 0, there)),
                    out.p.place.eq(Cat(
                        Mux(fill, old.held, before)[:exact_log2(most)], old.slot)),
                ]
                m.next = "OFFER"
                with m.If(fill):
                    m.d.sync += count("bytes_prefetched", missing)
                    with m.If(missing == 0):
                        m.next = "IDLE"
                with m.Else():
                    m.d.sync += [
                        count("bytes_buffered", there),
                        self.count_buffer_hits.eq(first & (there != 0)),
                        self.count_buffer_misses.eq(first & (there == 0)),
                    ]
            with m.State("OFFER"):
                m.d.comb += out.valid.eq(1)
                with m.If(out.ready):
                    m.next = "IDLE"
            with m.State("FORGET"):
                m.d.comb += [head.slot.eq(last.slot), moving.eq(~0)]
                m.d.sync += [left.eq(left - 1), count("bytes_wasted", last.fresh)]
                with m.If(left == 1):
                    m.d.sync += forgetting.eq(0)
                    m.next = "IDLE"
        return m
