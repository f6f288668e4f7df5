"""CommandProcessor: a MOE is three jobs of three descriptors, all checked before the first."""

import pytest

from moeaccel.interface.commands import (
    ENTRY_BYTES,
    LAYER,
    MOE_ALIGNMENT,
    MOE_BLOCK,
    ROUTER,
    SUBMISSION,
    NonFinite,
    Opcode,
    Overflow,
    Status,
    encode,
)
from moeaccel.router.descriptor import descriptor
from moeaccel.router.settings import RouterSettings
from tests.support.command_bench import (
    GOOD_LAYER,
    GOOD_SUBMISSION,
    LAYER_AT,
    TINY,
    Bench,
    job_of,
    pulse,
    word_of,
)

CONFIG = TINY.replace(router=("softmax",), router_top_k=8)
AT = LAYER_AT
MOE = GOOD_SUBMISSION | {"opcode": Opcode.MOE, "x_type": 1, "y_type": 1}
PLANES = GOOD_LAYER | {"num_experts": 2, "d_in": 64, "d_out": 32, "table_address": 0xA000,
                       "grid_exponent": -30}
ROUTES = descriptor(RouterSettings(experts=16, top_k=2, groups=4, keep_groups=2), biased=False,
                    tables=True, table_address=0xB000)
EXPERTS = GOOD_LAYER | {"num_experts": 16}
GOOD = (PLANES, ROUTES, EXPERTS)


def put(bench, *parts):
    for index, (structure, values) in enumerate(zip(MOE_BLOCK, parts, strict=True)):
        at = AT + ENTRY_BYTES * index
        bench.memory[at : at + ENTRY_BYTES] = encode(structure, values)


def run(script, *parts, **options):
    bench = Bench(CONFIG, **options)
    put(bench, *(parts or GOOD))

    async def testbench(ctx):
        await script(bench, ctx)

    bench.run(testbench)
    return bench


@pytest.mark.parametrize(("stall", "port_bytes"), [(0.0, 8), (0.5, 8), (0.3, 64)])
def test_three_jobs(stall, port_bytes):
    assert AT % MOE_ALIGNMENT == 0
    bench = Bench(CONFIG.replace(port_bytes=port_bytes, quantiser_lanes=port_bytes // 4),
                  stall=stall)
    put(bench, *GOOD)

    async def testbench(ctx):
        for opcode in (Opcode.MOE, Opcode.EXPERTS, Opcode.MOE_ROUTE, Opcode.MOE):
            entry = await bench.run_one(ctx, **MOE | {"opcode": opcode})
            assert entry["status"] == Status.OK

    bench.run(testbench)
    logits = MOE["workspace_address"]
    whole = [
        job_of(MOE, PLANES) | {"routed": 0, "top_k": 2, "y_narrow": 0, "y_address": logits,
                               "route": 0, "continues": 0, "precedes": 1},
        {"route": 1, "routed": 0, "continues": 1, "precedes": 1, "x_address": logits, "steps_in": 1,
         "num_experts": 16, "table_address": 0xB000, "tokens": 3, "top_k": 2},
        job_of(MOE, EXPERTS) | {"routed": 1, "route": 0, "continues": 1, "precedes": 0},
    ]
    routes = [whole[0], whole[1] | {"precedes": 0}]
    alone = [job_of(MOE | {"opcode": Opcode.EXPERTS}, PLANES)
             | {"routed": 1, "continues": 0, "route": 0}]
    for found, expected in zip(bench.jobs, [*whole, *alone, *routes, *whole], strict=True):
        assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("part", "changes", "status", "word", "at"), [
    (0, {"planes": 3}, Status.BAD_LAYER, "planes", 0),
    (0, {"d_out": 64}, Status.BAD_ROUTER, "num_experts", 1),
    (0, {"table_address": (1 << TINY.address_bits) - 64}, Status.BAD_LAYER, "table_address", 0),
    (1, {"tables": 2}, Status.BAD_ROUTER, "tables", 1),
    (1, {"groups": 3}, Status.BAD_ROUTER, "groups", 1),
    (1, {"shared": 2}, Status.BAD_FIELD, "top_k", None),
    (2, {"d_in": 32}, Status.BAD_LAYER, "d_in", 2),
    (2, {"grid_exponent": 61}, Status.BAD_LAYER, "grid_exponent", 2),
    (2, {"table_address": (1 << TINY.address_bits) - 64}, Status.BAD_LAYER, "table_address", 2),
])
def test_what_is_bad_is_named_before_anything_starts(part, changes, status, word, at):
    parts = [values | (changes if index == part else {}) for index, values in enumerate(GOOD)]

    async def script(bench, ctx):
        for opcode in (Opcode.MOE, Opcode.MOE_ROUTE):
            entry = await bench.run_one(ctx, **MOE | {"opcode": opcode})
            structure = {Status.BAD_FIELD: SUBMISSION, Status.BAD_LAYER: LAYER}.get(status, ROUTER)
            assert (entry["status"], entry["detail"], entry["address"]) == (
                status, word_of(structure, word), 0 if at is None else AT + ENTRY_BYTES * at)
        assert not bench.jobs
        put(bench, *GOOD)
        assert (await bench.run_one(ctx, **MOE))["status"] == Status.OK

    run(script, *parts)


def test_the_submission_is_checked():
    async def script(bench, ctx):
        for changes, word in (({"layer_address": AT + 64}, "layer_address"),
                              ({"x_address": (1 << TINY.address_bits) - 64}, "x_address"),
                              ({"workspace_address": (1 << TINY.address_bits) - 64},
                               "workspace_address"),
                              ({"y_type": 2}, "y_type")):
            entry = await bench.run_one(ctx, **MOE | changes)
            assert (entry["status"], entry["detail"]) == (
                Status.BAD_FIELD, word_of(SUBMISSION, word)), changes
        assert not bench.jobs

    run(script)


def engine_of(*results):
    """Return an engine whose jobs end with these, in turn."""
    left = list(results)
    return lambda job: left.pop(0)


@pytest.mark.parametrize(("results", "jobs", "status", "detail", "address"), [
    ([{"bad_expert": 1, "expert": 1, "word": 3}], 2, Status.BAD_EXPERT, 1, 3 + 16),
    ([{}, {"bad_expert": 1, "expert": 7, "word": 3}], 3, Status.BAD_EXPERT, 7, 3),
    ([{"nonfinite": 1},
      {"nonfinite": 1, "token": 2, "what": NonFinite.LOGIT}], 3, Status.NONFINITE, 2, 2),
    ([{"overflows": 4}, {"overflows": 9}], 3, Status.OVERFLOW, 9, Overflow.LOGIT),
    ([{}, {"overflows": 9}], 3, Status.OVERFLOW, 9, Overflow.OUTPUT),
])
def test_results(results, jobs, status, detail, address):
    """The engine counts on; what the last job says is of all of them."""
    async def script(bench, ctx):
        entry = await bench.run_one(ctx, **MOE)
        assert (entry["status"], entry["detail"], entry["address"]) == (status, detail, address)
        assert len(bench.jobs) == jobs

    run(script, engine=engine_of(*results))


def test_an_abort_in_any_job():
    """No job comes behind it."""
    for job in (1, 2):  # the product has no end of its own
        def engine(_, job=job, seen=[]):  # noqa: B006
            seen.append(0)
            return None if len(seen) == job else {}

        async def script(bench, ctx, job=job):
            bench.submit(ctx, **MOE)
            while len(bench.jobs) <= job:
                await ctx.tick()
            await pulse(ctx, bench.dut.i_abort)
            entry = await bench.completion(ctx)
            assert entry["status"] == Status.ABORTED
            assert len(bench.jobs) == job + 1
            assert (await bench.run_one(ctx, **MOE))["status"] == Status.OK

        run(script, engine=engine)
