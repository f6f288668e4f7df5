import random

import numpy as np
import pytest
from amaranth.hdl import unsigned
from amaranth.sim import Simulator

from moeaccel.arithmetic import add, bfloat16_to_internal, normalise
from moeaccel.config import AcceleratorConfig, preset
from moeaccel.formats import ALL_FORMATS
from moeaccel.hdl import layouts
from moeaccel.hdl.array.float_adder import FloatAdder
from moeaccel.hdl.array.normaliser import Normaliser
from moeaccel.hdl.array.result_serialiser import ResultSerialiser
from tests.support.formats import sum_entry

WIDE = AcceleratorConfig(
    name="wide", port_bytes=64, token_lanes=8, token_groups=2, row_multipliers=4, max_dim=256,
    read_ahead_beats=128, quantiser_lanes=8)
SINGLE = AcceleratorConfig(name="single", port_bytes=8, token_lanes=4, token_groups=1)


@pytest.mark.parametrize(("width", "zeros"), [(62, None), (34, 1), (48, None), (30, 1), (20, 5)])
def test_normaliser(width, zeros):
    rng = np.random.default_rng(width)
    bits = 24 if width == 48 else 17
    dut = Normaliser(width, exponent_bits=14, mantissa_bits=bits, max_leading_zeros=zeros,
                     tag=unsigned(9))
    least = 0 if zeros is None else width - zeros
    values = [0, (1 << width) - 1, 1 << (width - 1), (1 << width) - (1 << (width - bits - 1))]
    for _ in range(300):
        length = int(rng.integers(max(least, 1), width + 1))
        value = int(rng.integers(1 << 62)) % (1 << (length - 1)) + (1 << (length - 1))
        if rng.random() < 0.3 and length > bits:  # ties and near ties
            unit = 1 << (length - bits)
            value = value // unit * unit + unit // 2 + int(rng.integers(-1, 2))
            value = min(value, (1 << length) - 1)
        values.append(value)
    expected = []
    for i, value in enumerate(values):
        if bits == 17:
            e = normalise(np.array([value]), i - 150)
            expected.append((i & 1 & (value != 0), int(e.mantissa[0]), int(e.exponent[0]), i))
        else:
            shift = value.bit_length() - bits
            half = (1 << shift >> 1) if shift > 0 else 0
            m = (value + half) >> shift if shift > 0 else value << -shift
            if shift > 0 and (value + half) % (1 << shift) == 0:
                m &= ~1
            if m == 1 << bits:
                m, shift = m >> 1, shift + 1
            expected.append((i & 1 & (value != 0), m, i - 150 + shift if value else 0, i))

    async def testbench(ctx):
        got = []
        for i in range(len(values) + dut.latency_cycles):
            if i < len(values):
                ctx.set(dut.i_valid, 1)
                ctx.set(dut.i_sign, i & 1)
                ctx.set(dut.i_magnitude, values[i])
                ctx.set(dut.i_exponent, i - 150)
                ctx.set(dut.i_tag, i)
            else:
                ctx.set(dut.i_valid, 0)
            if ctx.get(dut.o_valid):
                assert i >= dut.latency_cycles
                got.append(tuple(ctx.get(s) for s in (
                    dut.o_sign, dut.o_magnitude, dut.o_exponent, dut.o_tag)))
            await ctx.tick()
        assert got == expected

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(testbench)
    sim.run()


def sums_of(rng, config):
    """Return one result's sums with all sizes, zeros and negative numbers."""
    limit = config.accumulator_bits - 2
    sums = []
    for _ in range(config.rows * config.token_lanes):
        value = int(rng.integers(1 << 62)) >> int(rng.integers(62 - limit, 63))
        kind = rng.random()
        if kind < 0.1:
            value = 0
        elif kind < 0.3 and value >= 1 << 18:  # ties
            unit = 1 << (value.bit_length() - 17)
            value = value // unit * unit + unit // 2
        elif kind < 0.4:
            value = (1 << limit) - 1
        sums.append(-value if rng.random() < 0.5 else value)
    return sums


class Bench:
    """Plays sequencer and array: tiles times groups, one result each, as credits allow."""

    def __init__(self, config, sections, *, seed=0, stall=0.0, part=0):
        self.config = config
        self.part = part
        self.dut = ResultSerialiser(config, part)
        self.rng = np.random.default_rng(seed)
        self.stalls = random.Random(seed)
        self.stall = stall
        self.bases = {
            (hidden, bank, slot): int(self.rng.integers(-180, 100))
            for hidden in (0, 1) for bank in (0, 1) for slot in range(config.max_slots)
        }
        self.results, self.row_exponents, self.expected, self.got = [], [], [], []
        self.row_biases = []
        for section in sections:
            self.section(**section)

    def section(self, *, tiles, count, hidden=0, combine=0, two=0, name="int4_g32", bank=0,
                fresh=0, short=0, biased=0):
        config, fmt = self.config, ALL_FORMATS[name]
        per_group = config.token_lanes // (1 + two)
        groups = -(-count // per_group)
        tile_rows = fmt.rows(config.row_multipliers)
        for tile in range(tiles):
            rows = tile_rows - (short if tile + 1 == tiles else 0)
            exponents = self.rng.integers(-200, 100, config.rows).tolist()
            parts = config.results_per_cycle
            self.row_exponents.append(exponents[self.part::parts])
            biases = self.biases(exponents)
            self.row_biases.append(biases.tolist()[self.part::parts])
            for group in range(groups):
                slots = min(per_group, count - group * per_group)
                last_group = group + 1 == groups
                tag = {
                    "group": group, "row": tile * tile_rows, "missing": config.rows - rows,
                    "slots": slots, "last_group": last_group,
                    "last": last_group and tile + 1 == tiles, "hidden": hidden, "combine": combine,
                    "two_planes": two, "x_bank": bank, "slot_bank": bank ^ 1, "fresh": fresh,
                    **({"biased": biased} if config.bias else {}),
                    "row_order": layouts.row_orders(config).index((fmt.packed, fmt.parts)),
                }
                sums = sums_of(self.rng, config)
                own = sums if parts == 1 else np.reshape(sums, (config.rows, -1))[[
                    sum_entry(config, fmt, r) % config.rows
                    for r in range(self.part, config.rows, parts)]].ravel().tolist()
                self.results.append((own, {k: int(v) for k, v in tag.items()}))
                for j in range(slots):
                    for r in range(self.part, rows, parts):
                        at = sum_entry(config, fmt, r) * config.token_lanes
                        value = sums[at + j]
                        if two:
                            value = 256 * sums[at + 2 * j] + sums[at + 2 * j + 1]
                        slot = group * per_group + j
                        base = self.bases[hidden, 0 if hidden else bank, slot]
                        e = normalise(np.array([value]), base + exponents[r])
                        if biased:
                            e = add(e, bfloat16_to_internal(biases[r:r + 1]))
                        last = tag["last"] and j + 1 == slots and (
                            r // parts == (rows - 1) // parts)
                        self.expected.append((
                            slot, tile * tile_rows + r, int(e.mantissa[0]), int(e.exponent[0]),
                            combine, int(last), bank ^ 1, fresh))

    def biases(self, exponents):
        """Return bfloat16 numbers as large as a tile's results, and zeros, infinity's bits too."""
        field = np.clip(np.array(exponents) + 127 + 30 + self.rng.integers(-30, 30, len(exponents)),
                        0, 255)
        bits = field << 7 | self.rng.integers(0, 1 << 7, len(exponents))
        bits |= self.rng.integers(0, 2, len(exponents)) << 15
        return np.where(self.rng.random(len(exponents)) < 0.1, 0x8000, bits).astype(np.uint16)

    async def drive(self, ctx):
        dut = self.dut
        for sums, tag in self.results:
            while not ctx.get(dut.o_free) or self.stalls.random() < self.stall:
                await ctx.tick()
            ctx.set(dut.i_valid, 1)
            ctx.set(dut.i_sums, sums)
            ctx.set(dut.i_tag, tag)
            await ctx.tick()
            ctx.set(dut.i_valid, 0)

    async def exponents(self, ctx):
        port = self.dut.i_row_exponents
        for exponents, biases in zip(self.row_exponents, self.row_biases, strict=True):
            while self.stalls.random() < self.stall:
                await ctx.tick()
            ctx.set(port.valid, 1)
            ctx.set(port.payload, exponents)
            if self.config.bias:
                ctx.set(self.dut.i_row_biases, biases)
            await ctx.tick().until(port.ready)
            ctx.set(port.valid, 0)

    async def base(self, ctx):
        dut = self.dut
        while True:
            *_, a = await ctx.tick().sample(dut.base_address)
            ctx.set(dut.base_data, self.bases[a.hidden, a.bank, a.slot])

    async def collect(self, ctx):
        port = self.dut.o_element
        cycle, cycles = 0, []
        while len(self.got) < len(self.expected):
            *_, valid, e = await ctx.tick().sample(port.valid, port.payload)
            cycle += 1
            assert cycle < 100000
            if valid:
                cycles.append(cycle)
                self.got.append((e.slot, e.row, e.value.mantissa, e.value.exponent, e.combine,
                                 e.last, e.slot_bank, e.fresh))
        assert self.got == self.expected
        await ctx.tick().repeat(30)
        assert not ctx.get(port.valid)
        assert ctx.get(self.dut.o_free) == self.dut.config.result_places
        self.cycles = cycles

    def run(self):
        sim = Simulator(self.dut)
        sim.add_clock(1e-8)
        sim.add_testbench(self.collect)
        for process in (self.drive, self.exponents, self.base):
            sim.add_testbench(process, background=True)
        sim.run()


def sections(config):
    slots = config.max_slots
    return [
        {"tiles": 3, "count": slots, "two": 0},
        {"tiles": 3, "count": slots // 2, "two": 1, "bank": 1},
        {"tiles": 2, "count": slots // 2 - 1, "two": 1, "hidden": 1, "combine": 1,
         "bank": 1, "fresh": 1},
        {"tiles": 4, "count": 1, "two": 0, "name": "mxint8", "hidden": 1, "combine": 1},
        {"tiles": 4, "count": slots - 1, "name": "mxint8", "combine": 1, "bank": 1},
        {"tiles": 3, "count": 1, "two": 1, "name": "mxint8"},
        {"tiles": 2, "count": slots // 2, "two": 1, "short": 1, "hidden": 1, "combine": 1},
        {"tiles": 1, "count": slots, "short": 2 * config.row_multipliers - 2},
        {"tiles": 3, "count": slots - 1, "name": "mxint8", "short": config.row_multipliers - 1,
         "hidden": 1, "combine": 1},
    ]


def mixed(config):
    """Return these with and without biases."""
    return [{**section, "biased": biased} for i, section in enumerate(sections(config))
            for biased in ((1, 0), (0, 1), (1,))[i % 3]]


@pytest.mark.parametrize("stall", [0.0, 0.6])
@pytest.mark.parametrize("config", [preset("tiny"), SINGLE, WIDE.replace(bias=False)])
def test_bits_and_order(config, stall):
    Bench(config, sections(config), stall=stall).run()


@pytest.mark.parametrize("stall", [0.0, 0.6])
@pytest.mark.parametrize("config", [preset("tiny"), WIDE])
def test_biases(config, stall):
    """With and without in turn: results that pass by the adder do not overtake those in it."""
    Bench(config, mixed(config), stall=stall).run()


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("config", [preset("tiny"), WIDE])
def test_two_results_a_cycle(config, part):
    config = config.replace(results_per_cycle=2)
    Bench(config, mixed(config), part=part).run()


def test_one_element_per_cycle():
    bench = Bench(preset("small"), [{"tiles": 6, "count": 9, "two": t, "name": name}
                                    for t in (0, 1) for name in ("mxint8", "int4_g32")])
    bench.run()
    # `drive` offers a result in each cycle, `exponents` pauses for one cycle after each tile
    assert bench.cycles[0] == 1 + bench.dut.latency_cycles
    assert bench.cycles[-1] - bench.cycles[0] + 1 == len(bench.expected)


def test_biases_cost_the_adders_latency():
    """Once: rows with biases follow each other as others do, and those without wait for them."""
    shape = {"tiles": 3, "count": 9}
    bench = Bench(preset("small"), [{**shape, "biased": 1}, {**shape, "biased": 1}, shape])
    bench.run()
    assert bench.cycles[0] == 1 + bench.dut.latency_cycles + FloatAdder.LATENCY_CYCLES
    apart = np.diff(bench.cycles)
    assert np.all(apart == 1)  # from the last with one to the first without, too: both are later
    assert len(bench.cycles) == len(bench.expected)
    bench = Bench(preset("small"), [shape, {**shape, "biased": 1}])
    bench.run()
    apart = np.diff(bench.cycles)
    assert sorted(apart)[-2:] == [1, 1 + FloatAdder.LATENCY_CYCLES]


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 'tiny'"):
        ResultSerialiser("tiny")
    with pytest.raises(ValueError, match="mantissa_bits must be an integer from 2 to width - 1"):
        Normaliser(12, exponent_bits=12)
    with pytest.raises(ValueError, match="max_leading_zeros must be an integer from 1 to width"):
        Normaliser(30, exponent_bits=12, max_leading_zeros=30)
