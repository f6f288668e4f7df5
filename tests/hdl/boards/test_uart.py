"""UartReceiver and UartTransmitter: every byte, every phase, wrong rates, broken lines."""

import random

import pytest
from amaranth.sim import Simulator

from moeaccel.hdl.boards.uart import UartReceiver, UartTransmitter


def receive(divisor, levels, idle=40):
    """Return the bytes of a line with these levels, one a cycle, and the cycle of each."""
    dut = UartReceiver(divisor=divisor)
    found = []

    async def drive(ctx):
        for k, level in enumerate([*levels, *[1] * idle]):
            ctx.set(dut.i_rx, level)
            _, _, valid, byte = await ctx.tick().sample(
                dut.o_stream.valid, dut.o_stream.payload)
            if valid:
                found.append((k, byte))

    simulate(dut, drive)
    return found


def simulate(dut, *testbenches):
    sim = Simulator(dut)
    sim.add_clock(1e-6)
    for testbench in testbenches:
        sim.add_testbench(testbench)
    sim.run()


def line(data, bit_cycles, gap=lambda: 0, stop=1):
    """Return the levels, one a cycle, of bytes whose bits have ``bit_cycles`` cycles, fractions
    too."""
    edges, at = [], 0.0
    for byte in data:
        for bit in (0, *(byte >> k & 1 for k in range(8)), stop):
            at += bit_cycles
            edges.append((at, bit))
        at += gap()
        edges.append((at, 1))
    levels = []
    for end, bit in edges:
        levels += [bit] * (round(end) - len(levels))
    return levels


@pytest.mark.parametrize("divisor", [4, 5, 33])
def test_every_byte_back_to_back(divisor):
    data = list(range(0, 256, 1 if divisor == 4 else 51))
    assert [byte for _, byte in receive(divisor, line(data, divisor))] == data


def test_gaps_and_phases():
    rng = random.Random(1)
    data = rng.randbytes(60)
    levels = line(data, 7, gap=lambda: rng.randrange(20))
    assert bytes(byte for _, byte in receive(7, levels)) == data


@pytest.mark.parametrize("rate", [0.96, 1.04])
def test_rates_that_differ(rate):
    data = random.Random(2).randbytes(40)
    assert bytes(byte for _, byte in receive(16, line(data, 16 * rate))) == data


def test_latency():
    """Valid 3 cycles after the middle of the stop bit."""
    (at, _), = receive(8, line([0x55], 8))
    assert at == 9 * 8 + 8 // 2 + 3


def test_glitches_and_broken_lines_give_no_bytes():
    glitch = [1] * 8 + [0] * 2 + [1] * 20
    broken = [0] * 500 + [1] * 20
    no_stop = line([0xA5], 8, stop=0) + [0] * 8 + [1] * 16
    levels = glitch + broken + no_stop + line([0x42], 8)
    assert [byte for _, byte in receive(8, levels)] == [0x42]


@pytest.mark.parametrize("divisor", [4, 7])
@pytest.mark.parametrize("stall", [0.0, 0.97])
def test_transmitter(divisor, stall):
    """What is sent is the line of those bytes; without stalls no gap is between them."""
    rng = random.Random(3)
    data = rng.randbytes(16)
    dut = UartTransmitter(divisor=divisor)
    levels = []

    async def feed(ctx):
        for byte in data:
            while rng.random() < stall:
                await ctx.tick()
            ctx.set(dut.i_stream.payload, byte)
            ctx.set(dut.i_stream.valid, 1)
            await ctx.tick().until(dut.i_stream.ready)
            ctx.set(dut.i_stream.valid, 0)
        await ctx.tick().until(dut.i_stream.ready)
        await ctx.tick().repeat(divisor)

    async def watch(ctx):
        while True:
            _, _, level = await ctx.tick().sample(dut.o_tx)
            levels.append(level)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(feed)
    sim.add_testbench(watch, background=True)
    sim.run()
    assert bytes(byte for _, byte in receive(divisor, levels)) == data
    if not stall:
        first = levels.index(0)
        assert levels[first : first + 10 * divisor * len(data)] == line(data, divisor)
        assert set(levels[first + 10 * divisor * len(data) :]) == {1}


@pytest.mark.parametrize("component", [UartReceiver, UartTransmitter])
@pytest.mark.parametrize("divisor", [3, 8.0, "8"])
def test_divisor(component, divisor):
    with pytest.raises(ValueError, match=r"divisor must be an integer from 4 on, not "):
        component(divisor=divisor)
    assert component(divisor=4).divisor == 4
