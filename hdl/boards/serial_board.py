"""A board with a serial line and one SDRAM: link, arbiter, accelerator, memory controller."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.errors import ConfigurationError
from moeaccel.hdl.boards.serial_link import SerialLink
from moeaccel.hdl.memory.axi_arbiter import AxiArbiter
from moeaccel.hdl.memory.memory_port import ID_BITS
from moeaccel.hdl.memory.sdram import SdramSignature, SdramTiming
from moeaccel.hdl.memory.sdram_controller import SdramController
from moeaccel.hdl.top import Accelerator

__all__ = ["LEDS", "SerialBoard"]

LEDS = ("running", "receiving", "sending", "busy", "interrupt")
"""What the lowest LEDs show: out of reset; bytes from and to the host; a command is executed; a
result waits for the host."""

_LED_SECONDS = 1 / 20


class SerialBoard(wiring.Component):
    """Everything between the pins of a serial line and those of an SDRAM, in one clock domain.

    ::

        i_rx --> SerialLink ------ axil -----> Accelerator --> irq --> SerialLink
        o_tx <--     |                             |
                     +-- axi --> AxiArbiter <------+ axi_mem
                                     |
                               SdramController <--> sdram

    Reset: the accelerator's, and the SDRAM is initialised again.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With a port of 8 bytes and addresses of 32 bits.
    timing : :class:`SdramTiming`
    baud_divisor : :class:`int`
        Clock cycles of a bit on the serial line.
    io_cycles : :class:`int`
        Registers between ``sdram`` and the chip, out and in together.
    family : :class:`str`
        FPGA family of the multipliers.

    Members
    -------
    i_rx : :py:`In(1)`
        Serial line from the host, asynchronous.
    o_tx : :py:`Out(1)`
        Serial line to the host.
    sdram : :py:`Out(SdramSignature())`
    o_busy : :py:`Out(1)`
        A command is being executed.
    o_leds : :py:`Out(8)`
        See :data:`LEDS`; what is short is stretched to 1/20 s.
    """

    def __init__(self, config: AcceleratorConfig, *, timing: SdramTiming, baud_divisor: int,
                 io_cycles: int, family: str = "generic"):
        for name, wanted in (("port_bytes", 8), ("address_bits", 32)):
            if getattr(config, name) != wanted:
                raise ConfigurationError(f"config must have {name} {wanted} to fit the board, not "
                                 f"{getattr(config, name)!r}: {config.name!r}")
        self._config = config
        self._timing = timing
        self._baud_divisor = baud_divisor
        self._io_cycles = io_cycles
        self._family = family
        super().__init__({
            "i_rx": In(1, init=1),
            "o_tx": Out(1, init=1),
            "sdram": Out(SdramSignature()),
            "o_busy": Out(1),
            "o_leds": Out(8),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.link = link = SerialLink(baud_divisor=self._baud_divisor, id_width=ID_BITS)
        m.submodules.accelerator = accelerator = Accelerator(self._config, self._family)
        m.submodules.arbiter = arbiter = AxiArbiter(
            addr_width=32, data_width=64, id_width=ID_BITS, masters=2)
        m.submodules.memory = memory = SdramController(
            timing=self._timing, id_width=ID_BITS + 1, io_cycles=self._io_cycles)

        wiring.connect(m, link=link.axil, accelerator=accelerator.axil)
        wiring.connect(m, link=link.axi, arbiter=arbiter.master0)
        wiring.connect(m, accelerator=accelerator.axi_mem, arbiter=arbiter.master1)
        wiring.connect(m, arbiter=arbiter.slave, memory=memory.axi)
        wiring.connect(m, outside=wiring.flipped(self.sdram), memory=memory.sdram)
        m.d.comb += [
            link.i_rx.eq(self.i_rx),
            self.o_tx.eq(link.o_tx),
            link.i_irq.eq(accelerator.irq),
            self.o_busy.eq(accelerator.busy),
            accelerator.mem_rst.eq(ResetSignal(allow_reset_less=True)),
        ]

        # -- LEDs ----------------------------------------------------------------------------------
        period = max(2, int(self._timing.clock_hz * _LED_SECONDS))
        timer = Signal(range(period))
        tick = Signal()
        seen, shown = Signal(len(LEDS)), Signal(len(LEDS))
        events = dict.fromkeys(LEDS, C(1, 1)) | {
            "receiving": ~self.i_rx,
            "sending": ~self.o_tx,
            "busy": accelerator.busy,
            "interrupt": accelerator.irq,
        }
        now = Signal(len(LEDS))
        m.d.sync += [
            now.eq(Cat(events.values())),
            tick.eq(timer == period - 1),
            timer.eq(Mux(tick, 0, timer + 1)),
            seen.eq(Mux(tick, now, seen | now)),
        ]
        with m.If(tick):
            m.d.sync += shown.eq(seen)
        m.d.comb += self.o_leds.eq(shown)
        return m
