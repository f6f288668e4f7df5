"""Pairs sorted by expert, beside a sort in Python."""

import random

import pytest
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.dispatch.pair_sort import PairSort

CONFIG = PRESETS["tiny"]
PER_BEAT = CONFIG.port_bytes // 4


def model(ids, num_experts):
    """Return (sorted (token, index), (expert, its pairs) in order, pairs of each token)."""
    top_k = len(ids[0])
    flat = [e for row in ids for e in row]
    pairs = [i for i, e in enumerate(flat) if 0 <= e < num_experts]
    experts = list(dict.fromkeys(flat[i] for i in pairs))
    if len(ids) > 1:
        experts.sort(key=lambda e: flat.count(e) == 1)
    pairs.sort(key=lambda i: experts.index(flat[i]))
    return (
        [(i // top_k, i) for i in pairs],
        [(e, flat.count(e)) for e in experts],
        [sum(0 <= e < num_experts for e in row) for row in ids])


class Bench:
    """Runs jobs, one after the other, and keeps what the sort says meanwhile."""

    def __init__(self, jobs, *, stall=0.0, seed=0):
        self.found = []
        self._jobs = jobs
        self._rng = random.Random(seed)
        self._stall = stall
        self._dut = PairSort(CONFIG)
        self._zeros, self._totals, self._named = [], {}, []
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
        """Note each token's pairs, and each cycle in which there is another expert."""
        dut = self._dut
        cycle = 0
        while True:
            _, _, start, en, token, total, experts = await ctx.tick().sample(
                dut.i_start, dut.total_w_en, dut.total_w_address, dut.total_w_data, dut.o_experts)
            cycle += 1
            if en:
                assert token not in self._totals
                self._totals[token] = total
            if start:
                cycle = 0
                self._named.clear()
            elif experts != len(self._named):
                self._named.append(cycle)
                assert experts == len(self._named)

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
            self._zeros.clear()
            self._totals.clear()
            ctx.set(dut.i_job, {"routed": routed, "num_experts": num_experts, "top_k": top_k,
                                "tokens": len(ids)})
            ctx.set(dut.i_pairs, len(ids) * top_k)
            ctx.set(dut.count_address, 0)
            if routed:
                await self._write(ctx, ids)
            ctx.set(dut.i_start, 1)
            cycles = 0
            while not ctx.get(dut.o_done):
                await ctx.tick()
                ctx.set(dut.i_start, 0)
                cycles += 1
            pairs = ctx.get(dut.o_pairs)
            totals = dict(self._totals)
            await ctx.tick()
            first = ctx.get(dut.count_data)  # asked for in the cycle of o_done
            assert not ctx.get(dut.o_done)
            count = ctx.get(dut.o_experts)
            experts = await self._read(ctx, dut.expert_address, dut.expert_data, count)
            counts = await self._read(ctx, dut.count_address, dut.count_data, count)
            assert not counts or counts[0] == first
            found = await self._read(ctx, dut.pair_address, dut.pair_data, pairs)
            self.found.append((
                [(p.token, p.index) for p in found], list(zip(experts, counts, strict=True)),
                list(self._zeros), totals, cycles, list(self._named)))


def drawn(rng):
    """Return a job's ids and number of experts; of some jobs, each expert comes once."""
    num_experts = rng.randint(1, CONFIG.max_experts)
    tokens, top_k = rng.choice(((1, 1), (1, 16), (7, 3), (16, 2), (12, 1)))
    if rng.random() < 0.3:
        return [rng.sample(range(-2, num_experts + 2), min(top_k, num_experts))], num_experts, 1
    ids = [[rng.choice((rng.randrange(num_experts), rng.randint(-2, num_experts + 1), 1 << 30))
            for _ in range(top_k)] for _ in range(tokens)]
    return ids, num_experts, 1


@pytest.mark.parametrize("seed", range(4))
def test_pairs_come_by_expert_and_in_the_order_of_their_tokens(seed):
    rng = random.Random(seed)
    jobs = [drawn(rng) for _ in range(8)]
    for (ids, num_experts, _), (pairs, counts, zeros, totals, *_) in zip(
            jobs, Bench(jobs, stall=(0, 0.5, 0.9, 0)[seed], seed=seed).found, strict=True):
        expected, of_expert, of_token = model(ids, num_experts)
        assert pairs == expected
        assert counts == of_expert
        assert totals == dict(enumerate(of_token))
        assert zeros == [token for token, count in enumerate(of_token) if not count]


def test_no_pair_is_valid():
    jobs = [([[-1, 5], [4, -1]], 4, 1), ([[3, 0]], 4, 1)]
    (pairs, counts, zeros, totals, *_), after = Bench(jobs).found
    assert not pairs and not counts
    assert zeros == [0, 1] and totals == {0: 0, 1: 0}
    assert after[:2] == ([(0, 0), (0, 1)], [(3, 1), (0, 1)])


def test_what_is_not_routed_is_all_of_expert_0():
    """Whatever ids the job before had."""
    jobs = [([[3, 1], [2, 7], [-1, -1]], 4, 1), ([[0]] * 5, 4, 0)]
    pairs, counts, zeros, totals, *_ = Bench(jobs).found[1]
    assert pairs == [(i, i) for i in range(5)]
    assert counts == [(0, 5)] and not zeros and set(totals.values()) == {1}


def test_what_is_not_routed_goes_to_the_first_experts():
    """To as many as a token has pairs, and those that there are."""
    rest, few = Bench([([[0, 0]] * 3, 4, 0), ([[0, 0, 0]] * 2, 2, 0)]).found
    assert rest[0] == [(0, 0), (1, 2), (2, 4), (0, 1), (1, 3), (2, 5)]
    assert rest[1] == [(0, 3), (1, 3)]
    assert few[0] == [(0, 0), (1, 3), (0, 1), (1, 4)]
    assert few[3] == {0: 2, 1: 2}


def test_an_expert_may_come_several_times_for_a_token():
    """In a row and not: each pair is the expert's, whoever else has that rank from before."""
    ids = [[2, 2, 0, 2, 9, 0, 1]]
    jobs = [([[0, 1, 2, 3]], 4, 1), (ids, 4, 1), ([[1, 1], [1, 1]], 4, 1)]
    for (ids, num_experts, _), found in zip(jobs, Bench(jobs).found, strict=True):
        assert found[:2] == model(ids, num_experts)[:2]


@pytest.mark.parametrize(("experts", "ids"), [
    (1, [[0]]), (16, [[9, 3, 12, 0]]), (16, [[9, 3, 9, 0]]), (5, [[0, 3], [-1, 9], [4, 4]]),
    (4, [[9, 9], [2, 0]]), (4, [[3, 1], [2, 1]])])
def test_cycles_are_those_of_the_docstring(experts, ids):
    """Three for each pair, and again, behind two walks over experts, if there are more tokens."""
    (_, counts, zeros, _, cycles, named), = Bench([(ids, experts, 1)]).found
    pairs = len(ids) * len(ids[0])
    expected = 5 + 3 * pairs + len(zeros)
    if len(ids) > 1 or any(count > 1 for _, count in counts):
        expected += 3 + (4 if len(ids) > 1 else 2) * len(counts) + 3 * pairs
    assert cycles == expected
    flat = [e for row in ids for e in row]
    if len(ids) == 1:
        assert named == [8 + 3 * flat.index(e) for e, _ in counts]
    else:  # behind the counts: a walk over those with several pairs, and one over the others
        ranks = list(dict.fromkeys(e for e in flat if 0 <= e < experts))
        assert named == [
            9 + 3 * pairs + len(zeros) + 2 * (ranks.index(e) + len(ranks) * (count == 1))
            for e, count in counts]
