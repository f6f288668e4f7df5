import random

import pytest
from amaranth.sim import Simulator

from moeaccel.config import preset
from moeaccel.hdl.activations.lane_buffer import LaneBuffer
from moeaccel.hdl.sequential_multiplier import SequentialMultiplier


def test_write_and_read():
    config = preset("tiny")
    dut = LaneBuffer(config, 2)
    rng = random.Random(1)
    held = [[0] * config.token_lanes for _ in range(1 << dut.address_bits)]
    assert dut.address_bits == 1 + 1 + 3

    async def testbench(ctx):
        for _ in range(400):
            address, mask = rng.randrange(len(held)), rng.randrange(1 << config.token_lanes)
            values = [rng.getrandbits(260) for _ in range(config.token_lanes)]
            look = rng.randrange(len(held))
            ctx.set(dut.w_en, mask)
            ctx.set(dut.w_address, address)
            for lane, value in enumerate(values):
                ctx.set(dut.w_data.as_value()[260 * lane: 260 * (lane + 1)], value)
            ctx.set(dut.r_address, look)
            expected = list(held[look])
            for lane, value in enumerate(values):
                if mask >> lane & 1:
                    held[address][lane] = value
            await ctx.tick().repeat(LaneBuffer.READ_LATENCY_CYCLES)
            if look != address:
                for lane, value in enumerate(expected):
                    got = ctx.get(dut.r_data.as_value()[260 * lane: 260 * (lane + 1)])
                    assert got == value

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(testbench)
    sim.run()


def test_sequential_multiplier():
    dut = SequentialMultiplier(16, 11)
    rng = random.Random(2)

    async def testbench(ctx):
        assert ctx.get(dut.o_done)
        for a, b in [(0, 0), (65535, 2047), (5, 0), (0, 9), (3, 1)] + [
            (rng.getrandbits(16), rng.getrandbits(11)) for _ in range(50)
        ]:
            ctx.set(dut.i_a, a)
            ctx.set(dut.i_b, b)
            ctx.set(dut.i_start, 1)
            await ctx.tick()
            ctx.set(dut.i_start, 0)
            cycles = 1
            while not ctx.get(dut.o_done):
                await ctx.tick()
                cycles += 1
            assert ctx.get(dut.o_product) == a * b
            assert cycles == 1 + b.bit_length()

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(testbench)
    sim.run()


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 'tiny'"):
        LaneBuffer("tiny", 2)
    with pytest.raises(ValueError, match="banks must be a power of two, not 3"):
        LaneBuffer(preset("tiny"), 3)
    with pytest.raises(ValueError, match="b_width must be a positive integer, not 0"):
        SequentialMultiplier(3, 0)
