"""An AXI4 master in hardware that reads and writes whole blocks as fast as the slave allows."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.hdl.memory.axi import AXI4Signature

__all__ = ["AxiTraffic"]

BEATS = 64
INCR = 1


class AxiTraffic(wiring.Component):
    """Write and read a region in bursts of 512 bytes, in linear or random order, and check it.

    Every beat holds a number made of its address, so reads are checked whatever was written in
    between. Change ``i_random`` only when nothing is under way.

    Parameters
    ----------
    region : :class:`int`
        Bytes, a power of two from 1 KiB to 32 MiB.

    Members
    -------
    axi : :py:`Out(AXI4Signature(32, 64, id_width))`
    i_base : :py:`In(32)`
        A multiple of the region's size.
    i_read, i_write, i_random : :py:`In(1)`
    o_read_beats, o_written_bursts : :py:`Out(32)`
        Since reset.
    o_pending : :py:`Out(16)`
        Bursts that are not finished.
    o_wrong : :py:`Out(1)`
        A beat was not what it should be, or an answer was an error.
    """

    def __init__(self, *, region, id_width):
        self._burst_bits = exact_log2(region // (8 * BEATS))
        super().__init__({
            "axi": Out(AXI4Signature(32, 64, id_width)),
            "i_base": In(32),
            "i_read": In(1),
            "i_write": In(1),
            "i_random": In(1),
            "o_read_beats": Out(32),
            "o_written_bursts": Out(32),
            "o_pending": Out(16),
            "o_wrong": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        axi = self.axi

        def sequence(step, name):
            """Return the number of a burst, which changes after each ``step``."""
            count = Signal(self._burst_bits, name=f"{name}_count")
            noise = Signal(23, init=1, name=f"{name}_noise")
            with m.If(step):
                m.d.sync += count.eq(count + 1)
                # x^23 + x^18 + 1, several steps at once.
                state = list(noise)
                for _ in range(self._burst_bits):
                    state = [state[22] ^ state[17], *state[:22]]
                m.d.sync += noise.eq(Cat(state))
            return Mux(self.i_random, noise[:self._burst_bits], count)

        def address(number):
            return self.i_base + (number << exact_log2(8 * BEATS))

        def content(number, beat):
            place = Cat(beat, number, self.i_base[20:])
            return Cat(place * 0x9E3779B1, ~place)[:64]

        read, written = axi.arvalid & axi.arready, axi.awvalid & axi.awready
        r_beat, w_beat = Signal(range(BEATS)), Signal(range(BEATS))
        last_read, last_sent = axi.rvalid & axi.rready & axi.rlast, \
            axi.wvalid & axi.wready & axi.wlast
        m.d.comb += [
            axi.arvalid.eq(self.i_read & ~self.o_pending[10]),
            axi.araddr.eq(address(sequence(read, "ar"))),
            axi.awvalid.eq(self.i_write & ~self.o_pending[10]),
            axi.awaddr.eq(address(sequence(written, "aw"))),
            axi.wdata.eq(content(sequence(last_sent, "w"), w_beat)),
            axi.wstrb.eq(~0),
            axi.wlast.eq(w_beat == BEATS - 1),
            axi.rready.eq(1),
            axi.bready.eq(1),
        ]
        for channel in ("ar", "aw"):
            m.d.comb += [
                getattr(axi, f"{channel}len").eq(BEATS - 1),
                getattr(axi, f"{channel}size").eq(3),
                getattr(axi, f"{channel}burst").eq(INCR),
            ]
        # Data follows its address: as many bursts as addresses have gone out.
        to_send = Signal(16)
        m.d.comb += axi.wvalid.eq(to_send != 0)
        m.d.sync += [
            to_send.eq(to_send + written - last_sent),
            w_beat.eq(w_beat + (axi.wvalid & axi.wready)),
            self.o_pending.eq(self.o_pending + read + written - last_read - axi.bvalid),
            self.o_written_bursts.eq(self.o_written_bursts + axi.bvalid),
        ]
        expected = content(sequence(last_read, "r"), r_beat)
        with m.If(axi.rvalid):
            m.d.sync += r_beat.eq(r_beat + 1), self.o_read_beats.eq(self.o_read_beats + 1)
            with m.If((axi.rdata != expected) | axi.rresp.any()
                      | (axi.rlast != (r_beat == BEATS - 1))):
                m.d.sync += self.o_wrong.eq(1)
        with m.If(axi.bvalid & axi.bresp.any()):
            m.d.sync += self.o_wrong.eq(1)
        return m
