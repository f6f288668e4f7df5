"""TileBuffer against real images: every step, every replay, with and without stalls."""

import numpy as np
import pytest
from amaranth.hdl import Module, Signal
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.formats import ALL_FORMATS, FORMATS, QuantisedMatrix
from moeaccel.formats.base import minimum_entries
from moeaccel.hdl.weights.tile_buffer import TileBuffer
from moeaccel.image import Section, pack_section
from tests.support.formats import EVERY, bits, random_minima, scale_entries

TINY = PRESETS["tiny"].replace(max_dim=512)
ROWS4 = TINY.replace(row_multipliers=4)
EVERY512 = EVERY.replace(max_dim=512)
LONG = PRESETS["tiny"].replace(max_dim=2880, tile_words=128)


def random_matrix(rng, fmt, rows, k, biased):
    """Return a matrix with any integers, scales and biases that the format can store."""
    groups = -(-k // fmt.group)
    integers = rng.choice(fmt.integers, (rows, k))
    if fmt.parts > 1:
        together = 2 if fmt.packed else 1
        order = rng.permuted(np.tile(np.arange(4), (rows // together, k // 4, 1)), axis=2)
        there = np.repeat(order < fmt.nonzeros, together, axis=0).reshape(rows, k)
        integers = np.where(there & (integers == 0), fmt.high, integers) * there
    if fmt.zero_point:
        zero = rng.integers(0, 16, (rows, groups))
        integers = integers - np.repeat(zero, fmt.group, axis=1)[:, :k]
    significand = (rng.integers(0, 2048, (rows, groups)) if fmt.real_scale
                   else np.ones((rows, groups)))
    return QuantisedMatrix(
        fmt, integers.astype(np.int8), significand.astype(np.int16),
        rng.integers(0, fmt.max_shift + 1, (rows, groups)).astype(np.int8),
        rng.integers(-300, 300, rows).astype(np.int16), 0,
        rng.integers(0, 1 << 16, rows).astype(np.uint16) if biased else None,
        random_minima(rng, (rows, groups)) if fmt.minimum else None)


class Case:
    """One section; its tiles are used 1 to ``groups`` times, or always ``-groups`` times."""

    def __init__(self, rng, config, name, tiles, k, groups, biased=False):
        self.config = config
        self.fmt = ALL_FORMATS[name]
        self.rows = self.fmt.rows(config.row_multipliers)
        self.matrix = random_matrix(rng, self.fmt, tiles * self.rows, k, biased)
        self.section = Section(
            self.fmt, tiles * self.rows, k, config.row_multipliers, biased=biased)
        image = pack_section(self.matrix, config.row_multipliers)
        self.words = image.reshape(-1, config.word_bytes)
        # The upper two of four bits say nothing where weights have two.
        mask = (0x33 if self.fmt.weight_bits == 2 else 0xFF).to_bytes() * config.word_bytes
        self.mask = int.from_bytes(mask)
        self.groups = groups

    def step(self, tile, step):
        """Return the (codes, scales, zero points, minima, pattern) that the array must see."""
        matrix, fmt, config = self.matrix, self.fmt, self.config
        rows = slice(tile * self.rows, (tile + 1) * self.rows)
        group = step // fmt.steps_per_group * fmt.scales_per_step
        groups = slice(group, group + fmt.scales_per_step)
        scales = (matrix.significand[rows, groups].astype(int)
                  | matrix.shift[rows, groups].astype(int) << 11)
        zeros = np.zeros((self.rows, 1), int)
        codes = matrix.integers[rows, 32 * step:32 * step + 32]
        if fmt.zero_point:
            first = group * fmt.group
            zeros = np.maximum(-matrix.integers[rows, first:first + fmt.group].min(
                axis=1, keepdims=True), 0)
            codes = codes + zeros
        codes = fmt.encode(codes.astype(np.int8))
        minimum = minimum_entries(matrix.minimum[rows, group]) if fmt.minimum else []
        selects = 0
        if fmt.packed:
            codes = codes[0::2] | codes[1::2] << 4
        if fmt.parts > 1:
            codes, selects = self.lanes(codes, matrix.integers[rows, 32 * step:32 * step + 32])
        return (int.from_bytes(np.ascontiguousarray(codes).tobytes(), "little"),
                bits(scale_entries(config, fmt, scales), 16),
                bits(zeros[:, 0], 4) if fmt.zero_point else 0, bits(minimum, 16), selects)

    def lanes(self, codes, integers):
        """Return codes and pattern of an N:M format multiplier by multiplier."""
        fmt, rows = self.fmt, len(codes)
        lanes, selects = np.zeros((self.config.row_multipliers, 32), np.uint8), 0
        fields = len(integers) // rows
        for row in range(rows):
            rm, part = divmod(row, fmt.parts)
            for quad in range(8):
                columns = slice(4 * quad, 4 * quad + 4)
                there = integers[fields * row:fields * (row + 1), columns].any(axis=0)
                for j, column in enumerate(np.nonzero(there)[0]):
                    k = 4 * quad + fmt.nonzeros * part + j
                    lanes[rm, k] = codes[row, 4 * quad + column]
                    selects |= int(column) << 2 * (32 * rm + k)
        return lanes, selects

    def row_exponents(self, tile):
        return self.matrix.row_exponent[tile * self.rows:(tile + 1) * self.rows].tolist()

    def row_biases(self, tile):
        return self.matrix.bias[tile * self.rows:(tile + 1) * self.rows].tolist()


def run(config, cases, *, stall=0.0, take_stall=0.0, seed=0, free=False, depth=16, lag=0):
    """Stream cases through a TileBuffer, check what comes out; return cycles of words and takes.

    ``lag``: cycles before the reader starts.
    """
    m = Module()
    m.submodules.dut = dut = TileBuffer(config, row_exponent_depth=depth)
    cycle = Signal(32)
    m.d.sync += cycle.eq(cycle + 1)
    stream_rng, take_rng, row_rng, section_rng = (
        np.random.default_rng((seed, i)) for i in range(4))
    accepted, taken = [], []
    def now(ctx):
        return ctx.get(cycle)

    async def sections(ctx):
        for case in cases:
            while section_rng.random() < stall:
                await ctx.tick()
            ctx.set(dut.i_section.p.format, case.fmt.code)
            ctx.set(dut.i_section.p.steps, case.section.steps)
            ctx.set(dut.i_section.p.tiles, case.section.tiles)
            if config.bias:
                ctx.set(dut.i_section.p.biased, case.section.biased)
            ctx.set(dut.i_section.valid, 1)
            await ctx.tick().until(dut.i_section.ready)
            ctx.set(dut.i_section.valid, 0)

    async def words(ctx):
        for case in cases:
            for word in case.words:
                while stream_rng.random() < stall:
                    await ctx.tick()
                ctx.set(dut.i_word.payload, int.from_bytes(word.tobytes(), "little"))
                ctx.set(dut.i_word.valid, 1)
                await ctx.tick().until(dut.i_word.ready)
                accepted.append(now(ctx))
                ctx.set(dut.i_word.valid, 0)

    async def rows(ctx):
        rows_out = dut.o_row_exponents
        for case in cases:
            for tile in range(case.section.tiles):
                while row_rng.random() < stall:
                    await ctx.tick()
                ctx.set(rows_out.ready, 1)
                payload, biases = await ctx.tick().sample(
                    rows_out.payload, dut.o_row_biases if config.bias else rows_out.payload,
                ).until(rows_out.valid)
                ctx.set(rows_out.ready, 0)
                want = case.row_exponents(tile)
                assert [payload[i] for i in range(len(want))] == want
                if case.section.biased:
                    want = case.row_biases(tile)
                    assert [biases[i] for i in range(len(want))] == want

    async def take(ctx):
        await ctx.tick().repeat(lag + 1)
        pending = []  # what the outputs must show in the next cycles
        for case in cases:
            steps = case.section.steps
            for tile in range(case.section.tiles):
                groups = -case.groups if case.groups < 0 else int(
                    take_rng.integers(1, case.groups + 1))
                for group in range(groups):
                    for step in range(steps):
                        last_group = group == groups - 1
                        while not ctx.get(dut.o_available) or take_rng.random() < take_stall:
                            await self_check(ctx, pending)
                        ctx.set(dut.i_take, 1)
                        ctx.set(dut.i_tile_end, int(step == steps - 1))
                        ctx.set(dut.i_rewind, int(step == steps - 1 and not last_group))
                        ctx.set(dut.i_free, int(free and last_group))
                        pending.append((case.mask, *case.step(tile, step)))
                        await self_check(ctx, pending)
                        taken.append(now(ctx))
                        ctx.set(dut.i_take, 0)
                        # what these say without i_take must not matter
                        ctx.set(dut.i_tile_end, 1)
                        ctx.set(dut.i_rewind, int(take_rng.integers(2)))

    async def self_check(ctx, pending):
        await ctx.tick()
        if pending:
            mask, codes, scales, zeros, minima, selects = pending[-1]
            assert ctx.get(dut.o_codes) & mask == codes
            assert ctx.get(dut.o_scales.as_value()) == scales
            if config.zero_points:
                assert ctx.get(dut.o_zeros.as_value()) == zeros
            if config.minima:
                assert ctx.get(dut.o_minima.as_value()) == minima
            if selects:
                assert ctx.get(dut.o_selects) == selects

    assert TileBuffer.READ_LATENCY_CYCLES == 1
    sim = Simulator(m)
    sim.add_clock(1e-8)
    for testbench in (sections, words, rows, take):
        sim.add_testbench(testbench)
    sim.run()
    assert len(accepted) == sum(case.section.words for case in cases)
    return accepted, taken


SHAPES = [  # tiles, k
    (1, 32), (20, 32), (3, 64), (2, 288), (5, 160), (17, 96), (2, 512),
]


@pytest.mark.parametrize("config", [TINY, ROWS4, EVERY512, TINY.replace(bias=False)],
                         ids=["rows2", "rows4", "every", "no bias"])
@pytest.mark.parametrize("stall", [0.0, 0.5])
@pytest.mark.parametrize("take_stall", [0.0, 0.5])
def test_images(config, stall, take_stall):
    """Sections of all formats and shapes follow each other; each tile is replayed 1 to 4 times."""
    rng = np.random.default_rng(1)
    cases = [Case(rng, config, name, tiles, k, groups=4, biased=config.bias and biased)
             for tiles, k in SHAPES for name in config.formats for biased in (False, True)]
    order = rng.permutation(len(cases))[:18]
    run(config, [cases[i] for i in order], stall=stall, take_stall=take_stall, free=bool(stall),
        depth=4)


@pytest.mark.parametrize("name", FORMATS)
def test_long_rows(name):
    """K = 2880 (gpt-oss): 90 steps, the last group of 128 is short."""
    run(LONG, [Case(np.random.default_rng(2), LONG, name, 3, 2880, groups=2)], stall=0.1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("tiles", "k"), [(40, 32), (12, 96), (4, 256)])
def test_one_word_per_cycle(name, tiles, k):
    """Without stalls, and with one group, a word enters every cycle; one is lost a section."""
    rng = np.random.default_rng(3)
    cases = [Case(rng, TINY, n, tiles, k, groups=-1, biased=bool(i))
             for i, n in enumerate((name, "int4_g128", name))]
    accepted, _ = run(TINY, cases)
    behind_first = np.cumsum([0] + [case.section.words for case in cases[:-1]])
    pauses, = np.nonzero(np.diff(accepted) - 1)
    assert pauses.tolist() == behind_first.tolist()  # the first word waits for its section
    assert np.diff(accepted).max() == 2


def test_one_tile_as_long_as_the_ring():
    """With i_free the next tile enters while the last group of this one is used: no step waits."""
    rng = np.random.default_rng(4)
    cases = [Case(rng, TINY, "mxfp4", 6, 512, groups=-1)]
    _, taken = run(TINY, cases, free=True, lag=24)
    assert np.all(np.diff(taken) == 1)
    _, taken = run(TINY, cases, free=False, lag=24)
    assert not np.all(np.diff(taken) == 1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("tiles", "k", "groups"),
                         [(12, 32, 3), (10, 96, 2), (5, 256, 2), (4, 64, 5)])
def test_one_step_per_cycle(name, tiles, k, groups):
    """Once weights are ahead, a step leaves every cycle, across rewinds, tile ends and sections."""
    rng = np.random.default_rng(5)
    cases = [Case(rng, TINY, name, tiles, k, groups=-groups) for _ in range(2)]
    _, taken = run(TINY, cases, lag=24)
    assert np.all(np.diff(taken) == 1)


def test_a_step_can_be_taken_two_cycles_later():
    rng = np.random.default_rng(6)
    accepted, taken = run(TINY, [Case(rng, TINY, "int4_g32", 1, 32, groups=-1)])
    assert taken == [accepted[-1] + 2]


def test_constructor():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 'tiny'"):
        TileBuffer("tiny")
    with pytest.raises(ValueError, match="must be an integer of at least 4, not 3"):
        TileBuffer(TINY, row_exponent_depth=3)
