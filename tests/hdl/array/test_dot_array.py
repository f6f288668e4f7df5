"""DotArray against integer sums and against the golden matrix-vector product."""

from collections import deque

import numpy as np
import pytest
from amaranth.back import rtlil
from amaranth.sim import Simulator

from moeaccel.arithmetic import normalise, quantise_float32
from moeaccel.config import ACTIVATION_SHIFT_MAX, BLOCK, PRESETS
from moeaccel.formats import (
    ALL_FORMATS,
    FORMATS,
    MINIMUM_SHIFT_MAX,
    SHARED_FIELD_BITS,
    in_groups,
    prune,
    quantise,
)
from moeaccel.formats.base import minimum_entries
from moeaccel.formats.patterns import compressed, places
from moeaccel.golden.dot_array import matvec
from moeaccel.hdl.array.dot_array import DotArray
from moeaccel.image.sections import Section, _in_lanes
from tests.support.formats import EVERY, bits, random_minima, scale_entries, sum_entry

TINY = PRESETS["tiny"]
SHAPES = {
    "tiny": TINY,
    "lanes4": TINY.replace(token_lanes=4),
    "rows4": TINY.replace(row_multipliers=4),
    "every": EVERY,
}


class Step:
    """Operands of one step: weights (rows, 32), scales (rows,), lanes (T, 32), shifts (T,)."""

    def __init__(self, fmt, weights, significand, row_shift, mantissas, lane_shift, *, first, last,
                 zeros=None, minimum=None):
        self.fmt, self.first, self.last = fmt, first, last
        self.minimum = np.zeros(len(weights), int) if minimum is None else minimum
        self.zeros = np.zeros(len(weights), int) if zeros is None else zeros
        self.weights, self.mantissas = weights, mantissas
        self.significand, self.row_shift = (  # (rows, scales of a block)
            a.reshape(len(weights), -1) for a in (significand, row_shift))
        self.lane_shift = lane_shift
        self.used = range(len(mantissas))

    @classmethod
    def random(cls, rng, config, fmt, *, extreme=None, first, last):
        """Draw a step; ``extreme`` picks the largest magnitudes that close the accumulator."""
        rows, lanes = fmt.rows(config.row_multipliers), config.token_lanes
        low, high = fmt.low, fmt.high
        weights = rng.choice(fmt.known, (rows, BLOCK))
        zeros = None
        if fmt.parts > 1:  # all as different as they can be
            together = 2 if fmt.packed else 1
            order = rng.permuted(np.tile(np.arange(4), (rows // together, 8, 1)), axis=2)
            weights = weights * np.repeat(order < fmt.nonzeros, together, axis=0).reshape(rows, -1)
        if fmt.zero_point:
            zeros = rng.integers(0, 16, rows)
            weights = rng.integers(0, 16, (rows, BLOCK)) - zeros[:, None]
        minimum = random_minima(rng, rows) if fmt.minimum else None
        scales = rows, fmt.scales_per_step
        significand = rng.integers(0, 2048, scales) if fmt.real_scale else np.ones(scales, int)
        row_shift = rng.integers(0, fmt.max_shift + 1, scales)
        mantissas = rng.integers(-128, 128, (lanes, BLOCK))
        lane_shift = rng.integers(0, ACTIVATION_SHIFT_MAX + 1, lanes)
        if extreme is not None:
            weight, mantissa = extreme
            weights = np.full_like(weights, {-1: low, 1: high}[weight])
            zeros = np.full(rows, 15 if weight < 0 else 0) if fmt.zero_point else None
            weights *= np.arange(BLOCK) % 4 < fmt.nonzeros
            mantissas = np.full_like(mantissas, mantissa)
            significand = np.full(scales, 2047) if fmt.real_scale else significand
            row_shift = np.full(scales, fmt.max_shift)
            lane_shift = np.full(lanes, ACTIVATION_SHIFT_MAX)
            if fmt.minimum:
                minimum = np.full(rows, weight * 2047 << MINIMUM_SHIFT_MAX)
        return cls(fmt, weights, significand, row_shift, mantissas, lane_shift,
                   first=first, last=last, zeros=zeros, minimum=minimum)

    def sums(self):
        """Return the step's contribution, (rows, lanes), as Python integers."""
        per_step = self.significand.shape[1]
        parts = [np.split(a.astype(np.int64), per_step, axis=1)
                 for a in (self.weights, self.mantissas)]
        dots = [w @ x.T for w, x in zip(*parts, strict=True)]
        total = self.mantissas.sum(axis=1)
        return [[sum(int(dot[r, t]) * int(self.significand[r, i])
                     << int(self.row_shift[r, i] + self.lane_shift[t])
                     for i, dot in enumerate(dots))
                 + (int(self.minimum[r]) * int(total[t]) << int(self.lane_shift[t]))
                 for t in range(len(self.mantissas))] for r in range(len(self.weights))]

    def inputs(self, config):
        """Return the step as port values: codes, scales, lanes, zero points, minima, pattern."""
        codes = self.fmt.encode((self.weights + self.zeros[:, None]).astype(np.int8))
        if self.fmt.weight_bits == 2:
            codes |= ~codes << 2 & 12  # bits that say nothing
        selects = 0
        at = places(self.weights, self.fmt) if self.fmt.parts > 1 else None
        if at is not None:
            codes = compressed(codes, at)
        section = Section(self.fmt, len(self.weights), BLOCK, config.row_multipliers)
        if self.fmt.packed:
            codes = codes[0::2] | codes[1::2] << 4
        if at is not None:
            codes = _in_lanes(codes, section)[0]
            selects = bits(_in_lanes(at, section).reshape(-1), 2)
        lanes = 0
        width = 8 * BLOCK + 4
        for t, mantissas in enumerate(self.mantissas):
            value = int.from_bytes(mantissas.astype(np.int8).tobytes(), "little")
            lanes |= (value | int(self.lane_shift[t]) << 8 * BLOCK) << t * width
        scales = scale_entries(config, self.fmt, [
            [int(s) | int(h) << 11 for s, h in zip(*row, strict=True)]
            for row in zip(self.significand, self.row_shift, strict=True)])
        return (int.from_bytes(codes.astype(np.uint8).tobytes(), "little"), bits(scales, 16), lanes,
                bits(self.zeros, 4), bits(minimum_entries(self.minimum), 16), selects)


def run(config, steps, *, gap=0.0, seed=0, gated=True):
    """Feed steps; return [(sums as (rows, lanes) integers, tag, latency)]."""
    dut = DotArray(config, tag_width=8, gated=gated)
    rng = np.random.default_rng(seed)
    entered, results = {}, []
    cycle = 0

    async def bench(ctx):
        nonlocal cycle
        queue = list(enumerate(steps))
        late = deque([0] * DotArray.LANES_LATER_CYCLES)
        drain = DotArray.LATENCY_CYCLES + 2
        while drain:
            if queue and rng.random() >= gap:
                i, step = queue.pop(0)
                codes, scales, lanes, zeros, minima, selects = step.inputs(config)
                if config.parts > 1:
                    ctx.set(dut.i_selects, selects)
                if config.zero_points:
                    ctx.set(dut.i_zeros.as_value(), zeros)
                if config.minima:
                    ctx.set(dut.i_minima.as_value(), minima)
                ctx.set(dut.i_valid, 1)
                ctx.set(dut.i_first, int(step.first))
                ctx.set(dut.i_last, int(step.last))
                ctx.set(dut.i_used, sum(1 << lane for lane in step.used))
                ctx.set(dut.i_format, step.fmt.code)
                ctx.set(dut.i_codes, codes)
                ctx.set(dut.i_scales.as_value(), scales)
                late.append(lanes)
                ctx.set(dut.i_tag, i & 255)
                entered[i & 255] = cycle
            else:
                # Rubbish in the gaps must not matter.
                ctx.set(dut.i_valid, 0)
                ctx.set(dut.i_first, 1)
                ctx.set(dut.i_last, 1)
                ctx.set(dut.i_codes, int(rng.integers(1 << 62)))
                late.append(int(rng.integers(1 << 62)))
                drain -= not queue
            ctx.set(dut.i_lanes.as_value(), late.popleft())
            if ctx.get(dut.o_valid):
                raw = ctx.get(dut.o_sums.as_value())
                tag = ctx.get(dut.o_tag)
                results.append((raw, tag, cycle - entered[tag]))
            await ctx.tick()
            cycle += 1

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(bench)
    sim.run()
    width, lanes = config.accumulator_bits, config.token_lanes

    def entry(raw, i):
        value = raw >> i * width & (1 << width) - 1
        return value - (value >> width - 1 << width)

    lasts = [step.fmt for step in steps if step.last]
    assert len(lasts) == len(results)
    return [([[entry(raw, sum_entry(config, fmt, r) * lanes + t) for t in range(lanes)]
              for r in range(fmt.rows(config.row_multipliers))], *rest)
            for fmt, (raw, *rest) in zip(lasts, results, strict=True)]


def check(config, steps, **kwargs):
    results = run(config, steps, **kwargs)
    expected, total = [], None
    for i, step in enumerate(steps):
        sums = np.array(step.sums(), dtype=object)
        total = sums if step.first else total + sums
        if step.last:
            expected.append((total, i & 255, step.used))
    held = [0] * config.token_lanes
    for (sums, tag, latency), (want, want_tag, used) in zip(results, expected, strict=True):
        assert tag == want_tag
        assert latency == DotArray.LATENCY_CYCLES
        for lane, (column, wanted) in enumerate(zip(np.array(sums, object).T, want.T, strict=True)):
            if lane in used:
                assert column[:len(wanted)].tolist() == wanted.tolist()
            elif kwargs.get("gated", True):
                assert column.tolist() == held[lane]
            held[lane] = column.tolist()


def sequence(rng, config, fmt, lengths, **kwargs):
    return [Step.random(rng, config, fmt, first=i == 0, last=i == n - 1, **kwargs)
            for n in lengths for i in range(n)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gap", "gated"), [(0.0, True), (0.4, True), (0.4, False)])
def test_random_steps_of_all_formats(shape, gap, gated):
    """Formats follow each other without a gap, sums restart with i_first, gaps do nothing."""
    rng = np.random.default_rng(1)
    steps = []
    for _ in range(2):
        for fmt in SHAPES[shape].weight_formats:
            steps += sequence(rng, SHAPES[shape], fmt, rng.integers(1, 6, 3))
    check(SHAPES[shape], steps, gap=gap, gated=gated)


@pytest.mark.parametrize("gated", [True, False])
def test_lanes_without_a_token_hold(gated):
    rng, config = np.random.default_rng(2), SHAPES["lanes4"]
    steps = []
    for used in (range(4), range(1), range(2), range(3), range(4)):
        new = sequence(rng, config, FORMATS["int4_g32"], [2])
        for step in new:
            step.used = used
        steps += new
    check(config, steps, gap=0.2, gated=gated)


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_extreme_operands(name):
    """The largest sums of every sign, max_steps long: the accumulator is exact at its limits."""
    rng = np.random.default_rng(2)
    steps = []
    for weight in (-1, 1):
        for mantissa in (-128, 127):
            steps += sequence(rng, EVERY, ALL_FORMATS[name], [EVERY.max_steps],
                              extreme=(weight, mantissa))
    check(EVERY, steps)


def test_least_8_bit_weight_is_exact():
    """-128 is no mxint8 integer of ours, yet its block sum of 2**19 is right."""
    step = Step(FORMATS["mxint8"], np.full((2, BLOCK), -128), np.ones(2, int), np.array([0, 12]),
                np.full((2, BLOCK), -128), np.array([0, 11]), first=True, last=True)
    check(TINY, [step])


@pytest.mark.parametrize("name", ALL_FORMATS)
@pytest.mark.parametrize("planes", [1, 2])
def test_golden_matvec(name, planes):
    """A whole quantised matrix: the joined and rounded sums are those of the golden model."""
    rng = np.random.default_rng(3)
    fmt, config = ALL_FORMATS[name], EVERY
    rows, k = 2 * fmt.rows(config.row_multipliers), 160
    tokens = config.token_lanes // planes
    floats = rng.normal(size=(rows, k)) * np.exp(rng.normal(size=(rows, 1)))
    weights = quantise(prune(floats, fmt, "magnitude", together=2), fmt)
    x, _ = quantise_float32((rng.normal(size=(tokens, k)) * np.exp(3 * rng.normal(size=(tokens, k)))
                             ).astype(np.float32), planes)
    lanes = np.stack(x.plane_mantissas(), axis=1).reshape(config.token_lanes, k)
    lane_shift = np.repeat(x.shift, planes, axis=0)
    steps, tile_rows = [], fmt.rows(config.row_multipliers)
    for tile in range(0, rows, tile_rows):
        for i in range(k // BLOCK):
            group = slice(first := i // fmt.steps_per_group * fmt.scales_per_step,
                          first + fmt.scales_per_step)
            block = slice(i * BLOCK, (i + 1) * BLOCK)
            some = slice(tile, tile + tile_rows)
            zeros = None
            if fmt.zero_point:
                zeros = fmt.zero_points(in_groups(weights.integers[some], fmt.group))[:, first]
            minimum = weights.minimum[some, first] if fmt.minimum else None
            steps.append(Step(fmt, weights.integers[some, block], weights.significand[some, group],
                              weights.shift[some, group], lanes[:, block], lane_shift[:, i],
                              first=i == 0, last=i == k // BLOCK - 1, zeros=zeros,
                              minimum=minimum))
    sums = np.concatenate([np.array(s[:tile_rows], dtype=np.int64)
                           for s, _, _ in run(config, steps)])
    joined = sums.reshape(rows, tokens, planes)
    total = joined[:, :, 0] if planes == 1 else 256 * joined[:, :, 0] + joined[:, :, 1]
    result = normalise(total.T, x.base[:, None] + weights.row_exponent[None].astype(np.int64))
    expected = matvec(x, weights)
    assert np.array_equal(result.mantissa, expected.mantissa)
    assert np.array_equal(result.exponent, expected.exponent)


def test_packing_is_exact_for_every_operand():
    """All pairs of weights in [-12, 12] with all mantissas: the fields are separate."""
    weights, mantissas = np.arange(-12, 13), np.arange(-128, 128)
    w0, w1, x = np.meshgrid(weights, weights, mantissas, indexing="ij")
    product = ((w1 << SHARED_FIELD_BITS) + w0) * x
    half = 1 << SHARED_FIELD_BITS - 1
    low = ((product + half) & (2 * half - 1)) - half
    assert np.array_equal(low, w0 * x)
    assert np.array_equal((product - low) >> SHARED_FIELD_BITS, w1 * x)
    assert abs((w1 << SHARED_FIELD_BITS) + w0).max() < 1 << 16  # FACTOR_BITS
    assert abs(product).max() < 1 << 23  # PRODUCT_BITS


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.packed])
def test_every_packed_pair_in_the_array(name):
    """All code pairs pass through the RTL's decoder, packing and splitting."""
    fmt, rng = FORMATS[name], np.random.default_rng(4)
    pairs = np.array([(a, b) for a in fmt.integers for b in fmt.integers]).reshape(-1, BLOCK, 2)
    steps = []
    for i in range(0, len(pairs), 2):
        weights = np.concatenate([pairs[i].T, pairs[i + 1].T[::-1]])
        for mantissas in (rng.integers(-128, 128, (2, BLOCK)),
                          np.array([[-128] * BLOCK, [127] * BLOCK])):
            steps.append(Step(fmt, weights, np.ones(4, int), np.zeros(4, int), mantissas,
                              np.zeros(2, int), first=True, last=True))
    check(TINY, steps)


def test_families_have_the_same_structure():
    """The ECP5 array instantiates one MULT18X18D for each multiplier and each scale."""
    text = rtlil.convert(DotArray(TINY, "ecp5"))
    scales = TINY.rows * TINY.token_lanes
    assert text.count("cell \\MULT18X18D") == TINY.multipliers + scales


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (("tiny",), TypeError, "config must be an AcceleratorConfig"),
    ((TINY, "asic"), ValueError, "family must be one of generic, ecp5, xilinx, not 'asic'"),
])
def test_constructor(arguments, error, match):
    with pytest.raises(error, match=match):
        DotArray(*arguments)


def test_tag_width():
    with pytest.raises(ValueError, match="tag_width must be a positive integer, not 0"):
        DotArray(TINY, tag_width=0)
