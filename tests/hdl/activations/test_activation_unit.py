import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.activations import ACTIVATIONS, Factor
from moeaccel.arithmetic import InternalFloat, float32_to_internal, normalise
from moeaccel.config import preset
from moeaccel.hdl.activations.activation_unit import ActivationUnit
from moeaccel.image import gate_limit_bits, limit_bits
from moeaccel.tables import gated, ungated


def extreme(rng, n):
    """Return gates over the whole table, outside it, at its ends, tiny and zero."""
    value = rng.standard_normal(n) * 8
    value[: n // 4] = rng.uniform(-16.2, 16.2, n // 4)
    special = [0.0, 16.0, -16.0, np.nextafter(16, 0), np.nextafter(-16, -20), 15.99999, -15.99999,
               2.0**-6, -(2.0**-6), 1e-30, -1e-30, 1e30, -1e30, 2.0**-18, -(2.0**-18), 127.9, 64.0,
               -64.0, 1.0, -1.0, 0.015625 * 3 - 2.0**-18, 2.0**-19, -(2.0**-19), 2.0**-100, 2.0**40]
    value[-len(special):] = special
    exponent = np.frexp(value)[1] - 30
    integer = np.rint(np.ldexp(value, -exponent)).astype(np.int64)
    return normalise(integer, exponent.astype(np.int64))


def limit_form(bits, fraction):
    return {"fraction": bits & (1 << fraction) - 1, "exponent": bits >> fraction}


def run(gates, ups, rng, stall, *, activation="silu", paired=True, limit=None, gate_limit=None,
        at_once=False):
    config = preset("tiny").replace(results_per_cycle=1 + at_once)
    dut = ActivationUnit(config)
    n = len(gates.mantissa)
    act = ACTIVATIONS[activation]
    limits = [None if number is None else float32_to_internal(np.float32(number))
              for number in (limit, gate_limit)]
    expected = gated(gates, ups, act, *limits) if paired else ungated(
        gates, act, limits[gate_limit is not None])
    meta = [(int(rng.integers(config.max_slots)), int(rng.integers(config.max_dim)),
             int(rng.integers(2))) for _ in range(n)]
    got, cycles = [], []

    async def drive(ctx):
        port = dut.i_element
        ctx.set(dut.i_form, {
            "activation": act.code, "rows_log2": paired, "limit": limit_form(limit_bits(limit), 7),
            "gate_limit": limit_form(
                gate_limit_bits(limit if gate_limit is None else gate_limit) >> 7, 16)})
        for i, (slot, index, last) in enumerate(meta):
            if at_once:
                ctx.set(dut.i_up, {
                    "mantissa": int(ups.mantissa[i]), "exponent": int(ups.exponent[i])})
            for odd, value in enumerate((gates, ups) if paired and not at_once else (gates,)):
                while rng.random() < stall:  # nothing, or an element to be combined
                    ctx.set(port.valid, int(rng.integers(2)))
                    ctx.set(port.payload, {"combine": 1, "row": int(rng.integers(2)), "value": {
                        "mantissa": 99999, "exponent": 5}})
                    await ctx.tick()
                ctx.set(port.valid, 1)
                ctx.set(port.payload, {
                    "slot": slot, "row": 2 * index + odd if paired else index,
                    "last": last & odd if paired and not at_once else last, "value": {
                        "mantissa": int(value.mantissa[i]), "exponent": int(value.exponent[i])}})
                await ctx.tick()
        ctx.set(port.valid, 0)

    async def collect(ctx):
        port = dut.o_element
        for cycle in range(100000):
            *_, valid, e = await ctx.tick().sample(port.valid, port.payload)
            if valid:
                magnitude = -e.value.magnitude if e.value.sign else e.value.magnitude
                got.append((magnitude, e.value.exponent, (e.slot, e.index, e.last)))
                cycles.append(cycle)
                if len(got) == n:
                    break
        await ctx.tick().repeat(dut.LATENCY_CYCLES + 2)
        assert not ctx.get(port.valid)

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(collect)
    sim.add_testbench(drive, background=True)
    sim.run()
    want = [(int(a), int(b), c) for a, b, c in zip(
        *expected, meta, strict=True)]
    assert got == want
    if not stall:
        apart = 2 if paired and not at_once else 1
        assert cycles == [apart - 1 + dut.LATENCY_CYCLES + apart * i for i in range(n)]


@pytest.mark.parametrize("paired", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize(("activation", "stall", "limit"), [
    ("silu", 0.0, None), ("silu", 0.3, 7.0), ("relu", 0.3, None), ("gelu", 0.0, 2.0**-20),
    ("gelu_tanh", 0.0, None), ("relu2", 0.0, None), ("relu2", 0.3, 1.9921875),
    ("gpt_oss", 0.0, 7.0), ("gpt_oss", 0.3, None)])
def test_bits(activation, stall, limit, paired):
    rng = np.random.default_rng(4)
    gates = extreme(rng, 150)
    ups = extreme(rng, 150)
    order = rng.permutation(150)
    run(gates, ups[order], rng, stall, activation=activation, limit=limit, paired=paired)


@pytest.mark.parametrize("paired", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_limit_of_the_gate_alone(limit, paired):
    rng = np.random.default_rng(11)
    run(extreme(rng, 60), extreme(rng, 60), rng, 0.0, limit=limit, gate_limit=7.00640869140625,
        paired=paired)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("activation", "limit"), [
    ("silu", None), ("silu", 4.0), ("gpt_oss", None)])
def test_second_up_rows(activation, limit, at_once):
    """Rows of four: tiles end between the pairs of a slot, and others' pairs come between them."""
    rng = np.random.default_rng(9)
    config = preset("tiny").replace(results_per_cycle=1 + at_once, second_up=True)
    dut = ActivationUnit(config)
    slots, n = config.max_slots, 24
    gates, ups, seconds = (extreme(rng, slots * n) for _ in range(3))
    most = None if limit is None else float32_to_internal(np.float32(limit))
    act = ACTIVATIONS[activation]
    expected = gated(gates, ups, act, most, None, seconds)
    got = []

    async def drive(ctx):
        port, bits = dut.i_element, limit_bits(limit)
        ctx.set(dut.i_form, {
            "activation": act.code, "rows_log2": 2, "limit": limit_form(bits, 7),
            "gate_limit": limit_form(bits << 9, 16)})

        def number(values, at):
            return {"mantissa": int(values.mantissa[at]), "exponent": int(values.exponent[at])}

        ctx.set(port.valid, 1)
        for index in range(n):
            for second in range(2):
                for slot in range(slots):
                    at = index * slots + slot
                    pair = number(seconds if second else gates, at), number(
                        seconds if second else ups, at)
                    row = 4 * index + 2 * second
                    if at_once:
                        ctx.set(dut.i_up, pair[1])
                    for odd, value in enumerate(pair[:2 - at_once]):
                        ctx.set(port.payload, {
                            "slot": slot, "row": row + odd, "value": value})
                        await ctx.tick()
        ctx.set(port.valid, 0)

    async def collect(ctx):
        port = dut.o_element
        while len(got) < slots * n:
            *_, valid, e = await ctx.tick().sample(port.valid, port.payload)
            if valid:
                magnitude = -e.value.magnitude if e.value.sign else e.value.magnitude
                got.append((magnitude, e.value.exponent, e.index * slots + e.slot))

    sim = Simulator(dut)
    sim.add_clock(1e-9)
    sim.add_testbench(collect)
    sim.add_testbench(drive, background=True)
    sim.run_until(1e-6 * slots)
    assert got == [(int(a), int(b), at) for at, (a, b) in enumerate(
        zip(*expected, strict=True))]


@pytest.mark.parametrize("paired", [True, False], ids=["gated", "ungated"])
def test_gate_and_up_come_at_once(paired):
    rng = np.random.default_rng(8)
    run(extreme(rng, 60), extreme(rng, 60), rng, 0.0, paired=paired, at_once=True)


def test_an_offset_that_nearly_cancels():
    """Up rows about -1, and so far from 1 that nothing is left of either."""
    rng = np.random.default_rng(7)
    mantissa = np.r_[-(1 << 16) + np.arange(-20, 20), rng.integers(1 << 16, 1 << 17, 160)]
    exponent = np.r_[np.full(40, -16), np.arange(160) - 96]
    ups = normalise(np.concatenate([mantissa, [0, -65536]]), np.concatenate([exponent, [0, -16]]))
    gates = extreme(rng, 202)
    run(gates, ups, rng, 0.0, activation="gpt_oss")


def test_far_exponents():
    rng = np.random.default_rng(5)
    n = 200
    mantissa = rng.integers(1 << 16, 1 << 17, n) * rng.choice([-1, 1], n)
    gates = InternalFloat(mantissa, rng.integers(-500, 300, n))
    ups = InternalFloat(rng.permutation(mantissa), rng.integers(-400, 300, n))
    run(gates, ups, rng, 0.0)


@pytest.mark.parametrize("activation", [a.name for a in ACTIVATIONS.values()
                                        if a.factor is Factor.TABLE])
def test_every_segment(activation):
    rng = np.random.default_rng(6)
    gates = normalise(((np.arange(2048) - 1024) << 12) + rng.integers(0, 4096, 2048), -18)
    one = InternalFloat(np.full(2048, 1 << 16), np.full(2048, -16))
    run(gates, one, rng, 0.0, activation=activation)


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 'tiny'"):
        ActivationUnit("tiny")
    with pytest.raises(ValueError, match="family must be one of generic, ecp5, xilinx, not"):
        ActivationUnit(preset("tiny"), "ice40")
