"""A controller with its chip, for simulation."""

from dataclasses import replace

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.memory.axi import AXI4Signature
from moeaccel.hdl.memory.sdram import SdramTiming
from moeaccel.hdl.memory.sdram_controller import SdramController
from moeaccel.sim.board.sdram_chip import SdramChip, Violation


def short_timing(clock_hz, **limits):
    """Return the ULX3S's limits, with a power-up of 1 us."""
    return replace(SdramTiming.ulx3s(clock_hz=clock_hz), power_up_ns=1000, **limits)


class MemorySystem(wiring.Component):
    """SdramController, ``io_cycles`` registers, SdramChip.

    Registers stand in front of the chip first, then behind it.
    """

    def __init__(self, *, timing, id_width=3, io_cycles=0, rows=16):
        self.controller = SdramController(timing=timing, id_width=id_width, io_cycles=io_cycles)
        self.chip = SdramChip(timing, rows=rows)
        super().__init__({
            "axi": In(AXI4Signature(32, 64, id_width)),
            "o_violation": Out(Violation),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.controller = controller = self.controller
        m.submodules.chip = chip = self.chip
        wiring.connect(m, outer=wiring.flipped(self.axi), controller=controller.axi)
        out = controller.io_cycles - controller.io_cycles // 2
        for name, member in controller.sdram.signature.members.items():
            outward = name != "dq_i"
            source, target = controller.sdram, chip.sdram
            value = getattr(source if outward else target, name)
            for i in range(out if outward else controller.io_cycles // 2):
                register = Signal(member.shape, name=f"{name}_{i}",
                                  init=name in ("ras_n", "cas_n", "we_n", "cke"))
                m.d.sync += register.eq(value)
                value = register
            m.d.comb += getattr(target if outward else source, name).eq(value)
        m.d.comb += self.o_violation.eq(chip.o_violation)
        return m
