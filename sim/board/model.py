"""The RTL of a simulated board: the serial board, the registers at its pins, and its SDRAM."""

# RTL: Amaranth makes attributes at run time.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl.boards.serial_board import SerialBoard
from moeaccel.hdl.memory.sdram import SdramTiming
from moeaccel.hdl.verilog.verilog_target import RAM_VERILOG, VerilogTarget, generate
from moeaccel.sim.board.sdram_chip import SdramChip, Violation

__all__ = ["BoardModel", "board_verilog"]

IO_CYCLES = 2
"""Registers between controller and chip, one each way, as on the real board."""

_ARRAY = "moeaccel_sdram_array"


class BoardModel(wiring.Component):
    """A board between its serial line and the cells of its SDRAM.

    ::

        i_rx, o_tx <--> SerialBoard --> [register] --> SdramChip
                                    <-- [register] <--

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    timing : :class:`SdramTiming`
    cycles_per_bit : :class:`int`
        On the serial line.

    Members
    -------
    clk, rst : :py:`In(1)`
        Reset is synchronous, active high, for 2 cycles or more; it is registered, which makes the
        model much faster (see :func:`moeaccel.hdl.top.generate_verilog`).
    i_rx, o_tx : :py:`In(1)`, :py:`Out(1)`
    o_busy : :py:`Out(1)`
        A command is being executed.
    o_leds : :py:`Out(8)`
    o_violation : :py:`Out(Violation)`
        Of the SDRAM's rules, the first.
    """

    def __init__(self, config: AcceleratorConfig, *, timing: SdramTiming, cycles_per_bit: int):
        self._board = SerialBoard(config, timing=timing, baud_divisor=cycles_per_bit,
                                  io_cycles=IO_CYCLES)
        self._chip = SdramChip(timing)
        super().__init__({
            "clk": In(1),
            "rst": In(1),
            "i_rx": In(1, init=1),
            "o_tx": Out(1, init=1),
            "o_busy": Out(1),
            "o_leds": Out(8),
            "o_violation": Out(Violation),
        })

    @property
    def memory(self) -> Memory:
        """The chip's memory."""
        return self._chip.memory

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain()
        reset = Signal(init=1, reset_less=True)
        m.d.sync += reset.eq(self.rst)
        m.d.comb += [ClockSignal().eq(self.clk), ResetSignal().eq(reset)]
        m.submodules.board = board = self._board
        m.submodules.chip = chip = self._chip
        m.d.comb += [
            board.i_rx.eq(self.i_rx),
            self.o_tx.eq(board.o_tx),
            self.o_busy.eq(board.o_busy),
            self.o_leds.eq(board.o_leds),
            self.o_violation.eq(chip.o_violation),
        ]
        for name, member in board.sdram.signature.members.items():
            source, target = (board, chip) if member.flow == Out else (chip, board)
            m.d.sync += getattr(target.sdram, name).eq(getattr(source.sdram, name))
        return m


class _Target(VerilogTarget):
    """Makes the chip's memory a module of its own, whose array the harness may touch."""

    def __init__(self, memory: Memory):
        super().__init__()
        self._memory = memory

    def get_memory(self, memory: Memory):
        instance = super().get_memory(memory)
        if memory is self._memory:
            instance.type = _ARRAY
        return instance


def board_verilog(config: AcceleratorConfig, *, clock_hz: int, cycles_per_bit: int) -> str:
    """Return the Verilog of a board, module ``top``; its SDRAM is ``top.chip.memory.mem``."""
    model = BoardModel(config, timing=SdramTiming.ulx3s(clock_hz=clock_hz),
                       cycles_per_bit=cycles_per_bit)
    text = generate(model, "top", target=_Target(model.memory), simulation=True)
    array = RAM_VERILOG.split("endmodule")[0].replace("module moeaccel_ram ", f"module {_ARRAY} ")
    array = array.replace("[0:DEPTH-1];", "[0:DEPTH-1] /*verilator public_flat_rw*/;")
    return text + array + "endmodule\n"
