"""Memory of quantised activations, one per token lane."""

from amaranth import *
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts

__all__ = ["LaneBuffer"]


class LaneBuffer(wiring.Component):
    """Hold the blocks of the resident tokens, ready for the array: one block of each lane per
    cycle.

    An address is step, then group, then bank, from the least significant bit
    (:func:`~moeaccel.hdl.layouts.lane_address_bits`). Read latency READ_LATENCY_CYCLES; one read
    and one write per cycle, never a stall. What reading an address in the cycle in which it is
    written gives is undefined; from the next cycle on it gives the new block. Reset keeps the
    contents.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    banks : :class:`int`
        A power of two: 2 for x (one is loaded while the other is used), 1 for h.

    Members
    -------
    w_en : :py:`In(config.token_lanes)`
        Lanes to write.
    w_address : :py:`In(address_bits)`
    w_data : :py:`In(ArrayLayout(layouts.lane(config), config.token_lanes))`
    r_en : :py:`In(1)`
        Reads nothing when 0; left alone it is 1.
    r_address : :py:`In(address_bits)`
    r_data : :py:`Out(ArrayLayout(layouts.lane(config), config.token_lanes))`
    """

    READ_LATENCY_CYCLES = 3

    def __init__(self, config, banks):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        if not isinstance(banks, int) or banks < 1 or banks & (banks - 1):
            raise ValueError(f"banks must be a power of two, not {banks!r}")
        self._config = config
        self._banks = banks
        lanes = data.ArrayLayout(layouts.lane(config), config.token_lanes)
        super().__init__({
            "w_en": In(config.token_lanes),
            "w_address": In(self.address_bits),
            "w_data": In(lanes),
            "r_en": In(1, init=1),
            "r_address": In(self.address_bits),
            "r_data": Out(lanes),
        })

    @property
    def config(self):
        """Configuration."""
        return self._config

    @property
    def banks(self):
        """Number of banks."""
        return self._banks

    @property
    def address_bits(self):
        """Bits of an address, bank included."""
        return layouts.lane_address_bits(self._config) + ceil_log2(self._banks)

    def elaborate(self, platform):
        m = Module()
        shape = unsigned(layouts.lane(self._config).size)
        # Memories lie all over a device and are slow to answer: registers in front and behind.
        reads = Signal()
        r_address = Signal.like(self.r_address, reset_less=True)
        m.d.sync += reads.eq(self.r_en)
        with m.If(self.r_en):
            m.d.sync += r_address.eq(self.r_address)
        for i in range(self._config.token_lanes):
            lane = memory.Memory(
                shape=shape, depth=1 << self.address_bits, init=[], attrs={"no_rw_check": 1})
            m.submodules[f"lane{i}"] = lane
            write, read = lane.write_port(), lane.read_port()
            m.d.comb += [
                write.en.eq(self.w_en[i]),
                write.addr.eq(self.w_address),
                write.data.eq(self.w_data[i]),
                read.en.eq(reads),
                read.addr.eq(r_address),
            ]
            held = Signal(shape, name=f"held{i}", reset_less=True)
            m.d.sync += held.eq(read.data)
            m.d.comb += self.r_data[i].eq(held)
        return m
