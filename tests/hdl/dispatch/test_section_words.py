"""Words and tiles of a section in hardware, beside those of its shape."""

import random

import pytest
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.dispatch.section_words import SectionWords
from moeaccel.image import Section
from tests.support.formats import EVERY

CONFIGS = [
    PRESETS["tiny"], EVERY, PRESETS["wide512"].replace(bias=False),
    PRESETS["tiny"].replace(channels=32, row_multipliers=16, tile_words=1024, max_dim=32768)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.name}x{c.channels}")
def test_words_and_tiles_are_those_of_the_section(config):
    rng = random.Random(1)
    cases = [
        (fmt, rng.choice((1, 2, config.max_steps * 2, rng.randint(1, 2 * config.max_steps))),
         rng.choice((1, config.max_steps, rng.randint(1, config.max_steps))),
         config.bias and rng.random() < 0.5)
        for _ in range(20) for fmt in config.weight_formats]
    dut = SectionWords(config)

    async def scenario(ctx):
        for fmt, blocks, steps, biased in cases:
            section = Section(fmt, 32 * blocks, 32 * steps, config.row_multipliers, config.channels,
                              biased)
            ctx.set(dut.i_biased, biased)
            ctx.set(dut.i_format, fmt.code)
            ctx.set(dut.i_steps, steps)
            ctx.set(dut.i_row_blocks, blocks)
            ctx.set(dut.i_start, 1)
            await ctx.tick()
            ctx.set(dut.i_start, 0)
            cycles = 1
            while not ctx.get(dut.o_done):
                await ctx.tick()
                cycles += 1
            assert cycles == section.weight_words.bit_length() + 3
            assert ctx.get(dut.o_words) == section.words, section
            assert ctx.get(dut.o_tiles) == section.tiles, section
            assert ctx.get(dut.o_short) == -section.channel_rows % config.rows, section

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(scenario)
    sim.run()
