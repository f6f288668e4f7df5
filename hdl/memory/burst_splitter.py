"""Linear requests become bursts that AXI4 allows."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl.layouts import burst, read_request


class BurstSplitter(wiring.Component):
    """Cut a linear request into bursts that stay within one aligned block of max_burst_beats.

    Blocks divide 4 KiB, so no burst crosses a page, and an address never needs a long addition:
    after the first burst only the block number counts up. ``burst`` is announced in the cycle after
    the request is accepted, and may be taken from the next one on, one a cycle; the next request
    is accepted in the cycle after the last of them. Reset, and ``drop``, forget the request.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Port width, burst length, address width.

    Members
    -------
    request : :py:`In(stream.Signature(read_request(config)))`
    burst : :py:`Out(stream.Signature(burst(config)))`
    drop : :py:`In(1)`
        No request is accepted meanwhile.
    """

    def __init__(self, config: AcceleratorConfig):
        self._config = config
        super().__init__({
            "request": In(stream.Signature(read_request(config))),
            "burst": Out(stream.Signature(burst(config))),
            "drop": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        index = exact_log2(config.max_burst_beats)
        address = self.request.payload.address[exact_log2(config.port_bytes):]
        beats = self.request.payload.beats

        valid = Signal()
        start = Signal(index)
        block = Signal(len(address) - index)
        end = Signal(index)
        more = Signal(len(beats) + 1 - index)
        final = Signal()
        m.d.comb += [
            self.request.ready.eq(~valid & ~self.drop),
            self.burst.valid.eq(valid),
            self.burst.payload.start.eq(start),
            self.burst.payload.block.eq(block),
            self.burst.payload.end.eq(Mux(final, end, ~0)),
            self.burst.payload.last.eq(final),
        ]
        # A cycle behind ``more``, which nobody takes a burst in.
        m.d.sync += final.eq(more == self.burst.ready)
        with m.If(self.request.valid & self.request.ready):
            m.d.sync += Assert(beats != 0, "a request must have 1 beat or more")
        with m.If(~valid):  # whether there is a request or not
            m.d.sync += [
                valid.eq(self.request.valid),
                Cat(start, block).eq(address),
                Cat(end, more).eq(address[:index] + beats - 1),
            ]
        with m.Elif(self.burst.ready):
            m.d.sync += [valid.eq(~final), start.eq(0), block.eq(block + 1), more.eq(more - 1)]
        with m.If(self.drop):
            m.d.sync += valid.eq(0)
        return m
