"""What a plan must be: every pair once, in order; and what comes of carrying it out."""

import numpy as np
import pytest

from moeaccel.plan import plan


def draw(seed):
    rng = np.random.default_rng(seed)
    tokens, top_k, experts, slots = (
        int(rng.integers(1, most + 1)) for most in (20, 4, 6, 5))
    ids = rng.integers(-1, experts + 1, (tokens, top_k))
    kind = seed % 4
    if kind == 1:
        ids[:] = ids[0]  # all tokens have the same experts: passes may keep their tokens
    elif kind == 2:
        ids[:, -1] = ids[:, 0]  # an expert may be named twice
    elif kind == 3:
        ids = np.sort(rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :top_k])
    return ids, experts, slots


def experts_of(ids, experts):
    """Return the experts with tokens in their order."""
    flat = [e for e in ids.reshape(-1).tolist() if 0 <= e < experts]
    named = list(dict.fromkeys(flat))
    return named if len(ids) == 1 else sorted(named, key=lambda e: flat.count(e) == 1)


def carry_out(found, ids):
    """Return y when every pair is worth 1, from what stays on the chip and what leaves it."""
    y, workspace = dict.fromkeys(found.zeros, 0), {}
    sums = []
    rows = iter(found.rows)
    for index, now in enumerate(found.passes):
        if not now.same:
            sums = [0] * len(now.tokens)
        sums = [total + 1 for total in sums]
        if found.drains(index):
            for token, first, last, total in zip(
                    now.tokens, now.first, now.last, sums, strict=True):
                assert next(rows) == (token, first, last)
                total += 0 if first else workspace.pop(token)
                where = y if last else workspace
                assert token not in where
                where[token] = total
    assert not workspace and next(rows, None) is None
    return [y[token] for token in range(len(ids))]


@pytest.mark.parametrize("seed", range(60))
def test_a_plan_carried_out_gives_every_token_its_experts(seed):
    ids, experts, slots = draw(seed)
    found = plan(ids, experts, slots)
    valid = (ids >= 0) & (ids < experts)
    assert carry_out(found, ids) == valid.sum(axis=1).tolist()
    assert found.zeros == tuple(np.flatnonzero(~valid.any(axis=1)).tolist())
    assert (found.tokens, found.pairs) == (len(ids), valid.sum())
    assert found.experts == tuple(experts_of(ids, experts))


@pytest.mark.parametrize("seed", range(60))
def test_passes_hold_every_pair_once_in_order(seed):
    ids, experts, slots = draw(seed)
    found = plan(ids, experts, slots)
    flat = ids.reshape(-1).tolist()
    pairs = [pair for now in found.passes for pair in now.pairs]
    assert pairs == [
        i for expert in experts_of(ids, experts) for i, e in enumerate(flat) if e == expert]
    resident = None
    for now in found.passes:
        assert {flat[pair] for pair in now.pairs} == {now.expert}
        assert [pair // ids.shape[1] for pair in now.pairs] == list(now.tokens)
        assert now.same == (now.tokens == resident)
        resident = now.tokens
    # Only the last pass of an expert is not full.
    for now, behind in zip(found.passes, found.passes[1:], strict=False):
        assert len(now.pairs) == slots or (
            behind.expert != now.expert and len(now.pairs) < slots)
    assert list(found.loads) == [t for now in found.passes if not now.same for t in now.tokens]


@pytest.mark.parametrize("seed", range(12))
def test_what_is_done_before_an_expert(seed):
    ids, experts, slots = draw(seed)
    found = plan(ids, experts, slots)
    for rank, stop in enumerate(found.experts):
        part = found.before(stop)
        count = len(part.passes)
        assert part.passes == found.passes[:count]
        assert part.experts == found.experts[:rank]
        assert {now.expert for now in part.passes} == set(part.experts)
        assert not {now.expert for now in found.passes[count:]} & set(part.experts)
        assert (part.zeros, part.tokens) == (found.zeros, found.tokens)
        assert not count or part.drains(count - 1)


def test_an_example():
    # Expert 1 is named first: tokens 0, 1; expert 0: tokens 0, 1, 2; two slots.
    found = plan(np.array([[1, 0], [0, 1], [0, -1], [-1, 2]]), 2, 2)
    assert [(now.expert, now.tokens, now.pairs, now.same) for now in found.passes] == [
        (1, (0, 1), (0, 3), False), (0, (0, 1), (1, 2), True), (0, (2,), (4,), False)]
    assert [tuple(row) for row in found.rows] == [
        (0, True, True), (1, True, True), (2, True, True)]
    assert found.zeros == (3,)
    # Of one token 5 would be ahead: of two the experts with several pairs are.
    assert plan(np.array([[5, 4], [3, 4]]), 6, 2).experts == (4, 5, 3)
    assert plan(np.array([[5, 4, 3, 4]]), 6, 2).experts == (5, 4, 3)
    apart = plan(np.array([[0, -1], [1, 0], [1, 1]]), 2, 2)
    assert [(now.tokens, now.same) for now in apart.passes] == [
        ((0, 1), False), ((1, 2), False), ((2,), False)]
    assert [tuple(row) for row in apart.rows] == [
        (0, True, True), (1, True, False), (1, False, True), (2, True, False), (2, False, True)]
