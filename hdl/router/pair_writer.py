"""Ids and weights on their way to memory."""

from amaranth import *
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import TOP_K_MAX, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.interface.commands import ENTRY_BYTES

__all__ = ["PAIRS", "PairWriter"]

_ONE = 0x3F800000
"""1 as float32."""

PAIRS = ENTRY_BYTES // 4
"""Pairs that are collected: their ids, and their weights, fill 64 bytes."""


class PairWriter(wiring.Component):
    """Write the ids and the weights of pairs, 64 bytes of each at a time.

    Behind a token's pairs come those of the shared experts, with weight 1. The last 64 bytes are
    with ids of -1 and weights of 0. Throughput: one pair a cycle while 16 are collected, then two
    writes, that are waited for together. Reset: idle; the memory port is flushed with it.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_start : :py:`In(1)`
        Pulse. Not before ``o_idle``, but once more for a second sweep, if the first gave no pair:
        it changes nothing.
    i_tokens, i_ids_address, i_weights_address : :py:`In`
        Taken with ``i_start``.
    i_shared, i_experts : :py:`In`
        Shared experts, and the first of them; hold until ``o_sent``.
    i_pair : :py:`In(stream.Signature(layouts.routed_pair(config)))`
    o_sent, o_idle : :py:`Out(1)`
        Everything is on its way to memory; it is written and acknowledged.
    o_of_weights : :py:`Out(1)`
        What is being written is weights, else ids.
    writer : :py:`Out(layouts.WriteClientSignature(config))`
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "i_start": In(1),
            "i_tokens": In(config.max_tokens.bit_length()),
            "i_ids_address": In(config.address_bits),
            "i_weights_address": In(config.address_bits),
            "i_shared": In(range(TOP_K_MAX)),
            "i_experts": In(config.max_experts.bit_length()),
            "i_pair": In(stream.Signature(layouts.routed_pair(config))),
            "o_sent": Out(1),
            "o_idle": Out(1),
            "o_of_weights": Out(1),
            "writer": Out(layouts.WriteClientSignature(config)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        low = exact_log2(ENTRY_BYTES)
        beats, bits = ENTRY_BYTES // config.port_bytes, 8 * config.port_bytes
        words = bits // 32
        left = Signal(signed(len(self.i_tokens) + 1))  # tokens behind this one
        # A beat's pairs are collected, then its ids and its weights wait for the port, each in its
        # place: nothing comes while they leave.
        collected = [Signal(bits, name=name) for name in ("ids", "weights")]
        places = max(beats, 2)
        full, place, sent = Signal(), Signal(range(places)), Signal(range(places))
        waiting = []
        for name, beat in zip(("ids", "weights"), collected, strict=True):
            kept = memory.Memory(shape=unsigned(bits), depth=places, init=[])
            m.submodules[f"{name}_beats"] = kept
            write, read = kept.write_port(), kept.read_port(domain="comb")
            m.d.comb += [write.en.eq(full), write.addr.eq(place), write.data.eq(beat),
                         read.addr.eq(sent)]
            waiting.append(read.data)
        count = Signal(range(PAIRS))
        of_weights = Signal()
        units = [Signal(config.address_bits - low, name=f"{name}_unit")
                 for name in ("ids", "weights")]
        pair = self.i_pair.payload
        push, own = Signal(), Signal()
        shared = Signal.like(self.i_shared)  # of this token, still to come
        more = Signal()  # shared is not 0
        there, number, weight = Signal(), Signal(32), Signal(32)
        last = Signal()
        m.d.comb += [
            self.writer.request.p.address.eq(
                Cat(C(0, low), Mux(of_weights, units[1], units[0]))),
            self.writer.request.p.beats.eq(beats),
            self.writer.data.payload.eq(Mux(of_weights, waiting[1], waiting[0])),
            self.o_of_weights.eq(of_weights),
        ]
        with m.If(push):
            m.d.sync += [count.eq(count + 1), place.eq(count >> exact_log2(words)), *(
                beat.eq(Cat(beat[32:], word))
                for beat, word in zip(collected, (number, weight), strict=True))]
        m.d.sync += full.eq(push & count[:exact_log2(words)].all())
        m.d.comb += [
            there.eq(left >= 0), own.eq(there & ~more),
            number.eq(C(-1, 32)),
            last.eq(Mux(own, pair.last & (self.i_shared == 0), shared == 1)),
        ]
        with m.If(there & ~own):
            m.d.comb += [number.eq(self.i_experts + (self.i_shared - shared)[:4]),
                         weight.eq(_ONE)]
        with m.Elif(there):
            m.d.comb += weight.eq(pair.weight)
            with m.If(pair.some):
                m.d.comb += number.eq(pair.id)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.o_idle.eq(1), self.o_sent.eq(1)]
                m.d.sync += [units[0].eq(self.i_ids_address[low:]),
                             units[1].eq(self.i_weights_address[low:])]
                with m.If(self.i_start):
                    m.d.sync += left.eq(self.i_tokens - 1)
                    m.next = "COLLECT"
            with m.State("COLLECT"):
                # Behind the last pair, what fills up.
                m.d.comb += [
                    self.i_pair.ready.eq(own),
                    push.eq(Mux(own, self.i_pair.valid, there | (count != 0)))]
                with m.If(push & there):
                    with m.If(last):
                        m.d.sync += left.eq(left - 1)
                    with m.If(~own):
                        m.d.sync += [shared.eq(shared - 1), more.eq(shared != 1)]
                    with m.Elif(pair.last):
                        m.d.sync += [shared.eq(self.i_shared), more.eq(self.i_shared != 0)]
                with m.If(push & (count == PAIRS - 1)):
                    m.next = "REQUEST"
                with m.Elif(~there & (count == 0)):
                    m.next = "IDLE"
            with m.State("REQUEST"):
                m.d.comb += self.writer.request.valid.eq(1)
                with m.If(self.writer.request.ready):
                    m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += self.writer.data.valid.eq(1)
                with m.If(self.writer.data.ready):
                    m.d.sync += sent.eq(Mux(sent == beats - 1, 0, sent + 1))
                    with m.If(sent == beats - 1):
                        m.d.sync += of_weights.eq(~of_weights)
                        m.next = "REQUEST"
                        with m.If(of_weights):
                            m.next = "WAIT"
            with m.State("WAIT"):  # for both
                m.d.comb += self.o_sent.eq(~there)
                with m.If(self.writer.done):
                    m.d.sync += [unit.eq(unit + 1) for unit in units]
                    m.next = "COLLECT"
        return m
