"""Slot tables, pass by pass, beside a plain model of what a pass finds on the chip."""

import random
from collections import Counter

import numpy as np
import pytest
from amaranth.sim import Simulator

from moeaccel.arithmetic import float32_to_internal
from moeaccel.config import PRESETS
from moeaccel.hdl.dispatch.slot_filler import SlotFiller

CONFIG = PRESETS["tiny"]
PER_BEAT = CONFIG.port_bytes // 4
ODD = np.array([0, -0.0, 1e-45, -1.1e-38, 2**-126, 3.4e38, -1, 1.99999994, np.nan, -np.inf],
               np.float32)


def model(pairs, counts, weights):
    """Return ([(same, entries)] by pass, the lowest token whose weight is not finite)."""
    left = Counter(token for token, _ in pairs)
    done, resident, first = set(), [], []
    passes, nonfinite = [], set()
    pairs = iter(pairs)
    for count in counts:
        now = [next(pairs) for _ in range(count)]
        tokens = [token for token, _ in now]
        same = tokens == resident
        if not same:
            first = [token not in done for token in tokens]
        resident = tokens
        done.update(tokens)
        left.subtract(tokens)
        nonfinite.update(token for token, i in now if not np.isfinite(weights[i]))
        value = float32_to_internal(np.where(np.isfinite(weights), weights, np.float32(0)))
        passes.append((same, [
            (token, value.mantissa[i], value.exponent[i], first[slot], left[token] == 0)
            for slot, (token, i) in enumerate(now)]))
    return passes, min(nonfinite, default=None)


async def write_weights(ctx, dut, weights, rng=None):
    """Write a job's weights, with pauses, and say when all are there."""
    raw = weights.astype("<f4").tobytes()
    for beat in range(0, len(weights), PER_BEAT):
        while rng is not None and rng.random() < 0.9:
            await ctx.tick()
        word = raw[4 * beat:4 * (beat + PER_BEAT)].ljust(CONFIG.port_bytes, b"\xff")
        ctx.set(dut.weights_w_en, 1)
        ctx.set(dut.weights_w_address, beat // PER_BEAT)
        ctx.set(dut.weights_w_data, int.from_bytes(word, "little"))
        await ctx.tick()
        ctx.set(dut.weights_w_en, 0)
    ctx.set(dut.i_weights, 1)


def run(jobs, *, seed=None):
    """Return, for each job of (pairs, counts, weights), its passes, the nonfinite token, cycles.

    ``weights`` is None in a job that is not routed. ``seed``: of pauses in writing weights, which
    come while the first pass waits for them; None: all weights are there before it.
    """
    dut = SlotFiller(CONFIG)
    table, found, assignments = {}, [], []
    job = {}

    async def sorted_pairs(ctx):
        while True:
            _, _, address = await ctx.tick().sample(dut.pair_address)
            token, index = job["pairs"][address] if address < len(job["pairs"]) else (0, 0)
            ctx.set(dut.pair_data, {"token": token, "index": index})

    async def watch(ctx):
        while True:
            _, _, en, address, entry, put = await ctx.tick().sample(
                dut.slot_w_en, dut.slot_w_address, dut.slot_w_data, dut.o_assignments)
            assignments.extend([1] * put)
            if en:
                assert address not in table
                table[address] = (entry.token, entry.weight.mantissa, entry.weight.exponent,
                                  entry.first, entry.last)

    async def weights_of_jobs(ctx):
        rng = None if seed is None else random.Random(seed)
        while True:
            await ctx.tick()
            if job.get("weights") is not None:
                await write_weights(ctx, dut, job.pop("weights"), rng)

    async def scenario(ctx):
        for pairs, counts, weights in jobs:
            job["pairs"] = pairs
            ctx.set(dut.i_clear, 1)
            ctx.set(dut.i_weights, weights is None)
            ctx.set(dut.i_routed, weights is not None)
            await ctx.tick()
            ctx.set(dut.i_clear, 0)
            assert not ctx.get(dut.o_nonfinite)
            for token, total in Counter(token for token, _ in pairs).items():
                ctx.set(dut.total_w_en, 1)
                ctx.set(dut.total_w_address, token)
                ctx.set(dut.total_w_data, total)
                await ctx.tick()
            ctx.set(dut.total_w_en, 0)
            job["weights"] = weights
            while seed is None and not ctx.get(dut.i_weights):
                await ctx.tick()
            assignments.clear()
            passes, times = [], []
            for number, count in enumerate(counts):
                bank = number % 2
                ctx.set(dut.i_count, count)
                ctx.set(dut.i_bank, bank)
                ctx.set(dut.i_start, 1)
                cycles = 0
                while not ctx.get(dut.o_done):
                    await ctx.tick()
                    ctx.set(dut.i_start, 0)
                    cycles += 1
                same = ctx.get(dut.o_same)
                await ctx.tick()
                assert ctx.get(dut.o_same) == same and not ctx.get(dut.o_done)
                passes.append((same, [table.pop(bank * CONFIG.max_slots + i)
                                      for i in range(count)]))
                times.append(cycles)
            assert not table and len(assignments) == sum(counts)
            nonfinite = ctx.get(dut.o_nonfinite_token) if ctx.get(dut.o_nonfinite) else None
            found.append((passes, nonfinite, times))

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    for background in (sorted_pairs, watch, weights_of_jobs):
        sim.add_testbench(background, background=True)
    sim.add_testbench(scenario)
    sim.run()
    return found


def drawn(rng):
    """Return a job; every other pass has the tokens of the pass before, or nearly so."""
    tokens, counts = [], []
    for _ in range(6):
        before = tokens[len(tokens) - counts[-1]:] if counts else []
        now = list(before)
        if not now or rng.random() < 0.4:
            now = rng.sample(range(CONFIG.max_tokens), rng.randint(1, CONFIG.max_slots))
        elif rng.random() < 0.5:
            now[rng.randrange(len(now))] = rng.choice(
                [token for token in range(CONFIG.max_tokens) if token not in now])
        tokens += now
        counts.append(len(now))
    indices = rng.sample(range(4 * len(tokens)), len(tokens))
    numbers = np.random.default_rng(rng.randrange(1 << 32))
    weights = numbers.standard_normal(4 * len(tokens)).astype(np.float32)
    odd = numbers.choice(ODD, len(weights))
    weights = np.where(numbers.random(len(weights)) < 0.7, weights, odd)
    return list(zip(tokens, indices, strict=True)), counts, weights


@pytest.mark.parametrize("seed", range(4))
def test_slots_have_tokens_weights_and_flags(seed):
    rng = random.Random(seed)
    jobs = [drawn(rng) for _ in range(4)]
    found = run(jobs, seed=(None, seed)[seed % 2])
    for job, (passes, nonfinite, _) in zip(jobs, found, strict=True):
        assert (passes, nonfinite) == model(*job)


def test_nothing_of_the_job_before_is_resident():
    job = ([(3, 0), (1, 1)], [2], np.array([1, 2], np.float32))
    assert [passes[0][0] for passes, *_ in run([job, job])] == [0, 0]


def test_what_is_not_routed_has_weights_of_1():
    """Whatever the job before has written, NaN included."""
    pairs = [(0, 0), (1, 1), (2, 2)]
    jobs = [(pairs, [3], np.full(3, np.nan, np.float32)), (pairs, [2, 1], None)]
    (_, token, _), (passes, none, _) = run(jobs)
    assert token == 0 and none is None
    assert [entry[1:3] for _, entries in passes for entry in entries] == [(1 << 16, -16)] * 3


def test_cycles_are_those_of_the_docstring():
    """Of the comparison, and four for each slot."""
    tokens = [2, 5, 7, 1]
    pairs = [(token, i) for i, token in enumerate((*tokens, *tokens, *tokens[:1], 9, 7, 1, 9, 7))]
    counts = [4, 4, 4, 2]
    (passes, _, times), = run([(pairs, counts, np.ones(len(pairs), np.float32))])
    assert [same for same, _ in passes] == [0, 1, 0, 0]
    assert times == [4 * count + 5 + compare for count, compare in zip(
        counts, (1, 2 * 4 + 1, 2 * 1 + 5, 1), strict=True)]
