"""cocotb bench of the whole accelerator: runs inside the simulator, started by test_top.py.

The accelerator is seen from outside only: AXI4-Lite, AXI4, interrupt. Everything it reads was put
into the memory before; everything it writes is compared with the golden model, bit for bit.
"""

from __future__ import annotations

import cocotb
import numpy as np
from cocotb.triggers import ClockCycles, FallingEdge

from moeaccel.formats import FORMATS
from moeaccel.interface.commands import ENTRY_BYTES, LAYER, NonFinite, Opcode, Status, encode
from moeaccel.interface.registers import ID_VALUE, VERSION_VALUE
from moeaccel.sim import bfm
from moeaccel.sim.cosim.memory import StallModel
from moeaccel.sim.workload import register_writes
from tests.cocotb.top_testbench import (
    COMMAND_CYCLES,
    CONFIG,
    LANES,
    SEED,
    SLOTS,
    STALLS,
    TIMEOUT,
    Work,
    started,
)


# -- registers -------------------------------------------------------------------------------------
@cocotb.test(**TIMEOUT)
async def registers(dut):
    """Identity, storage, and answers while nothing runs."""
    bench = await started(dut)
    assert await bench.read_register("ID") == ID_VALUE
    assert await bench.read_register("VERSION") == VERSION_VALUE
    assert await bench.read_register("CONFIG_HASH") == CONFIG.digest
    for name, value in [("SQ_BASE_LO", 0x1234_5640), ("CQ_BASE_HI", 0x12), ("WATCHDOG", 77),
                        ("WINDOW_LIMIT_LO", 0xFEDC_B000)]:
        await bench.write_registers(register_writes(**{name: value}))
        assert await bench.read_register(name) == value, name
    await bench.set_up()
    await bench.write_registers(register_writes(WATCHDOG=0))
    await bench.run(Work({"opcode": Opcode.NOP}))
    assert await bench.read_register("SQ_HEAD") == 1
    assert await bench.read_register("CQ_TAIL") == 1
    await bench.end()


# -- arithmetic ------------------------------------------------------------------------------------
@cocotb.test(**TIMEOUT)
@cocotb.parametrize(weight_format=list(FORMATS), planes=[1, 2])
async def formats(dut, weight_format, planes):
    """Every weight format and activation precision; a short last group for int4_g128."""
    bench = await started(dut)
    layer = bench.layer(experts=3, d_model=160, d_expert=64, weight_format=weight_format,
                        planes=planes)
    await bench.run(bench.experts(layer, [[0, 2], [1, 0], [2, 1]]))
    await bench.end()


# Keys have at most ten characters, so that cocotb shows them in the names of the tests.
ROUTINGS = {
    "one_token": [[2, 0]],
    "lanes_1": [[1]] * (LANES + 1),
    "slots_1": [[0, 3]] * (SLOTS + 1),
    "repeated": [[1, 1, 1], [0, 2, 0], [3, 3, 1]],
    "foreign": [[-1, 4], [0, -(1 << 31)], [(1 << 31) - 1, 3], [2, 7]],
    "nothing": [[-1], [99]],
    "sparse": [[-1], [2], [-1], [2], [-1], [0], [2]],
}


@cocotb.test(**TIMEOUT)
@cocotb.parametrize(routing=list(ROUTINGS), planes=[1, 2])
async def routings(dut, routing, planes):
    """Routings that stress the dispatcher, and the counters that follow from them."""
    bench = await started(dut)
    layer = bench.layer(planes=planes)
    ids = np.array(ROUTINGS[routing])
    before = await bench.counters()
    await bench.run(bench.experts(layer, ids))
    after = await bench.counters()
    used = (ids >= 0) & (ids < 4)
    slots = SLOTS // planes
    passes = sum(-(-int((ids[used] == e).sum()) // slots) for e in range(4))
    counted = {name: after[name] - before[name] for name in after}
    wanted = {"tokens": len(ids), "assignments": int(used.sum()), "expert_passes": passes,
              "commands": 1, "overflows": 0}
    assert {name: counted[name] for name in wanted} == wanted
    await bench.end()


SHAPES = {"one": (1, 64, 32), "wide": (5, 32, 128), "many": (2 * SLOTS + 1, 64, 64)}


@cocotb.test(**TIMEOUT)
@cocotb.parametrize(shape=list(SHAPES), weight_format=["mxint8", "int4_g128", "mxfp4"],
                    planes=[1, 2])
async def gemm(dut, shape, weight_format, planes):
    """Linear layers, wide and tall, more tokens than slots."""
    bench = await started(dut)
    await bench.run(bench.gemm(*SHAPES[shape], weight_format=weight_format, planes=planes))
    await bench.end()


@cocotb.test(**TIMEOUT)
@cocotb.parametrize(planes=[1, 2])
async def random_layers(dut, planes):
    """Random shapes, scales, routings and grids."""
    bench = await started(dut)
    draw = bench.draw
    for _ in range(3):
        experts, top_k = int(draw.integers(2, 7)), int(draw.integers(1, 6))
        tokens = int(draw.integers(1, min(40, CONFIG.max_tokens, CONFIG.max_assignments // top_k)))
        d_model, d_expert = (32 * int(draw.integers(1, 5)) for _ in range(2))
        layer = bench.layer(
            experts=experts, d_model=d_model, d_expert=d_expert, planes=planes, spread=24,
            weight_format=list(FORMATS)[draw.integers(len(FORMATS))],
            grid_exponent=int(draw.integers(-34, -20)))
        ids = draw.integers(-1, experts + 1, (tokens, top_k))
        await bench.run(bench.experts(layer, ids))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def largest_dimensions(dut):
    """Every step of the longest rows, and top-k of 16."""
    bench = await started(dut)
    most = min(CONFIG.max_dim, 16 * CONFIG.port_bytes)
    layer = bench.layer(experts=2, d_model=most, d_expert=most, weight_format="mxfp4")
    await bench.run(bench.experts(layer, np.arange(32).reshape(2, 16) % 3 - 1))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def nonfinite_overflow_and_underflow(dut):
    """NaN and infinity name the first token that is used; what the grid has no room for is
    counted; all give y."""
    bench = await started(dut)
    layer = bench.layer()
    x = bench.x(4, 64)
    x[0, 7], x[2, 40], x[3, 1] = np.nan, -np.inf, np.inf
    work = bench.experts(layer, [[-1], [1], [1], [2]], x=x)
    assert work.status is Status.NONFINITE
    assert work.detail == 2  # token 0 is routed nowhere
    await bench.run(work)
    weights = np.array([[np.nan], [1], [np.inf], [-np.inf]], np.float32)
    work = bench.experts(layer, [[-1], [1], [1], [2]], weights=weights)
    assert (work.status, work.detail, work.address) == (
        Status.NONFINITE, 2, NonFinite.ROUTING_WEIGHT)
    await bench.run(work)
    before = (await bench.counters())["underflows"]
    small = bench.experts(layer, [[0, 3], [1, 2]],
                          weights=np.array([[1e-8, 1e-45], [1e-9, 0]], np.float32))
    assert small.result.underflows > 64
    await bench.run(small)
    assert (await bench.counters())["underflows"] == before + small.result.underflows
    big = bench.experts(layer, [[0], [3]], x=bench.x(2, 64) + np.float32(1e12))
    assert big.status is Status.OVERFLOW
    await bench.run(big)
    assert (await bench.counters())["overflows"] == big.detail
    await bench.run(bench.experts(layer, [[0]]))
    await bench.end()


# -- mistakes --------------------------------------------------------------------------------------
BAD_FIELDS = {
    "tokens_zero": ({"tokens": 0}, 1),
    "tokens_many": ({"tokens": CONFIG.max_tokens + 1}, 1),
    "tokens_huge": ({"tokens": (1 << 32) - 1}, 1),
    "top_k_zero": ({"top_k": 0}, 2),
    "top_k_17": ({"top_k": 17}, 2),
    "assignments": ({"tokens": CONFIG.max_tokens,
                     "top_k": CONFIG.max_assignments // CONFIG.max_tokens + 1}, 2),
    "layer_address": ({"layer_address": 0x1020}, 4),
    "x_address": ({"x_address": 0x1001}, 6),
    "ids_address": ({"ids_address": 0x1004}, 8),
    "weights_address": ({"weights_address": 0x1010}, 10),
    "y_address": ({"y_address": 0x1008}, 12),
    "y_too_high": ({"y_address": 1 << CONFIG.address_bits}, 12),
    "workspace_address": ({"workspace_address": 0x1030}, 14),
    "first_one_counts": ({"y_address": 1, "x_address": 1}, 6),
}


@cocotb.test(**TIMEOUT)
async def bad_fields(dut):
    """Each bad field is named, nothing is computed, and the next command runs."""
    bench = await started(dut)
    layer = bench.layer(experts=2)
    good = bench.experts(layer, [[0], [1]])
    for name, (change, word) in BAD_FIELDS.items():
        dut._log.info("bad field: %s", name)
        await bench.run(Work({**good.fields, **change}, Status.BAD_FIELD, word))
    await bench.run(Work({**good.fields, "opcode": 200}, Status.BAD_OPCODE, 200))
    y = good.fields["y_address"]
    assert bench.memory.read(y, good.result.y.nbytes) == b"\xff" * good.result.y.nbytes
    await bench.run(good)
    await bench.end()


BAD_LAYERS = {
    "planes_zero": ({"planes": 0}, 0),
    "planes_three": ({"planes": 3}, 0),
    "num_experts_zero": ({"num_experts": 0}, 1),
    "num_experts_many": ({"num_experts": CONFIG.max_experts + 1}, 1),
    "d_in": ({"d_in": 48}, 2),
    "d_in_zero": ({"d_in": 0}, 2),
    "d_in_many": ({"d_in": CONFIG.max_dim + 32}, 2),
    "d_out": ({"d_out": 1 << 31}, 3),
    "grid_low": ({"grid_exponent": -101}, 4),
    "grid_high": ({"grid_exponent": 61}, 4),
    "table_address": ({"table_address": 0x1008}, 6),
    "first_one_counts": ({"table_address": 1, "d_out": 1}, 3),
}
BAD_EXPERTS = {
    "sections": ({"sections": 3}, 0),
    "flags": ({"flags": 1}, 0),
    "activation": ({"activation": 255}, 0),
    "d_expert": ({"d_expert": 33}, 1),
    "image_address": ({"image_address": 0x1008}, 2),
    "format0": ({"format0": 1 + max(f.code for f in FORMATS.values())}, 4),
    "words0": ({"words0": 1}, 5),
    "sink1": ({"sink1": 0}, 7),
    "words1": ({"words1": 1 << 31}, 8),
    "first_one_counts": ({"words1": 1, "d_expert": 1}, 1),
}


@cocotb.test(**TIMEOUT)
async def bad_layers(dut):
    """The same for layer descriptors, and for the entries of expert tables."""
    bench = await started(dut)
    layer, _ = made = bench.layer(experts=2)
    good = bench.experts(made, [[0], [1]])
    await bench.run(good)
    for name, (change, word) in BAD_LAYERS.items():
        dut._log.info("bad layer: %s", name)
        descriptor = bench.layout.place(encode(LAYER, {**layer, **change}))
        await bench.run(Work({**good.fields, "layer_address": descriptor}, Status.BAD_LAYER, word,
                             address=descriptor))
    for name, (change, word) in BAD_EXPERTS.items():
        dut._log.info("bad entry: %s", name)
        fields = {**good.fields, "layer_address": bench.with_entry(layer, 1, **change)}
        await bench.run(Work(fields, Status.BAD_EXPERT, 1, word))
    await bench.run(bench.experts(made, [[0], [1]]))
    await bench.end()


WINDOWED = ("layer_address", "x_address", "ids_address", "weights_address", "y_address")


@cocotb.test(**TIMEOUT)
@cocotb.parametrize(side=["below", "behind"])
async def window_violations(dut, side):
    """Whatever points outside: WINDOW with the first byte, nothing touched, the next one runs."""
    bench = await started(dut)
    layer = bench.layer(experts=2)
    good = bench.experts(layer, [[0], [1]])
    outside = 0x0 if side == "below" else bench.layout.limit
    canary = bench.draw.bytes(0x1000)
    bench.memory.write(outside, canary)
    for name in WINDOWED:
        dut._log.info("outside: %s", name)
        work = Work({**good.fields, name: outside}, Status.WINDOW, None, outside)
        await bench.run(work)
    table = bench.layout.place(encode(LAYER, {**layer[0], "table_address": outside}))
    for descriptor in (table, bench.with_entry(layer[0], 0, image_address=outside)):
        work = {**good.fields, "layer_address": descriptor}
        await bench.run(Work(work, Status.WINDOW, None, outside))
    assert bench.memory.read(outside, len(canary)) == canary
    await bench.run(bench.experts(layer, [[0], [1]]))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def errors_of_memory(dut):
    """SLVERR ends a command with BUS_ERROR; the next one runs."""
    bench = await started(dut)
    layer = bench.layer(experts=2)
    for name, address in (("x_address", None), ("weights_address", None), ("y_address", 0)):
        work = bench.experts(layer, [[0], [1]])
        bench.memory.inject_error(work.fields[name], 4)
        work.ends_with(Status.BUS_ERROR,
                       address=work.fields[name] if address is None else address)
        await bench.run(work)
        bench.memory.clear_errors()
        await bench.run(bench.experts(layer, [[1], [0]]))
    await bench.end()


# -- rings -----------------------------------------------------------------------------------------
@cocotb.test(**TIMEOUT)
@cocotb.parametrize(ring_log2=[1, 2])
async def back_to_back(dut, ring_log2):
    """Commands of all kinds one after another, several in flight, round the rings several times."""
    bench = await started(dut, ring_log2=ring_log2)
    small = bench.layer(experts=2, d_model=32, d_expert=32, planes=1, weight_format="mxfp4")
    large = bench.layer(experts=3, d_model=96, d_expert=64, planes=2, weight_format="int4_g128")
    works = []
    for _ in range(3):
        works += [
            bench.experts(small, [[0], [1]]),
            Work({"opcode": Opcode.NOP}),
            bench.experts(large, [[2, 0], [2, 1], [0, 1]]),
            Work({"opcode": 99}, Status.BAD_OPCODE, 99),
            bench.gemm(3, 64, 32),
            Work({"opcode": Opcode.FENCE}),
        ]
    while works or bench.in_flight:
        now = int(bench.draw.integers(1, bench.entries))
        room = bench.entries - 1 - len(bench.in_flight)
        await bench.submit(*works[:min(now, room)])
        del works[:min(now, room)]
        await bench.finish(int(bench.draw.integers(0 if room > now and works else 1,
                                                   len(bench.in_flight) + 1)))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def completion_ring_full(dut):
    """The device waits while completions are not taken, and goes on when they are."""
    bench = await started(dut, ring_log2=1)
    await bench.submit(Work({"opcode": Opcode.NOP}))
    await bfm.wait_high(dut, dut.irq, max_cycles=COMMAND_CYCLES)
    await bench.write_registers(register_writes(IRQ_STATUS=1))
    # The submission ring has room again, the completion ring has not.
    await bench.submit(Work({"opcode": Opcode.NOP}), at_most=2)
    await ClockCycles(dut.clk, 1000)
    assert not dut.irq.value
    second = bench.memory.read(bench.completions + ENTRY_BYTES, ENTRY_BYTES)
    assert second == bytes(ENTRY_BYTES)
    assert bench.accept(await bench.read_register("CQ_TAIL")) == 1
    await bench.write_registers(register_writes(CQ_HEAD=bench.head))
    await bench.finish()
    await bench.end()


@cocotb.test(**TIMEOUT)
async def interrupt_follows_enable(dut):
    """A completion without IRQ_ENABLE stays pending and shows when it is enabled."""
    bench = await started(dut)
    await bench.write_registers(register_writes(IRQ_ENABLE=0))
    await bench.submit(Work({"opcode": Opcode.NOP}))
    for _ in range(200):
        if await bench.read_register("IRQ_STATUS") & 1:
            break
    else:
        raise AssertionError("IRQ_STATUS never showed the completion")
    assert not dut.irq.value
    await bench.write_registers(register_writes(IRQ_ENABLE=1))
    await ClockCycles(dut.clk, 4)
    assert dut.irq.value
    await bench.finish()
    await bench.end()


@cocotb.test(**TIMEOUT)
async def abort(dut):
    """An aborted command says so; the one behind it gives its bits."""
    bench = await started(dut)
    layer = bench.layer()
    for _ in range(3):
        victim = bench.experts(layer, [[0, 1], [2, 3], [1, 0]])
        victim.ends_with(Status.ABORTED)
        await bench.submit(victim, bench.experts(layer, [[3], [1]]))
        await ClockCycles(dut.clk, int(bench.draw.integers(150, 900)))
        await bench.write_registers(register_writes(CONTROL=2))
        await bench.finish()
    await bench.end()


@cocotb.test(**TIMEOUT)
async def soft_reset(dut):
    """A soft reset at any time drains the bus, says so, and everything works again."""
    bench = await started(dut)
    layer = bench.layer()
    for _ in range(4):
        await bench.submit(bench.experts(layer, [[0, 1], [2, 3], [1, 0]]))
        await ClockCycles(dut.clk, int(bench.draw.integers(1, 1500)))
        await bench.write_registers(register_writes(IRQ_ENABLE=2, CONTROL=1))
        await bfm.wait_high(dut, dut.irq, max_cycles=COMMAND_CYCLES)
        bench.restart()
        await bench.write_registers(register_writes(IRQ_STATUS=3))
        if dut.irq.value:
            await FallingEdge(dut.irq)
        await bench.set_up()
        await bench.run(bench.experts(layer, [[3, 1]]))
    await bench.end()


@cocotb.test(**TIMEOUT)
async def watchdog(dut):
    """A watchdog that is shorter than memory's pause ends the command; the next one runs."""
    bench = await started(dut)
    layer = bench.layer()
    await bench.write_registers(register_writes(WATCHDOG=300))
    work = bench.experts(layer, [[0, 1]])
    work.ends_with(Status.WATCHDOG)
    bench.memory.set_stalls(StallModel(ar=0.999, length=2000))
    await bench.submit(work)
    await ClockCycles(dut.clk, 3000)
    bench.memory.set_stalls(STALLS, seed=SEED)
    await bench.finish()
    await bench.write_registers(register_writes(WATCHDOG=0))
    await bench.run(bench.experts(layer, [[0, 1]]))
    await bench.end()
