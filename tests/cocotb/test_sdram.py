"""The SDRAM's rates, with every limit of the chip checked; the bench is sdram_bench.py."""

import json

import pytest
from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.memory.sdram import CHIP_BYTES
from moeaccel.hdl.verilog.verilog_target import generate
from moeaccel.sim.board.sdram_chip import Violation
from moeaccel.sim.cocotb_runner import run_cocotb
from tests.support.axi_traffic import AxiTraffic
from tests.support.sdram import MemorySystem, short_timing

pytestmark = [pytest.mark.cocotb, pytest.mark.timeout(900)]  # the first run builds


class Top(wiring.Component):
    """AxiTraffic on a MemorySystem with the whole chip."""

    def __init__(self, *, clock_hz, io_cycles, region):
        self._traffic = AxiTraffic(region=region, id_width=1)
        self._memory = MemorySystem(timing=short_timing(clock_hz), id_width=1, io_cycles=io_cycles,
                                    rows=8192)
        super().__init__({
            "i_base": In(32), "i_read": In(1), "i_write": In(1), "i_random": In(1),
            "o_read_beats": Out(32), "o_written_bursts": Out(32), "o_pending": Out(16),
            "o_wrong": Out(1), "o_violation": Out(Violation),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.traffic = traffic = self._traffic
        m.submodules.memory = system = self._memory
        wiring.connect(m, traffic=traffic.axi, memory=system.axi)
        for name, member in self.signature.members.items():
            inner = getattr(system if name == "o_violation" else traffic, name)
            outer = getattr(self, name)
            m.d.comb += inner.eq(outer) if member.flow == In else outer.eq(inner)
        return m


def measure(folder, *, clock_hz, io_cycles, region, cycles):
    """Return words read and written in a cycle, by pattern."""
    top = Top(clock_hz=clock_hz, io_cycles=io_cycles, region=region)
    run_cocotb(generate(top, "sdram_top"), "sdram_top", "tests.cocotb.sdram_bench", seed=1,
               folder=folder,
               env={"BENCH_BASE": str(CHIP_BYTES - region), "BENCH_REGION": str(region),
                    "BENCH_CYCLES": str(cycles)})
    return json.loads((folder / "figures.json").read_text(encoding="utf-8"))


def near(figures):
    return {name: [pytest.approx(rate, abs=0.002) for rate in pair]
            for name, pair in figures.items()}


def test_rates_at_120_mhz(tmp_path):
    """Of the 16-bit bus's peak, refreshes included; bursts of 512 bytes."""
    figures = measure(tmp_path, clock_hz=120_000_000, io_cycles=2, region=1 << 16, cycles=40_000)
    assert figures == near({
        "stream read": [0.989, 0], "stream written": [0, 0.986], "streams, both": [0.490, 0.493],
        "scattered read": [0.983, 0], "scattered written": [0, 0.979],
        "scattered, both": [0.486, 0.486],
    })


@pytest.mark.slow
def test_rates_of_a_large_region(tmp_path):
    """At 100 MHz; two bursts hardly ever meet in a row by chance."""
    figures = measure(tmp_path, clock_hz=100_000_000, io_cycles=0, region=1 << 23, cycles=400_000)
    assert figures == near({
        "stream read": [0.987, 0], "stream written": [0, 0.987], "streams, both": [0.490, 0.490],
        "scattered read": [0.979, 0], "scattered written": [0, 0.980],
        "scattered, both": [0.487, 0.487],
    })
