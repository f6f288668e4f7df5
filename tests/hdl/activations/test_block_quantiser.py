import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.arithmetic import BLOCK, RAISE_THRESHOLD, quantise_elements, split_float32
from moeaccel.config import AcceleratorConfig, preset
from moeaccel.hdl.activations.block_quantiser import BlockQuantiser
from tests.support.elements import float32_rows, lane_value, lane_writes, monitor_lanes

NARROW = AcceleratorConfig(
    name="narrow", port_bytes=8, token_lanes=4, token_groups=1, max_dim=96, quantiser_lanes=1)
WIDE = AcceleratorConfig(
    name="wide", port_bytes=64, token_lanes=8, token_groups=2, max_dim=160, quantiser_lanes=16)


def groups(config, significand, exponent, planes, offset):
    """Return the groups of every row, one row a slot, as constants for ``i_group``."""
    count = config.quantiser_lanes
    top = exponent + 23
    raised = np.abs(significand) >= RAISE_THRESHOLD
    out = []
    for slot, (s_row, t_row, r_row) in enumerate(zip(significand, top, raised, strict=True)):
        alive = s_row != 0
        token_top = int(t_row[alive].max()) if alive.any() else 7
        for step in range(len(s_row) // BLOCK):
            part = slice(step * BLOCK, (step + 1) * BLOCK)
            s, t, r, a = s_row[part], t_row[part], r_row[part], alive[part]
            largest = int(t[a].max()) if a.any() else 3
            block = {"zero": int(not a.any()), "top": largest + offset,
                     "raised": int((r & a & (t == largest)).any())}
            for first in range(0, BLOCK, count):
                out.append({
                    "elements": [
                        {"significand": int(abs(s[k])), "sign": int(s[k] < 0),
                         "top": int(t[k]) + offset}
                        for k in range(first, first + count)
                    ],
                    "block": block, "token_top": token_top + offset,
                    "token_zero": int(not alive.any()), "two_planes": planes - 1,
                    "block_end": int(first + count == BLOCK),
                    "slot_end": int(first + count == BLOCK and (step + 1) * BLOCK == len(s_row)),
                    "step": step, "slot": slot, "bank": slot & 1,
                })
    return out


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("config", "offset"), [(preset("tiny"), 127), (NARROW, 0), (WIDE, -16)])
def test_bits(config, offset, planes):
    rng = np.random.default_rng(planes)
    slots = config.max_slots // planes
    dim = config.max_dim
    dut = BlockQuantiser(config, offset)
    lanes, bases = {}, {}
    expected, expected_bases = {}, {}
    batches = []
    for _ in range(max(1, 16 // slots)):
        rows = rng.permutation(float32_rows(rng, 16, dim))[:slots]
        significand, exponent, _ = split_float32(rows)
        batches.append((groups(config, significand, exponent, planes, offset),
                        quantise_elements(significand, exponent, planes)))

    async def testbench(ctx):
        for sequence, blocks in batches:
            for group in sequence:
                while rng.random() < 0.1:
                    ctx.set(dut.i_valid, 0)
                    await ctx.tick()
                ctx.set(dut.i_valid, 1)
                ctx.set(dut.i_group, group)
                await ctx.tick()
            ctx.set(dut.i_valid, 0)
            await ctx.tick().repeat(dut.LATENCY_CYCLES + 1)
            expected.clear()
            expected_bases.clear()
            for slot in range(slots):
                one = lane_writes(config, blocks, range(slots), slot & 1)
                expected.update({k: v for k, v in one.items() if (
                    k[1] * config.token_lanes + k[3]) // planes == slot})
                expected_bases[slot & 1, slot] = int(blocks.base[slot])
            assert lanes == expected
            assert bases == expected_bases
            lanes.clear()
            bases.clear()

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(testbench)
    sim.add_testbench(monitor_lanes(dut, config, lanes, bases), background=True)
    sim.run()


def test_latency_and_throughput():
    config = preset("tiny")
    dut = BlockQuantiser(config)
    significand = np.full((1, 64), 1 << 23)
    sequence = groups(config, significand, np.zeros_like(significand), 1, 0)

    async def testbench(ctx):
        writes = []
        for cycle in range(len(sequence) + dut.LATENCY_CYCLES + 1):
            ctx.set(dut.i_valid, cycle < len(sequence))
            if cycle < len(sequence):
                ctx.set(dut.i_group, sequence[cycle])
            if ctx.get(dut.w_en):
                writes.append(cycle)
                assert lane_value(ctx.get(dut.w_data)[0]) == ([64] * BLOCK, 10)
            await ctx.tick()
        per_block = BLOCK // config.quantiser_lanes
        assert writes == [n * per_block - 1 + dut.LATENCY_CYCLES for n in (1, 2)]

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(testbench)
    sim.run()


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not None"):
        BlockQuantiser(None)
    with pytest.raises(ValueError, match="offset must be an integer from -1024 to 1023"):
        BlockQuantiser(preset("tiny"), 0.5)
