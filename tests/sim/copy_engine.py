"""A small AXI master for the co-simulation's own tests.

It copies memory when told through AXI4-Lite, raises ``irq`` when every write is acknowledged, and
breaks one rule of the bus on request. It stands for the accelerator: same ports, no arithmetic.
"""

import enum

from amaranth import *
from amaranth.back import verilog
from amaranth.lib import wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

ID = 0x00
CONTROL = 0x04
STATUS = 0x08
SOURCE = 0x10
SOURCE_HIGH = 0x14
TARGET = 0x18
TARGET_HIGH = 0x1C
BEATS = 0x20
TRAP = 0x24
FAULT = 0x28
NOTHING = 0xFFC

ID_VALUE = 0x434F5059
STATUS_DONE = 1
STATUS_READ_ERROR = 2
STATUS_WRITE_ERROR = 4

MOST_ADDRESSES_AHEAD = 8


class Fault(enum.IntEnum):
    """What the register FAULT makes the engine do wrong."""

    NONE = 0
    DROP_ARVALID = 1
    CHANGE_AWADDR = 2
    CHANGE_WDATA = 3
    WLAST_EARLY = 4
    WLAST_MISSING = 5
    NARROW = 6
    FIXED_BURST = 7
    DATA_FIRST = 8
    DROP_BVALID = 9
    IRQ_EARLY = 10
    NEVER_READY = 11
    NO_DATA = 12


class AxiLite(wiring.Signature):
    """AXI4-Lite with a 12-bit address, seen from the master."""

    def __init__(self):
        super().__init__({
            "awaddr": Out(12), "awvalid": Out(1), "awready": In(1),
            "wdata": Out(32), "wstrb": Out(4), "wvalid": Out(1), "wready": In(1),
            "bresp": In(2), "bvalid": In(1), "bready": Out(1),
            "araddr": Out(12), "arvalid": Out(1), "arready": In(1),
            "rdata": In(32), "rresp": In(2), "rvalid": In(1), "rready": Out(1),
        })


class Axi(wiring.Signature):
    """AXI4 without the side-band signals, seen from the master."""

    def __init__(self, *, addr_width, data_width, id_width):
        address = {"id": Out(id_width), "addr": Out(addr_width), "len": Out(8), "size": Out(3),
                   "burst": Out(2), "valid": Out(1), "ready": In(1)}
        super().__init__({
            **{f"aw{name}": member for name, member in address.items()},
            **{f"ar{name}": member for name, member in address.items()},
            "wdata": Out(data_width), "wstrb": Out(data_width // 8), "wlast": Out(1),
            "wvalid": Out(1), "wready": In(1),
            "bid": In(id_width), "bresp": In(2), "bvalid": In(1), "bready": Out(1),
            "rid": In(id_width), "rdata": In(data_width), "rresp": In(2), "rlast": In(1),
            "rvalid": In(1), "rready": Out(1),
        })


class CopyEngine(wiring.Component):
    """Copy ``BEATS`` beats from ``SOURCE`` to ``TARGET``.

    Burst k travels under id k mod `ids`, each id has its own buffer, so any order between ids is
    legal. Reads run ahead as far as the buffers allow; a write's data may overtake its address
    once that address is valid.

    Parameters
    ----------
    data_width, addr_width : :class:`int`
    ids : :class:`int`
        Number of ids in use; a power of two, at least 2.
    burst : :class:`int`
        Beats per burst; a power of two.
    split : :class:`bool`
        Write through a second port.
    """

    def __init__(self, *, data_width, addr_width=40, ids=4, burst=16, split=False):
        self._data_width = data_width
        self._addr_width = addr_width
        self._ids = ids
        self._burst = burst
        port = Out(Axi(addr_width=addr_width, data_width=data_width, id_width=exact_log2(ids)))
        super().__init__({"axil": In(AxiLite()), "axi_mem": port, "irq": Out(1),
                          **({"axi_mem_1": port} if split else {})})
        self._split = split

    def elaborate(self, platform):
        m = Module()
        axil, axi = self.axil, self.axi_mem
        writer = self.axi_mem_1 if self._split else axi
        fault = Signal(Fault)
        beat_bytes = self._data_width // 8
        size = exact_log2(beat_bytes)
        burst_log2 = exact_log2(self._burst)

        start = Signal()
        source, target = Signal(64), Signal(64)
        beats = Signal(32)
        done, read_error, write_error = Signal(), Signal(), Signal()
        trap = Signal()

        # AXI4-Lite: one transaction at a time, address and data accepted in any order.
        address, value = Signal(12), Signal(32)
        have_address, have_value = Signal(), Signal()
        m.d.comb += [axil.awready.eq(~have_address), axil.wready.eq(~have_value)]
        with m.If(axil.awvalid & axil.awready):
            m.d.sync += [address.eq(axil.awaddr), have_address.eq(1)]
        with m.If(axil.wvalid & axil.wready):
            m.d.sync += [value.eq(axil.wdata), have_value.eq(1)]
        with m.If(axil.bvalid & axil.bready):
            m.d.sync += [axil.bvalid.eq(0), have_address.eq(0), have_value.eq(0)]
        with m.Elif(have_address & have_value & ~axil.bvalid):
            m.d.sync += [axil.bvalid.eq(1), axil.bresp.eq(0)]
            with m.Switch(address):
                with m.Case(CONTROL):
                    m.d.comb += start.eq(value[0])
                with m.Case(STATUS):
                    m.d.sync += [done.eq(0), read_error.eq(0), write_error.eq(0)]
                for low, register in ((SOURCE, source), (TARGET, target)):
                    with m.Case(low):
                        m.d.sync += register[:32].eq(value)
                    with m.Case(low + 4):
                        m.d.sync += register[32:].eq(value)
                with m.Case(BEATS):
                    m.d.sync += beats.eq(value)
                with m.Case(FAULT):
                    m.d.sync += fault.eq(value)
                with m.Case(TRAP):
                    m.d.sync += trap.eq(value[0])
                with m.Default():
                    m.d.sync += axil.bresp.eq(2)
        with m.If((fault == Fault.DROP_BVALID) & axil.bvalid):
            m.d.sync += axil.bvalid.eq(0)

        m.d.comb += axil.arready.eq(~axil.rvalid)
        with m.If(axil.rvalid & axil.rready):
            m.d.sync += axil.rvalid.eq(0)
        with m.If(axil.arvalid & axil.arready):
            m.d.sync += [axil.rvalid.eq(1), axil.rresp.eq(0)]
            with m.Switch(axil.araddr):
                with m.Case(ID):
                    m.d.sync += axil.rdata.eq(ID_VALUE)
                with m.Case(STATUS):
                    m.d.sync += axil.rdata.eq(Cat(done, read_error, write_error))
                with m.Case(SOURCE):
                    m.d.sync += axil.rdata.eq(source[:32])
                with m.Case(BEATS):
                    m.d.sync += axil.rdata.eq(beats)
                with m.Default():
                    m.d.sync += [axil.rdata.eq(0), axil.rresp.eq(2)]

        m.d.sync += Assert(~trap, "trap register was set")
        m.d.comb += self.irq.eq(done)

        # One progress record for each of the four activities: reads asked for, write addresses,
        # write data, acknowledgements.
        def bursts_left(name):
            left, index = Signal(32, name=f"{name}_left"), Signal(32, name=f"{name}_index")
            length = Signal(burst_log2 + 1, name=f"{name}_length")
            m.d.comb += length.eq(Mux(left > self._burst, self._burst, left))
            with m.If(start):
                m.d.sync += [left.eq(beats), index.eq(0)]
            return left, index, length

        def advance(left, index, length):
            m.d.sync += [left.eq(left - length), index.eq(index + 1)]

        depth = 4 * self._burst
        buffers = []
        for number in range(self._ids):
            buffer = SyncFIFOBuffered(width=self._data_width, depth=depth)
            m.submodules[f"buffer_{number}"] = buffer
            buffers.append(buffer)
        room = Array(Signal(range(depth + 1), init=depth, name=f"room_{number}")
                     for number in range(self._ids))

        # Read addresses
        left, index, length = bursts_left("read")
        stuck = Signal()
        read_id = index[:exact_log2(self._ids)]
        ar_valid = Signal()
        m.d.comb += [
            axi.arid.eq(read_id),
            axi.araddr.eq(source + (index << (size + burst_log2))),
            axi.arlen.eq(length - 1),
            axi.arsize.eq(Mux(fault == Fault.NARROW, size - 1, size)),
            axi.arburst.eq(Mux(fault == Fault.FIXED_BURST, 0, 1)),
            ar_valid.eq((left != 0) & (room[read_id] >= self._burst)),
            axi.arvalid.eq(ar_valid & ~stuck),
        ]
        m.d.sync += stuck.eq((fault == Fault.DROP_ARVALID) & ar_valid & ~axi.arready & ~stuck)
        took = Signal()
        m.d.comb += took.eq(axi.arvalid & axi.arready)
        with m.If(took):
            advance(left, index, length)

        # Read data
        for number, buffer in enumerate(buffers):
            m.d.comb += [
                buffer.w_data.eq(axi.rdata),
                buffer.w_en.eq(axi.rvalid & axi.rready & (axi.rid == number)),
            ]
            m.d.sync += room[number].eq(
                room[number] + (buffer.r_rdy & buffer.r_en)
                - Mux(took & (read_id == number), length, 0))
        m.d.comb += axi.rready.eq(fault != Fault.NEVER_READY)
        with m.If(axi.rvalid & (axi.rresp != 0)):
            m.d.sync += read_error.eq(1)

        # Write addresses
        aw_left, aw_index, aw_length = bursts_left("address")
        w_left, w_index, w_length = bursts_left("data")
        lfsr = Signal(16, init=1)
        m.d.sync += lfsr.eq(Cat(lfsr[15] ^ lfsr[13] ^ lfsr[12] ^ lfsr[10], lfsr))
        m.d.comb += [
            writer.awid.eq(aw_index),
            writer.awaddr.eq(target + (aw_index << (size + burst_log2))
                             + Mux(fault == Fault.CHANGE_AWADDR, lfsr, 0)),
            writer.awlen.eq(aw_length - 1),
            writer.awsize.eq(size),
            writer.awburst.eq(1),
            writer.awvalid.eq((aw_left != 0) & (aw_index - w_index < MOST_ADDRESSES_AHEAD)
                              & ((fault != Fault.DATA_FIRST) | (lfsr[:5] == 0))),
        ]
        with m.If(writer.awvalid & writer.awready):
            advance(aw_left, aw_index, aw_length)

        # Write data
        beat = Signal(burst_log2 + 1)
        w_id = w_index[:exact_log2(self._ids)]
        ready = Array(buffer.r_rdy for buffer in buffers)
        data = Array(buffer.r_data for buffer in buffers)
        last = Signal()
        addressed = (aw_index > w_index) | ((aw_index == w_index) & writer.awvalid)
        m.d.comb += [
            last.eq(beat == w_length - 1),
            writer.wvalid.eq((w_left != 0) & ready[w_id]
                          & (addressed | (fault == Fault.DATA_FIRST))
                          & (fault != Fault.NO_DATA)),
            writer.wdata.eq(data[w_id] ^ Mux(fault == Fault.CHANGE_WDATA, lfsr, 0)),
            writer.wstrb.eq(~0),
            writer.wlast.eq((last | ((fault == Fault.WLAST_EARLY) & (beat == 1)))
                            & (fault != Fault.WLAST_MISSING)),
        ]
        for number, buffer in enumerate(buffers):
            m.d.comb += buffer.r_en.eq(writer.wvalid & writer.wready & (w_id == number))
        with m.If(writer.wvalid & writer.wready):
            m.d.sync += beat.eq(Mux(last, 0, beat + 1))
            with m.If(last):
                advance(w_left, w_index, w_length)

        # Acknowledgements
        b_left, b_index, b_length = bursts_left("response")
        m.d.comb += writer.bready.eq(1)
        with m.If(writer.bvalid):
            with m.If(writer.bresp != 0):
                m.d.sync += write_error.eq(1)
            advance(b_left, b_index, b_length)
            with m.If(b_left == b_length):
                m.d.sync += done.eq(1)
        with m.If((fault == Fault.IRQ_EARLY)
                  & writer.wvalid & writer.wready & last & (w_left == w_length)):
            m.d.sync += done.eq(1)
        return m


def copy_engine_verilog(**parameters):
    """Return the Verilog text of a :class:`CopyEngine` as module ``top``."""
    return verilog.convert(CopyEngine(**parameters), name="top", emit_src=False)
