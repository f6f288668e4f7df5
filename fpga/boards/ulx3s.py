"""The ULX3S board with an LFE5U-85F: clocks, reset, pins, and the registers at the SDRAM's pins.

Pins and their standards are those of the board's manual (revision 3.0.x, 85F).
"""

# RTL: Amaranth makes attributes at run time.
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from amaranth import *
from amaranth.hdl import IOPort
from amaranth.lib import wiring
from amaranth.lib.cdc import FFSynchronizer
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.errors import ClockRateError
from moeaccel.fpga.boards.base import BitstreamBoard, Design
from moeaccel.fpga.floorplan import floorplan
from moeaccel.hdl.boards.global_buffer import GlobalBuffer
from moeaccel.hdl.boards.serial_board import SerialBoard
from moeaccel.hdl.memory.sdram import SdramTiming
from moeaccel.hdl.verilog.verilog_target import generate

__all__ = ["BOARD", "IO_CYCLES", "Pll", "Ulx3s", "Ulx3sTop"]

OSCILLATOR_HZ = 25_000_000

IO_CYCLES = 2
"""Registers between the controller and the SDRAM: one at each pin on the way out, one back."""

BAUD_ERROR = 0.02
"""Largest deviation from the rate that was asked for."""

# Nanoseconds at the SDRAM's pins. The FPGA's are Lattice's for LVCMOS33 with 4 mA and slow edges
# (from the pin's register to the pin, from the pin to its register with the register's setup); the
# chip's are the worst of those that are mounted (setup and hold of its inputs, from its clock to
# its output valid and still valid).
OUT_NS, IN_NS = 3.0, 1.2
SETUP_NS, HOLD_NS, ACCESS_NS, KEEP_NS = 1.5, 1.0, 6.0, 2.5


@dataclass(frozen=True, kw_only=True)
class Pll:
    """Dividers of an EHXPLLL: clock = oscillator / input * feedback, VCO = clock * output.

    Parameters
    ----------
    input, feedback, output : int
    chip_phase : int
        By how many periods of the VCO the SDRAM's clock follows the system's.
    """

    input: int
    feedback: int
    output: int
    chip_phase: int

    @classmethod
    def for_clock(cls, clock_hz: int) -> Pll:
        """Return the dividers for a clock, and the phase with the largest margins at the SDRAM.

        Raises
        ------
        ClockRateError
            If no dividers make that clock exactly.
        """
        # Lattice's data sheet FPGA-DS-02012: VCO 400 to 800 MHz, phase detector from 3.125 MHz on.
        for divider in range(1, OSCILLATOR_HZ // 3_125_000 + 1):
            feedback, rest = divmod(clock_hz * divider, OSCILLATOR_HZ)
            output = round(600_000_000 / clock_hz) if clock_hz > 0 else 0
            if rest == 0 and 1 <= feedback <= 80 and 1 <= output <= 128 \
                    and 400_000_000 <= clock_hz * output <= 800_000_000:
                return cls(input=divider, feedback=feedback, output=output,
                           chip_phase=_chip_phase(1e9 / clock_hz, output))
        raise ClockRateError(
            f"clock must be one that the PLL makes of {OSCILLATOR_HZ / 1e6:g} MHz, not "
            f"{clock_hz / 1e6:g} MHz: a multiple of {OSCILLATOR_HZ / 8e6:g} or 5 MHz below 400 MHz")


def _margins(period: float, delay: float) -> tuple[float, ...]:
    """Return the slack, in ns, of what the chip samples and of what the FPGA samples.

    Pins change `OUT_NS` after a clock edge, the chip's clock `delay` after them. A word is there
    from `ACCESS_NS` after the chip's clock on, two cycles after its command, and the FPGA samples
    it two edges later.
    """
    back = delay + OUT_NS + IN_NS
    return (delay - SETUP_NS, period - delay - HOLD_NS,
            2 * period - (back + ACCESS_NS), back + period + KEEP_NS - 2 * period)


def _chip_phase(period: float, steps: int) -> int:
    return max(range(1, steps), key=lambda step: min(_margins(period, period * step / steps)),
               default=0)


class Ulx3sTop(wiring.Component):
    """The board's FPGA: module ``top``.

    Reset lasts 2^16 cycles after the PLL has locked and the button ``btn[0]`` was released.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    clock_hz : :class:`int`
        System clock.
    baud : :class:`int`
        Rate of the serial line.

    Members
    -------
    clk_25mhz, btn : :py:`In`
        Oscillator; the button that resets, low when pressed.
    ftdi_txd, ftdi_rxd : :py:`In(1)`, :py:`Out(1)`
        Serial line, named as the USB chip sees it.
    led : :py:`Out(8)`
    wifi_gpio0 : :py:`Out(1)`
        High: else the ESP32 starts its loader, and may load another bitstream.
    sdram_* : :py:`Out`
        And the bidirectional ``sdram_d``.
    """

    def __init__(self, config: AcceleratorConfig, *, clock_hz: int, baud: int):
        self._pll = Pll.for_clock(clock_hz)
        divisor = round(clock_hz / baud) if baud > 0 else 0
        if divisor < 4 or abs(clock_hz / divisor / baud - 1) > BAUD_ERROR:
            raise ClockRateError(
                f"baud must be within {BAUD_ERROR:.0%} of the clock, {clock_hz:,} Hz, divided by 4 "
                f"or more, not {baud!r}")
        self._board = SerialBoard(config, timing=SdramTiming.ulx3s(clock_hz=clock_hz),
                                  baud_divisor=divisor, io_cycles=IO_CYCLES, family=Ulx3s.family)
        self._data = IOPort(16, name="sdram_d")
        super().__init__({
            "clk_25mhz": In(1),
            "btn": In(1),
            "ftdi_txd": In(1),
            "ftdi_rxd": Out(1),
            "led": Out(8),
            "wifi_gpio0": Out(1),
            "sdram_clk": Out(1),
            "sdram_cke": Out(1),
            "sdram_csn": Out(1),
            "sdram_rasn": Out(1),
            "sdram_casn": Out(1),
            "sdram_wen": Out(1),
            "sdram_ba": Out(2),
            "sdram_a": Out(13),
            "sdram_dqm": Out(2),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.board = board = self._board
        self._clocks(m)

        m.d.comb += [
            board.i_rx.eq(self.ftdi_txd),
            self.ftdi_rxd.eq(board.o_tx),
            self.wifi_gpio0.eq(1),
        ]
        for i, lit in enumerate(board.o_leds):
            self._register(m, "OFS1P3DX", lit, self.led[i], name=f"led{i}")
        pins = board.sdram
        for name, value in (("cke", pins.cke), ("csn", pins.cs_n), ("rasn", pins.ras_n),
                            ("casn", pins.cas_n), ("wen", pins.we_n), ("ba", pins.ba),
                            ("a", pins.a), ("dqm", pins.dqm)):
            pin = getattr(self, f"sdram_{name}")
            for i in range(len(pin)):
                self._register(m, "OFS1P3DX", value[i], pin[i], name=f"{name}{i}")
        for i in range(16):
            out, released, into = (Signal(name=f"{what}{i}") for what in ("out", "released", "in"))
            self._register(m, "OFS1P3DX", pins.dq_o[i], out, name=f"out{i}")
            # A register for each pin, which the tools must not merge, nor place far from it.
            m.submodules[f"released{i}"] = Instance(
                "OFS1P3BX", i_D=~pins.dq_oe, i_SP=Const(1), i_PD=Const(0), i_SCLK=ClockSignal(),
                o_Q=released)
            m.submodules[f"pin{i}"] = Instance(
                "BB", i_I=out, i_T=released, o_O=into, io_B=self._data[i])
            self._register(m, "IFS1P3DX", into, pins.dq_i[i], name=f"in{i}")
        return m

    @staticmethod
    def _register(m, kind, source, target, *, name):
        """Add one of the registers that sit at the pins."""
        m.submodules[f"{name}_{kind[:3].lower()}"] = Instance(
            kind, i_D=source, i_SP=Const(1), i_CD=Const(0), i_SCLK=ClockSignal(), o_Q=target)

    def _clocks(self, m):
        """Add PLL, reset, and the SDRAM's clock."""
        pll = self._pll
        clock, chip_clock, locked = Signal(), Signal(), Signal()
        m.submodules.pll = Instance(
            "EHXPLLL",
            a_FREQUENCY_PIN_CLKI=str(OSCILLATOR_HZ / 1e6),
            a_ICP_CURRENT="12", a_LPF_RESISTOR="8", a_MFG_ENABLE_FILTEROPAMP="1",
            a_MFG_GMCREF_SEL="2",
            p_CLKI_DIV=pll.input, p_CLKFB_DIV=pll.feedback, p_FEEDBK_PATH="CLKOP",
            p_CLKOP_ENABLE="ENABLED", p_CLKOP_DIV=pll.output,
            p_CLKOP_CPHASE=pll.output - 1, p_CLKOP_FPHASE=0,
            p_CLKOS_ENABLE="ENABLED", p_CLKOS_DIV=pll.output,
            p_CLKOS_CPHASE=pll.output - 1 + pll.chip_phase, p_CLKOS_FPHASE=0,
            p_OUTDIVIDER_MUXA="DIVA", p_OUTDIVIDER_MUXB="DIVB",
            p_STDBY_ENABLE="DISABLED", p_DPHASE_SOURCE="DISABLED", p_PLLRST_ENA="DISABLED",
            p_INTFB_WAKE="DISABLED",
            i_CLKI=self.clk_25mhz, i_CLKFB=clock,
            i_RST=Const(0), i_STDBY=Const(0), i_PHASESEL0=Const(0), i_PHASESEL1=Const(0),
            i_PHASEDIR=Const(0), i_PHASESTEP=Const(0), i_PHASELOADREG=Const(0),
            i_PLLWAKESYNC=Const(0), i_ENCLKOP=Const(0), i_ENCLKOS=Const(0),
            o_CLKOP=clock, o_CLKOS=chip_clock, o_LOCK=locked,
        )
        m.submodules.chip_clock = Instance(
            "ODDRX1F", i_SCLK=chip_clock, i_RST=Const(0), i_D0=Const(1), i_D1=Const(0),
            o_Q=self.sdram_clk)

        m.domains.sync = sync = ClockDomain()
        m.domains.start = start = ClockDomain(reset_less=True)
        m.d.comb += [sync.clk.eq(clock), start.clk.eq(clock)]
        ready = Signal()
        m.submodules.ready = FFSynchronizer(locked & self.btn, ready, o_domain="start")
        count = Signal(17)
        reset = Signal(init=1)
        with m.If(~ready):
            m.d.start += count.eq(0)
        with m.Elif(~count[-1]):
            m.d.start += count.eq(count + 1)
        m.d.start += reset.eq(~count[-1])
        m.submodules.reset = buffer = GlobalBuffer(Ulx3s.family)
        m.d.comb += [buffer.i.eq(reset), sync.rst.eq(buffer.o)]


# Site of each pin, and what its buffer is set to.
_OUT, _PULLED = "PULLMODE=NONE IO_TYPE=LVCMOS33 DRIVE=4", "PULLMODE=UP IO_TYPE=LVCMOS33"
_SITES = {
    "clk_25mhz": ("G2", "PULLMODE=NONE IO_TYPE=LVCMOS33"),
    "btn": ("D6", _PULLED),
    "ftdi_txd": ("M1", _PULLED),
    "ftdi_rxd": ("L4", _OUT),
    "wifi_gpio0": ("L2", _OUT),
    "led": ("B2 C2 C1 D2 D1 E2 E1 H3", _OUT),
    "sdram_clk": ("F19", _OUT),
    "sdram_cke": ("F20", _OUT),
    "sdram_csn": ("P20", _OUT),
    "sdram_rasn": ("R20", _OUT),
    "sdram_casn": ("T19", _OUT),
    "sdram_wen": ("T20", _OUT),
    "sdram_ba": ("P19 N20", _OUT),
    "sdram_a": ("M20 M19 L20 L19 K20 K19 K18 J20 J19 H20 N19 G20 G19", _OUT),
    "sdram_dqm": ("U19 E20", _OUT),
    "sdram_d": ("J16 L18 M18 N18 P18 T18 T17 U20 E19 D20 D19 C20 E18 F18 J18 J17", _OUT),
}


def _constraints() -> str:
    lines = ["BLOCK RESETPATHS;", "BLOCK ASYNCPATHS;",
             f'FREQUENCY PORT "clk_25mhz" {OSCILLATOR_HZ / 1e6:g} MHZ;']
    for name, (sites, buffer) in _SITES.items():
        sites = sites.split()
        for i, site in enumerate(sites):
            port = name if len(sites) == 1 else f"{name}[{i}]"
            lines += [f'LOCATE COMP "{port}" SITE "{site}";', f'IOBUF PORT "{port}" {buffer};']
    return "\n".join([*lines, ""])


class Ulx3s(BitstreamBoard):
    """Radiona's ULX3S with an LFE5U-85F-6 and 32 MB of SDRAM."""

    name = "ulx3s"
    title = "ULX3S"
    part = "LFE5U-85F-6BG381C"
    family = "ecp5"
    memory = "32 MiB of SDRAM, 16 bits"
    resources = {"LUT4": 83_640, "flip-flops": 83_640, "multipliers": 156, "block RAMs": 208}
    config = "ulx3s"
    clock_hz = 100_000_000
    baud = 3_000_000
    transport = "serial:PORT"
    route = ("--85k", "--package", "CABGA381", "--speed", "6")
    # The flash is read at 62 MHz; compressed, which halves the time of a start.
    pack = ("--compress", "--freq", "62.0")

    def design(self, config: AcceleratorConfig, *, clock_hz: int, baud: int) -> Design:
        return Design(
            verilog=generate(Ulx3sTop(config, clock_hz=clock_hz, baud=baud), "top"),
            constraints=_constraints())

    def sites(self, config: AcceleratorConfig) -> dict[str, str]:
        return floorplan(config)

    def program(self, bitstream: Path) -> tuple[str, ...]:
        return f"openFPGALoader -b ulx3s {bitstream}", f"fujprog {bitstream}"


BOARD = Ulx3s()
