"""Requests are as long as the configuration allows, and their counts of beats hold them."""

import pytest
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl import layouts
from moeaccel.hdl.memory.memory_port import _Splitter
from moeaccel.interface.commands import ENTRY_BYTES

TINY = PRESETS["tiny"]
MANY = TINY.replace(name="many pairs", max_assignments=1 << 17, max_tokens=1 << 16,
                    token_groups=64)
LONG = TINY.replace(name="long rows", max_dim=32768, tile_words=1024)
LEAST = TINY.replace(name="least", max_dim=64, max_assignments=16, port_bytes=64,
                     quantiser_lanes=8)


@pytest.mark.parametrize("config", [*PRESETS.values(), MANY, LONG, LEAST], ids=lambda c: c.name)
def test_every_request_fits_its_count_of_beats(config):
    sizes = {
        "entry": ENTRY_BYTES, "ids": 4 * config.max_assignments, "x": 4 * config.max_dim,
        "y": 4 * config.max_dim, "partial sums": 8 * config.max_dim,
        "weights": config.max_burst_beats * config.port_bytes,
    }
    most = max(-(-size // config.port_bytes) for size in sizes.values())
    assert layouts.most_beats(config) == most
    assert layouts.read_request(config)["beats"].width == most.bit_length()


def test_the_port_cuts_the_longest_request_in_whole():
    """65,536 beats, one more than 16 bits count, from the middle of a burst on."""
    dut, most = _Splitter(config=MANY), layouts.most_beats(MANY)
    bursts = []

    async def scenario(ctx):
        ctx.set(dut.request.p, {"address": 3 * MANY.port_bytes, "beats": most})
        ctx.set(dut.request.valid, 1)
        await ctx.tick().until(dut.request.ready)
        ctx.set(dut.request.valid, 0)
        await ctx.tick()
        ctx.set(dut.burst.ready, 1)
        while not bursts or not bursts[-1].last:
            (burst,) = await ctx.tick().sample(dut.burst.p).until(dut.burst.valid)
            bursts.append(burst)

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(scenario)
    simulator.run()
    beats = [burst.end - burst.start + 1 for burst in bursts]
    assert sum(beats) == most == 1 << 16 and len(beats) == most // MANY.max_burst_beats + 1
    assert [burst.block for burst in bursts] == list(range(len(beats)))
