"""CommandProcessor: what it refuses, and names, of submissions, layers and registers of rings."""

import random

import pytest

from moeaccel.config import PRESETS
from moeaccel.interface.commands import LAYER, SUBMISSION, ElementType, Opcode, Status
from tests.support.command_bench import (
    CQ,
    GEMM,
    GOOD_LAYER,
    GOOD_SUBMISSION,
    SIZE,
    SQ,
    TINY,
    Bench,
    word_of,
)

ADDRESSES = [f.name for f in SUBMISSION if f.name.endswith("_address")]
BAD_SUBMISSIONS = [
    ({"tokens": 0}, "tokens"), ({"tokens": TINY.max_tokens + 1, "top_k": 1}, "tokens"),
    ({"tokens": 0x8000_0001}, "tokens"),
    ({"top_k": 0}, "top_k"), ({"top_k": 17}, "top_k"), ({"top_k": 33}, "top_k"),
    ({"top_k": 0x100_0001}, "top_k"),
    ({"tokens": TINY.max_assignments // 5 + 1, "top_k": 5}, "top_k"),
    ({"opcode": Opcode.GEMM, "top_k": 2}, "top_k"),
    ({"x_type": 2}, "x_type"), ({"x_type": 255}, "x_type"),
    ({"y_type": 2}, "y_type"), ({"y_type": 128}, "y_type"),
    *(({name: value}, name) for name in ADDRESSES
      for value in (1, 0x20, 0x4020, 1 << TINY.address_bits, 1 << 63)),
    ({"y_address": 1, "x_address": 8, "workspace_address": 4}, "x_address"),  # the first one
]
BAD_LAYERS = [
    ({"planes": 0}, "planes"), ({"planes": 3}, "planes"),
    ({"num_experts": 0}, "num_experts"), ({"num_experts": TINY.max_experts + 1}, "num_experts"),
    ({"num_experts": 0x8000_0001}, "num_experts"),
    *(({name: value}, name) for name in ("d_in", "d_out")
      for value in (0, 48, TINY.max_dim + 32, 0x8000_0020)),
    ({"grid_exponent": -101}, "grid_exponent"), ({"grid_exponent": 61}, "grid_exponent"),
    ({"table_address": 0x9020}, "table_address"),
    ({"table_address": 1 << TINY.address_bits}, "table_address"),
    ({"d_out": 1, "table_address": 1}, "d_out"),
]


def test_bad_fields_of_submissions():
    bench = Bench()

    async def testbench(ctx):
        for changes, name in BAD_SUBMISSIONS:
            entry = await bench.run_one(ctx, **changes)
            assert (entry["status"], entry["detail"]) == (
                Status.BAD_FIELD, word_of(SUBMISSION, name)), changes
        for opcode in (4, 0x81, 255):
            entry = await bench.run_one(ctx, opcode=opcode)
            assert (entry["status"], entry["detail"]) == (Status.BAD_OPCODE, opcode)
        assert not bench.jobs
        assert (await bench.run_one(ctx))["status"] == Status.OK

    bench.run(testbench)
    assert {name for _, name in BAD_SUBMISSIONS} == {f.name for f in SUBMISSION} - {"opcode", "tag"}


def test_bad_fields_of_layers():
    bench = Bench()

    async def testbench(ctx):
        for submission in ({}, GEMM):
            for changes, name in BAD_LAYERS:
                bench.put_layer(**changes)
                entry = await bench.run_one(ctx, **submission)
                assert (entry["status"], entry["detail"]) == (
                    Status.BAD_LAYER, word_of(LAYER, name)), changes
        assert not bench.jobs

    bench.run(testbench)
    assert {name for _, name in BAD_LAYERS} == {f.name for f in LAYER}


def test_limits_are_allowed():
    bench = Bench()

    async def testbench(ctx):
        for changes in [
            {"tokens": TINY.max_tokens, "top_k": TINY.max_assignments // TINY.max_tokens},
            {"tokens": TINY.max_assignments // 16, "top_k": 16},
            {"tokens": TINY.max_assignments // 5, "top_k": 5},
            {"y_address": 0, "x_address": 0, "ids_address": 0},
        ]:
            assert (await bench.run_one(ctx, **changes))["status"] == Status.OK, changes
        for changes in [
            {"num_experts": TINY.max_experts, "d_in": TINY.max_dim, "d_out": 32},
            {"grid_exponent": -100, "table_address": 0},
            {"grid_exponent": 60, "planes": 1},
        ]:
            bench.put_layer(**changes)
            assert (await bench.run_one(ctx))["status"] == Status.OK, changes

    bench.run(testbench)


def ends(submission, layer):
    """Return how many bytes lie behind each address that a command may touch."""
    tokens, d_in, d_out = submission["tokens"], layer["d_in"], layer["d_out"]
    pairs = 4 * tokens * submission["top_k"]
    x, y = (ElementType(submission.get(name, 0)).bytes for name in ("x_type", "y_type"))
    return {"x_address": x * tokens * d_in, "ids_address": pairs, "weights_address": pairs,
            "y_address": y * tokens * d_out, "workspace_address": 8 * tokens * d_out,
            "table_address": 64 * layer["num_experts"]}


@pytest.mark.parametrize("config", [
    TINY, PRESETS["hbm32"], PRESETS["small"].replace(row_multipliers=2, address_bits=24),
    TINY.replace(max_dim=64, max_assignments=1024)],
    ids=["tiny", "hbm32", "24 bits", "more pairs than blocks"])
def test_everything_ends_within_the_address_space(config):
    """At the top the last byte is used, and 64 bytes on the word is named; the lowest counts."""
    bench = Bench(config, seed=6)
    rng = random.Random(7)
    top = 1 << config.address_bits

    async def testbench(ctx):
        for i in range(8):
            layer = {name: 32 * rng.randint(1, min(config.max_steps, 40))
                     for name in ("d_in", "d_out")}
            layer["num_experts"] = rng.choice([1, 2, rng.randint(1, config.max_experts)])
            command = {"top_k": rng.choice([1, 16, rng.randint(1, 16)])}
            if gemm := i % 4 == 3:
                command = dict(GEMM)
            command |= {name: rng.randint(0, 1) for name in ("x_type", "y_type")}
            command["tokens"] = rng.randint(
                1, min(config.max_tokens, config.max_assignments // command["top_k"]))
            sizes = ends(GOOD_SUBMISSION | command, GOOD_LAYER | layer)
            highest = {name: (top - size) // 64 * 64 for name, size in sizes.items()}
            layer["table_address"] = highest.pop("table_address")
            bench.put_layer(**layer)
            assert (await bench.run_one(ctx, **command | highest))["status"] == Status.OK
            names = rng.sample(list(highest), 3) if i else list(highest)
            for name in names:
                wrong = highest | {name: highest[name] + 64}
                later = rng.choice(list(highest))
                wrong[later] = max(wrong[later], highest[later] + 64 * rng.randint(0, 1))
                first = min(word_of(SUBMISSION, n) for n in wrong if wrong[n] > highest[n])
                beyond = [n for n in wrong if wrong[n] >= top]
                if beyond:
                    first = min(word_of(SUBMISSION, n) for n in beyond)
                entry = await bench.run_one(ctx, **command | wrong)
                assert (entry["status"], entry["detail"]) == (Status.BAD_FIELD, first)
            if layer["table_address"] + 64 < top:
                bench.put_layer(**layer | {"table_address": layer["table_address"] + 64})
                entry = await bench.run_one(ctx, **command | highest)
                assert (entry["status"], entry["detail"]) == (
                    Status.BAD_LAYER, word_of(LAYER, "table_address"))
                name = rng.choice([n for n in highest if highest[n] + 64 < top] or ["y_address"])
                entry = await bench.run_one(ctx, **command | {name: highest[name] + 64})
                assert entry["status"] == Status.BAD_FIELD
            assert gemm == (len(bench.jobs) % 4 == 0)

    bench.run(testbench)
    assert len(bench.jobs) == 8


@pytest.mark.parametrize(("register", "bad", "good", "error"), [
    ("ring_log2", [0, 9, 15, 1 << 31], 2, 1),
    ("sq_base", [SQ + 32, SQ + 1, 1 << TINY.address_bits, SQ | 1 << 63,
                 (1 << TINY.address_bits) - 192], SQ, 2),
    ("cq_base", [CQ + 8, CQ | 1 << TINY.address_bits, (1 << TINY.address_bits) - 64], CQ, 4),
])
def test_bad_registers_of_the_rings(register, bad, good, error):
    """Nothing is fetched, the error says what is wrong, and with it mended the command runs."""
    bench = Bench()
    dut = bench.dut

    async def testbench(ctx):
        for tag, value in enumerate(bad):
            ctx.set(dut.enable, 0)
            ctx.set(getattr(dut, register), value)
            await ctx.tick().repeat(20)
            assert bench.errors == 0  # nobody has asked for anything
            ctx.set(dut.enable, 1)
            bench.submit(ctx, tag=tag)
            for _ in range(40):
                await ctx.tick()
                assert not ctx.get(dut.reader.request.valid)
            assert bench.errors == error, value
            bench.errors = 0  # as long as it is wrong that does not help
            await ctx.tick().repeat(5)
            assert bench.errors == error
            ctx.set(getattr(dut, register), good)
            await ctx.tick().repeat(20)
            assert not ctx.get(dut.busy)
            bench.errors = 0
            entry = await bench.completion(ctx)
            assert (entry["tag"], entry["status"]) == (tag, Status.OK)
            assert bench.errors == 0

    bench.run(testbench)


def test_the_last_ring_of_the_address_space():
    bench = Bench()
    top = 1 << TINY.address_bits
    bench.memory[SIZE - 256:] = bytes(256)

    async def testbench(ctx):
        ctx.set(bench.dut.sq_base, top - 256)
        ctx.set(bench.dut.cq_base, top - 256)
        await ctx.tick().repeat(20)
        assert bench.errors == 0

    bench.run(testbench)
