"""Pairs sorted by expert, beside a sort in Python."""

import random

import pytest
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.dispatch.pair_sort import PairSort

CONFIG = PRESETS["tiny"]
PER_BEAT = CONFIG.port_bytes // 4


def model(ids, num_experts):
    """Return (sorted (token, index), pairs of each expert, pairs of each token)."""
    top_k = len(ids[0])
    flat = [e for row in ids for e in row]
    pairs = [i for i, e in enumerate(flat) if 0 <= e < num_experts]
    pairs.sort(key=lambda i: flat[i])
    return (
        [(i // top_k, i) for i in pairs],
        [flat.count(e) for e in range(num_experts)],
        [sum(0 <= e < num_experts for e in row) for row in ids])


class Bench:
    """Runs jobs, one after the other, and keeps what the sort says meanwhile."""

    def __init__(self, jobs, *, stall=0.0, seed=0):
        self.found = []
        self._jobs = jobs
        self._rng = random.Random(seed)
        self._stall = stall
        self._dut = PairSort(CONFIG)
        self._zeros, self._totals, self._counted = [], {}, []
        sim = Simulator(self._dut)
        sim.add_clock(1e-6)
        sim.add_testbench(self._take_zeros, background=True)
        sim.add_testbench(self._watch, background=True)
        sim.add_testbench(self._run)
        sim.run()

    async def _take_zeros(self, ctx):
        port = self._dut.o_zero
        while True:
            ctx.set(port.ready, self._rng.random() >= self._stall)
            _, _, taken, token = await ctx.tick().sample(port.valid & port.ready, port.payload)
            if taken:
                self._zeros.append(token)

    async def _watch(self, ctx):
        dut = self._dut
        while True:
            _, _, en, token, total, counted = await ctx.tick().sample(
                dut.total_w_en, dut.total_w_address, dut.total_w_data, dut.o_counted)
            if en:
                assert token not in self._totals
                self._totals[token] = total
            if counted:
                self._counted.append(dict(self._totals))

    async def _write(self, ctx, ids):
        dut = self._dut
        flat = [e & 0xFFFFFFFF for row in ids for e in row]
        for beat in range(0, len(flat), PER_BEAT):
            word = flat[beat:beat + PER_BEAT]
            word += [1] * (PER_BEAT - len(word))  # what else memory holds
            ctx.set(dut.ids_w_en, 1)
            ctx.set(dut.ids_w_address, beat // PER_BEAT)
            ctx.set(dut.ids_w_data, sum(e << 32 * i for i, e in enumerate(word)))
            await ctx.tick()
        ctx.set(dut.ids_w_en, 0)

    async def _read(self, ctx, address, answer, count):
        found = []
        for i in range(count):
            ctx.set(address, i)
            await ctx.tick()
            found.append(ctx.get(answer))
        return found

    async def _run(self, ctx):
        dut = self._dut
        for ids, num_experts, routed in self._jobs:
            top_k = len(ids[0])
            for notes in (self._zeros, self._totals, self._counted):
                notes.clear()
            ctx.set(dut.i_job, {"routed": routed, "num_experts": num_experts, "top_k": top_k,
                                "tokens": len(ids)})
            ctx.set(dut.i_pairs, len(ids) * top_k)
            ctx.set(dut.i_start, 1)
            await ctx.tick()
            ctx.set(dut.i_start, 0)
            if routed:
                await self._write(ctx, ids)
                while not ctx.get(dut.o_cleared):
                    await ctx.tick()
                ctx.set(dut.i_count, 1)
            cycles = 0
            while not ctx.get(dut.o_done):
                await ctx.tick()
                ctx.set(dut.i_count, 0)
                cycles += 1
            pairs = ctx.get(dut.o_pairs)
            await ctx.tick()
            assert not ctx.get(dut.o_done)
            assert len(self._counted) == 1
            counts = await self._read(ctx, dut.count_address, dut.count_data, num_experts)
            found = await self._read(ctx, dut.pair_address, dut.pair_data, pairs)
            self.found.append((
                [(p.token, p.index) for p in found], counts, list(self._zeros),
                self._counted[0], cycles))


def drawn(rng):
    """Return a job's ids and number of experts."""
    num_experts = rng.randint(1, CONFIG.max_experts)
    tokens, top_k = rng.choice(((1, 1), (1, 16), (7, 3), (16, 2), (12, 1)))
    ids = [[rng.choice((rng.randrange(num_experts), rng.randint(-2, num_experts + 1), 1 << 30))
            for _ in range(top_k)] for _ in range(tokens)]
    return ids, num_experts, 1


@pytest.mark.parametrize("seed", range(3))
def test_pairs_come_by_expert_and_in_the_order_of_their_tokens(seed):
    rng = random.Random(seed)
    jobs = [drawn(rng) for _ in range(6)]
    for (ids, num_experts, _), (pairs, counts, zeros, totals, _) in zip(
            jobs, Bench(jobs, stall=(0, 0.5, 0.9)[seed], seed=seed).found, strict=True):
        expected, of_expert, of_token = model(ids, num_experts)
        assert pairs == expected
        assert counts == of_expert
        assert totals == dict(enumerate(of_token))
        assert zeros == [token for token, count in enumerate(of_token) if not count]


def test_no_pair_is_valid():
    jobs = [([[-1, 5], [4, -1]], 4, 1), ([[3, 0]], 4, 1)]
    (pairs, counts, zeros, totals, _), after = Bench(jobs).found
    assert not pairs and not any(counts)
    assert zeros == [0, 1] and totals == {0: 0, 1: 0}
    assert after[:2] == ([(0, 1), (0, 0)], [1, 0, 0, 1])


def test_what_is_not_routed_is_all_of_expert_0():
    """Whatever ids the job before had."""
    jobs = [([[3, 1], [2, 7], [-1, -1]], 4, 1), ([[0]] * 5, 4, 0)]
    pairs, counts, zeros, totals, _ = Bench(jobs).found[1]
    assert pairs == [(i, i) for i in range(5)]
    assert counts == [5, 0, 0, 0] and not zeros and set(totals.values()) == {1}


def test_what_is_not_routed_goes_to_the_first_experts():
    """To as many as a token has pairs, and those that there are."""
    rest, few = Bench([([[0, 0]] * 3, 4, 0), ([[0, 0, 0]] * 2, 2, 0)]).found
    assert rest[0] == [(0, 0), (1, 2), (2, 4), (0, 1), (1, 3), (2, 5)]
    assert rest[1] == [3, 3, 0, 0]
    assert few[0] == [(0, 0), (1, 3), (0, 1), (1, 4)]
    assert few[3] == {0: 2, 1: 2}


def test_cycles_are_those_of_the_docstring():
    """Three for each pair, twice; two for each expert; one for a token without pairs."""
    for experts, ids in ((1, [[0]]), (5, [[0, 3], [-1, 9], [4, 4]])):
        zeros = sum(not count for count in model(ids, experts)[2])
        pairs = len(ids) * len(ids[0])
        (_, _, _, _, cycles), = Bench([(ids, experts, 1)]).found
        assert cycles == 4 + 3 * pairs + zeros + 2 * experts + 4 + 3 * pairs
