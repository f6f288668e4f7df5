import numpy as np
from amaranth.hdl import unsigned
from amaranth.sim import Simulator

from moeaccel.arithmetic import InternalFloat, add
from moeaccel.hdl.array.float_adder import FloatAdder


def pairs(rng, n):
    """Return pairs of internal floats that are near and far, cancel, tie and are zero."""
    mantissa = rng.integers(1 << 16, 1 << 17, (2, n))
    mantissa[:, : n // 3] = rng.choice(
        [1 << 16, (1 << 16) + 1, (1 << 17) - 1, (1 << 17) - 2, 3 << 15], (2, n // 3))
    mantissa[1, ::7] = mantissa[0, ::7] + rng.integers(-1, 2, len(mantissa[0, ::7]))
    mantissa = np.clip(mantissa, 1 << 16, (1 << 17) - 1) * rng.choice([-1, 1], (2, n))
    exponent = rng.integers(-600, 600, n) + np.stack([
        np.zeros(n, int), rng.choice([*range(-22, 23), *[0, 1, -1] * 8, 31, 32, -33, 64, -1000,
                                      1000], n)])
    mantissa[:, 1::11][rng.integers(2)] = 0
    mantissa[0, 2::13] = 0
    mantissa[1, 3::13] = 0
    exponent = np.where(mantissa == 0, 0, exponent)
    return (InternalFloat(mantissa[i], exponent[i]) for i in (0, 1))


def test_bits_and_latency():
    rng = np.random.default_rng(1)
    n = 3000
    a, b = pairs(rng, n)
    expected = add(a, b)
    gaps = rng.random(n) < 0.1
    dut = FloatAdder(tag=unsigned(12))

    async def testbench(ctx):
        got, offered = [], {}
        cycle = 0
        for i in range(n + dut.LATENCY_CYCLES):
            for waits in ([1, 0] if i < n and gaps[i] else [0]):
                ctx.set(dut.i_valid, int(i < n and not waits))
                if i < n and not waits:
                    for port, value in ((dut.i_a, a), (dut.i_b, b)):
                        ctx.set(port, {"sign": int(value.mantissa[i] < 0),
                                       "magnitude": abs(int(value.mantissa[i])),
                                       "exponent": int(value.exponent[i])})
                    ctx.set(dut.i_tag, i)
                    offered[i] = cycle
                if ctx.get(dut.o_valid):
                    tag = ctx.get(dut.o_tag)
                    assert cycle == offered[tag] + dut.LATENCY_CYCLES
                    value = ctx.get(dut.o_sum)
                    assert not (value.sign and not value.magnitude)
                    got.append((tag, -value.magnitude if value.sign else value.magnitude,
                                value.exponent))
                await ctx.tick()
                cycle += 1
        assert got == [(i, int(m), int(e)) for i, (m, e) in enumerate(
            zip(expected.mantissa, expected.exponent, strict=True))]

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(testbench)
    sim.run()


def test_golden_is_exact():
    """Against fractions: the nearest number of 17 bits, the even one of two."""
    from fractions import Fraction

    rng = np.random.default_rng(2)
    a, b = pairs(rng, 2000)
    total = add(a, b)
    for ma, ea, mb, eb, m, e in zip(a.mantissa, a.exponent, b.mantissa, b.exponent,
                                    total.mantissa, total.exponent, strict=True):
        exact = Fraction(2) ** int(ea) * int(ma) + Fraction(2) ** int(eb) * int(mb)
        if not exact:
            assert (m, e) == (0, 0)
            continue
        assert 1 << 16 <= abs(int(m)) < 1 << 17
        error = abs(exact - Fraction(2) ** int(e) * int(m))
        half = Fraction(2) ** (int(e) - 1)
        # Below a power of two the next number is half as far away; add never rounds away from it.
        assert error < half or (error == half and m % 2 == 0)
