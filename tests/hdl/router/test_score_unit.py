import itertools

import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.hdl.router.leading import Leading
from moeaccel.hdl.router.line_table import LineTable
from moeaccel.hdl.router.product import Product
from moeaccel.hdl.router.score_unit import ScoreMode, ScoreUnit, signed_digits
from moeaccel.router import tables
from moeaccel.router.choices import Score


def simulate(dut, testbench, *, drive=None):
    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(testbench)
    if drive:
        sim.add_testbench(drive, background=True)
    sim.run()


def stream_through(dut, inputs, outputs):
    """Put rows of inputs in, one a cycle, and return the rows of outputs that belong to them."""
    got = []
    rows = list(zip(*inputs.values(), strict=True))

    async def testbench(ctx):
        for cycle in range(len(rows) + dut.LATENCY_CYCLES):
            if cycle < len(rows):
                for name, value in zip(inputs, rows[cycle], strict=True):
                    ctx.set(getattr(dut, name), int(value))
            if cycle >= dut.LATENCY_CYCLES:
                got.append([ctx.get(getattr(dut, name)) for name in outputs])
            await ctx.tick()

    simulate(dut, testbench)
    return np.array(got).T


@pytest.mark.parametrize(("table", "bits"), [
    (tables.EXP2, 23), (tables.RECIPROCAL, 24), (tables.LOG1P, 24), (tables.SQRT, 24)])
def test_lines(table, bits):
    rng = np.random.default_rng(1)
    positions = np.concatenate([rng.integers(0, 1 << bits, 500), [0, 1, (1 << bits) - 1]])
    (got,) = stream_through(LineTable(table), {"i_position": positions}, ["o_value"])
    assert got.tolist() == table(positions).tolist()


def test_lines_of_two_tables():
    positions = np.arange(0, 1 << 24, 1 << 17)
    which = positions >> 17 & 1
    dut = LineTable(tables.RECIPROCAL, tables.LOG1P)
    (got,) = stream_through(dut, {"i_position": positions, "i_table": which}, ["o_value"])
    assert got.tolist() == np.where(
        which, tables.LOG1P(positions), tables.RECIPROCAL(positions)).tolist()
    with pytest.raises(ValueError, match="tables must have as many segments"):
        LineTable(tables.EXP2, tables.RECIPROCAL)
    with pytest.raises(TypeError, match="tables must be Lines, not"):
        LineTable("exp2")


def test_products():
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 1 << 24, (2, 300))
    a[:2], b[:2] = (1 << 24) - 1, ((1 << 24) - 1, 0)
    (got,) = stream_through(Product(), {"i_a": a, "i_b": b}, ["o_product"])
    assert got.tolist() == (a * b).tolist()


def test_leading():
    rng = np.random.default_rng(3)
    values = rng.integers(0, 1 << 48, 300) >> rng.integers(0, 49, 300)
    values[0] = 0
    mantissa, position = stream_through(
        Leading(), {"i_value": values}, ["o_mantissa", "o_position"])
    want, place = tables.leading(values, 25)
    assert mantissa.tolist() == want.tolist()
    assert position[values > 0].tolist() == place[values > 0].tolist()


@pytest.mark.parametrize("value", [1, 7, 27, tables.LOG2E])
def test_signed_digits(value):
    digits = signed_digits(value)
    assert sum(sign << shift for sign, shift in digits) == value
    shifts = [shift for _, shift in digits]
    assert all(b - a > 1 for a, b in itertools.pairwise(shifts))


def logits_of(rng, n):
    """Return logits of all sizes, near 0, and at the ends."""
    values = np.rint(rng.standard_normal(n) * 2.0**rng.integers(0, 28, n)).astype(np.int64)
    ends = [0, 1, -1, (1 << 31) - 1, -(1 << 31), 32 << 20, -(32 << 20), (32 << 20) - 1]
    values[:len(ends)] = ends
    return values


def expected(mode, logits, reference, total):
    match mode:
        case ScoreMode.EXPONENTIAL:
            return tables.exponential(reference - logits).score
        case ScoreMode.QUOTIENT:
            return tables.quotient(tables.exponential(reference - logits), total)
        case ScoreMode.SIGMOID:
            return tables.sigmoid(logits)
        case ScoreMode.SQRT_SOFTPLUS:
            return tables.sqrt_softplus(logits)


@pytest.mark.parametrize("scores", [(Score.SOFTMAX, Score.SIGMOID), tuple(Score)],
                         ids=["two", "all"])
@pytest.mark.parametrize("mode", ScoreMode)
@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_bits(scores, mode, stall):
    if mode is ScoreMode.SQRT_SOFTPLUS and Score.SQRT_SOFTPLUS not in scores:
        return
    rng = np.random.default_rng(4)
    logits = logits_of(rng, 300)
    reference = int(logits.max())
    if mode in (ScoreMode.EXPONENTIAL, ScoreMode.QUOTIENT):  # most of them near enough
        logits[10:] = reference - np.abs(logits[10:] >> 4)
    total = np.array(tables.exponential(reference - logits).score.sum())
    mantissa, position = tables.leading(total, 25)
    dut = ScoreUnit(scores, tag_bits=9)
    got, cycles = [], []

    async def drive(ctx):
        ctx.set(dut.i_mode, mode)
        ctx.set(dut.i_reference, reference)
        ctx.set(dut.i_reciprocal, int(tables.RECIPROCAL(mantissa & ((1 << 24) - 1))))
        ctx.set(dut.i_position, int(position))
        for tag, logit in enumerate(logits.tolist()):
            while rng.random() < stall:
                ctx.set(dut.i_valid, 0)
                await ctx.tick()
            ctx.set(dut.i_valid, 1)
            ctx.set(dut.i_logit, logit)
            ctx.set(dut.i_tag, tag)
            await ctx.tick()
        ctx.set(dut.i_valid, 0)

    async def collect(ctx):
        for cycle in range(3000):
            *_, valid, score, tag = await ctx.tick().sample(dut.o_valid, dut.o_score, dut.o_tag)
            if valid:
                got.append((tag, score))
                cycles.append(cycle)
            if len(got) == len(logits):
                break

    simulate(dut, collect, drive=drive)
    want = expected(mode, logits, reference, total).tolist()
    assert got == list(enumerate(want))
    assert len(set(want)) > 100
    if not stall:
        assert cycles == [dut.latency_cycles(mode) + i for i in range(len(logits))]


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="scores must be members of Score, not"):
        ScoreUnit(("softmax",))
