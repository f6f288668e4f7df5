"""The ULX3S: dividers and phases of its PLL, and what goes into its bitstream."""

import dataclasses
from pathlib import Path

import pytest
from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.errors import ClockRateError
from moeaccel.fpga.bitstream import build_bitstream
from moeaccel.fpga.boards import ulx3s
from moeaccel.fpga.boards.ulx3s import _SITES, Pll, _margins
from moeaccel.hdl.memory.sdram import SdramSignature

MHZ = 1_000_000


@pytest.mark.parametrize("mhz", [25, 50, 75, 80, 85, 90, 95, 100, 105, 110, 115, 120, 125])
def test_the_pll_makes_the_clock(mhz):
    pll = Pll.for_clock(mhz * MHZ)
    detector = 25 / pll.input
    assert detector * pll.feedback == mhz
    assert detector >= 3.125
    assert 400 <= mhz * pll.output <= 800


@pytest.mark.parametrize("mhz", [25, 50, 80, 100, 110, 120])
def test_the_sdram_is_sampled_where_it_is_stable(mhz):
    pll = Pll.for_clock(mhz * MHZ)
    period = 1000 / mhz
    assert min(_margins(period, period * pll.chip_phase / pll.output)) > 1.5


@pytest.mark.parametrize("mhz", [0, -25, 101, 33.3, 1000])
def test_other_clocks_are_refused(mhz):
    with pytest.raises(ClockRateError, match="clock must be one that the PLL makes of 25 MHz"):
        Pll.for_clock(round(mhz * MHZ))


def test_rates_of_the_line(tmp_path):
    with pytest.raises(ClockRateError, match="baud must be within 2%"):
        build_bitstream("ulx3s", baud=44_000_000, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


class Small(wiring.Component):
    """What the board's top needs of a SerialBoard, and little else."""

    def __init__(self, config, **_):
        super().__init__({"i_rx": In(1), "o_tx": Out(1), "sdram": Out(SdramSignature()),
                          "o_leds": Out(8)})

    def elaborate(self, platform):
        m = Module()
        pins = self.sdram
        m.d.sync += Cat(pins.a, pins.ba, pins.dq_o, pins.dq_oe, self.o_tx, self.o_leds).eq(
            Cat(self.i_rx, pins.a, pins.ba, pins.dq_o, pins.dq_oe, pins.dq_i))
        return m


@pytest.mark.timeout(300)
def test_a_small_design_becomes_a_bitstream(monkeypatch, tmp_path):
    """The real tools on the real pins; registers sit at every pin of the SDRAM and the LEDs."""
    monkeypatch.setattr(ulx3s, "SerialBoard", Small)
    monkeypatch.setattr(ulx3s, "floorplan", lambda config: {})
    built = build_bitstream("ulx3s", clock_mhz=50, baud=1_000_000, folder=tmp_path)
    assert built.reached
    assert built.resources["PLLs"][0] == 1
    assert built.resources["pin registers"][0] == 22 + 16 + 1 + 8
    assert built.resources["pins"][0] == len(sites())
    assert Path(built.path).stat().st_size > 10_000
    assert built.path in built.program[0]
    there = {name: built.resources[name][1] for name in ulx3s.BOARD.resources}
    assert there == ulx3s.BOARD.resources  # nextpnr knows the device, too
    again = build_bitstream("ulx3s", clock_mhz=50, baud=1_000_000, folder=tmp_path)
    assert again == dataclasses.replace(built, seconds=again.seconds)


def sites():
    return [site for names, _ in _SITES.values() for site in names.split()]


def test_every_pin_has_its_own_site():
    assert len(set(sites())) == len(sites()) == 16 + 13 + 2 + 2 + 6 + 8 + 5
