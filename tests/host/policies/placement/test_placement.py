import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.costs import Rates, machine
from moeaccel.host.policies.errors import UnknownPolicy
from moeaccel.host.policies.placement import PLACEMENTS, Plan, Work, chains, placement
from moeaccel.host.policies.placement.duplex import Duplex
from moeaccel.host.policies.placement.fiddler import Fiddler
from moeaccel.host.policies.placement.hybrimoe import HybriMoE
from moeaccel.host.policies.placement.measured import MeasuredScan
from moeaccel.host.policies.placement.monde import MoNDE
from moeaccel.host.policies.placement.optimum import Optimum
from moeaccel.host.policies.placement.prefix_scan import PrefixScan
from moeaccel.host.policies.placement.scan import Extra, Scan, best_split
from moeaccel.zoo import model

ALL, NONE = slice(None), slice(0)


def costs(name="olmoe-1b-7b", torch="h100", **options):
    found = model(name)
    return machine(torch).holding(found, "int4_g32").layer(found, **options)


MACHINES = [costs(name, torch) for name in ("mixtral-8x7b", "olmoe-1b-7b", "deepseek-v2-lite")
            for torch in ("h100", "rtx4090", "cpu")]


def work(uses, resident=(), tokens=None):
    uses = np.array(uses)
    flags = np.zeros(len(uses), bool)
    flags[list(resident)] = True
    return Work.of(uses, flags, int(uses.max()) if tokens is None else tokens)


@st.composite
def works(draw, experts=7):
    tokens = draw(st.sampled_from([1, 2, 8, 100, 2048]))
    uses = draw(st.lists(st.integers(0, tokens), min_size=experts, max_size=experts))
    flags = draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    return Work.of(np.array(uses), np.array(flags), tokens)


def time(c, what, plan):
    return chains(c, what, plan).total


def plans(what):
    for kept in itertools.product([False, True], repeat=len(what.resident_tokens)):
        for moved in itertools.product([False, True], repeat=len(what.other_tokens)):
            yield Plan(np.array(kept, bool), np.array(moved, bool))


def test_work_is_parted_and_hottest_first():
    what = work([0, 3, 9, 1, 3, 0, 2], resident=(1, 3, 5))
    assert what.resident_experts.tolist() == [1, 3] and what.resident_tokens.tolist() == [3, 1]
    assert what.other_experts.tolist() == [2, 4, 6] and what.other_tokens.tolist() == [9, 3, 2]
    assert len(what) == 5
    one = work([0, 1, 1, 0], resident=(2,))
    assert (one.resident_experts.tolist(), one.other_experts.tolist()) == ([2], [1])


def test_chains_of_one_token_by_hand():
    c = costs("deepseek-v2-lite")
    what = work([1] * 6 + [0] * 58, resident=(0, 1))
    found = chains(c, what, Plan(ALL, slice(1)), contending=1e-6, behind=2e-6)
    device = c.device_call + c.row + 3 * c.device_read + c.contend + 1e-6
    torch = max(c.shared(1) + c.torch_call + 2 * c.torch_read,
                c.move_call + 2e-6 + c.move + c.up) + c.torch_call + c.decode + c.torch_read
    assert found.device == pytest.approx(device) and found.torch == pytest.approx(torch)
    assert found.total == pytest.approx(max(device, torch) + c.merge)
    assert (found.moves, found.n_moved) == (pytest.approx(c.move), 1)


def test_one_side_alone_needs_no_merge_and_no_second_call():
    c = costs()
    what = work([1] * 8, resident=range(8))
    assert time(c, what, Plan(ALL, NONE)) == pytest.approx(c.torch_call + 8 * c.torch_read)
    assert time(c, what, Plan(NONE, NONE)) == pytest.approx(
        c.device_call + c.row + 8 * c.device_read)


@settings(deadline=None, max_examples=60)
@given(works(), st.sampled_from(MACHINES))
def test_one_token_and_many_have_the_same_formula(what, c):
    """The short way for one token is the long one."""
    ones = Work(what.resident_experts, np.ones_like(what.resident_tokens), what.other_experts,
                np.ones_like(what.other_tokens), 1)
    long = Work(ones.resident_experts, ones.resident_tokens, ones.other_experts,
                ones.other_tokens, 1)
    rng = np.random.default_rng(len(what))
    plan = Plan(rng.random(len(ones.resident_tokens)) < 0.5,
                rng.random(len(ones.other_tokens)) < 0.5)
    short = chains(c, ones, plan)
    device_of, torch_of = c.tables(1)
    kept, moved = plan.resident.sum(), plan.moved.sum()
    left = len(long) - kept - moved
    assert short.device == pytest.approx(
        (c.device_call + c.row + left * device_of[1] + c.contend * moved) if left else 0)
    assert short.n_moved == moved and short.torch >= (kept + moved) * torch_of[1]


@settings(deadline=None, max_examples=80)
@given(works(), st.sampled_from(MACHINES))
def test_scan_is_the_best_of_all_splits(what, c):
    r, k = best_split(c, what)
    best = min(time(c, what, Plan(slice(a), slice(b)))
               for a in range(len(what.resident_tokens) + 1)
               for b in range(len(what.other_tokens) + 1))
    assert time(c, what, Plan(slice(r), slice(k))) == pytest.approx(best, rel=1e-9)


def test_scan_counts_the_rows_that_are_sent():
    """Of a long call of which this layer has few rows, those, and not all."""
    c = costs()
    what = work([3] * 16, tokens=2048)
    assert 2048 * c.row > 16 * c.move > 48 * c.row
    assert best_split(c, what)[1] <= 4  # with all rows sent, moving all 16 would pay


@settings(deadline=None, max_examples=40)
@given(works(), st.sampled_from(MACHINES))
def test_optimum_is_the_best_of_all_plans_and_no_one_beats_it(what, c):
    optimum = Optimum(c)
    best = time(c, what, optimum.place(what))
    assert optimum.bound <= best * (1 + 1e-9)
    if len(what):
        assert best == pytest.approx(min(time(c, what, plan) for plan in plans(what)), rel=1e-9)
    for name, kind in PLACEMENTS.items():
        assert time(c, what, kind(c).place(what)) >= best * (1 - 1e-9), name


def test_bound_of_many_experts():
    """Beside all sets of twelve experts, which the optimum itself does not try."""
    rng = np.random.default_rng(0)
    for c in MACHINES:
        uses = rng.integers(1, 300, 12)
        what = Work.of(uses, rng.random(12) < 0.3, 512)
        truth = min(time(c, what, plan) for plan in plans(what))
        optimum = Optimum(c)
        found = time(c, what, optimum.place(what))
        assert optimum.bound <= truth * (1 + 1e-9) and found <= truth * 1.02
        assert optimum.bound >= truth * 0.85


def test_every_policy_gives_a_plan_that_can_be_done():
    rng = np.random.default_rng(0)
    for c, (name, kind) in itertools.product(MACHINES, PLACEMENTS.items()):
        for tokens in (1, 7):
            uses = (rng.random(16) < 0.5) * rng.integers(1, tokens + 1, 16)
            what = Work.of(uses, rng.random(16) < 0.4, tokens)
            plan = kind(c).place(what)
            kept, moved = what.resident_tokens[plan.resident], what.other_tokens[plan.moved]
            assert 0 <= len(kept) <= len(what.resident_tokens), name
            assert 0 <= len(moved) <= len(what.other_tokens), name
            kind(c).place(Work.of(uses * 0, uses > 0, tokens))  # nothing was routed here


def test_monde_moves_its_share():
    c = costs(single_copy=True)
    share = (1 / c.move) / (1 / c.move + 1 / c.device_read)
    assert MoNDE(c).share == pytest.approx(share)
    what = work(list(range(1, 41)))
    assert MoNDE(c).place(what).moved.stop == round(40 * share)
    assert MoNDE(c, ceil=True).place(work([1, 1])).moved.stop == 1
    assert MoNDE(c).place(work([1, 1])).moved.stop == 0
    assert MoNDE(c, alpha=0).place(what).moved.stop == 0
    with pytest.raises(InvalidOption, match="alpha must be at least 0, not -1"):
        MoNDE(c, alpha=-1)


def test_mondes_own_figure():
    """32 and 512 GB/s: 5.88 % of the active experts."""
    c = costs(single_copy=True)
    other = c.at(Rates(link=32e9 / 12.5e9, device=512e9 / (0.9 * 460e9)))
    assert MoNDE(other).share == pytest.approx(0.0588, abs=1e-4)


def test_mondes_best_alpha():
    c = costs()
    many = [work([400] * 16 + [5] * 40, tokens=2048)]
    assert MoNDE.best(c, [work([1, 1, 1])]).alpha == 0
    best = MoNDE.best(c, many)
    assert best.alpha > 1
    assert time(c, many[0], best.place(many[0])) < time(c, many[0], MoNDE(c).place(many[0]))


def test_duplex_gives_the_coldest_away_while_it_helps():
    c = costs("mixtral-8x7b")
    what = work([300, 200, 3, 2, 1], resident=range(5), tokens=300)
    kept = Duplex(c).place(what).resident
    assert kept.tolist() == sorted(kept.tolist(), reverse=True) and 0 < kept.sum() < 5
    device_of, torch_of = c.tables(300)
    n = what.resident_tokens

    def longer(k):
        return max(torch_of[n[:k]].sum(), device_of[n[k:]].sum())

    assert longer(kept.sum()) == pytest.approx(min(map(longer, range(6))))


def test_fiddler_looks_at_one_expert_at_a_time():
    c = costs()
    device_of, torch_of = c.tables(2048)
    turn = next(n for n in range(1, 2048) if device_of[n] > c.move + c.decode + torch_of[n])
    plan = Fiddler(c).place(work([turn + 1, turn, turn - 1, 1], tokens=2048))
    assert plan.moved.tolist() == [True, True, False, False]


def test_hybrimoe_takes_from_both_ends():
    c = costs()
    plan = HybriMoE(c).place(work([1] * 8, resident=range(4)))
    assert plan.resident == slice(4) and plan.moved == slice(0)
    plan = HybriMoE(c).place(work([1] * 8, resident=range(8)))
    assert 4 < plan.resident.stop < 8  # the torch device is the quicker one here


def test_prefix_scan_takes_what_gains_most():
    c = costs()
    what = work([500, 400, 1, 1, 1, 1], tokens=512)
    assert PrefixScan(c).place(what).moved.tolist() == [True, True, False, False, False, False]


def test_what_plans_take_beside_their_costs_changes_the_choice():
    c = costs()
    what = work([1] * 8, resident=range(3))
    assert best_split(c, what)[0] == 3
    assert best_split(c, what, Extra(both=1.0, moving=1.0)) == (0, 0)
    everything = work([1] * 8, resident=range(8))
    assert best_split(c, everything, Extra(device=1.0, both=1.0, moving=1.0)) == (8, 0)


def drive(policy, truth, what, calls):
    for _ in range(calls):
        plan = policy.place(what)
        policy.measured(what, plan, chains(truth, what, plan))
    return time(truth, what, policy.place(what))


@pytest.mark.parametrize("wrong", [
    Rates(link=2), Rates(link=0.5), Rates(device=2), Rates(device=0.5), Rates(torch=2),
    Rates(torch=0.5)])
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_wrong_costs_are_corrected(wrong, tokens):
    """With rates twice off: after some calls within 5 % of what true rates give."""
    rng = np.random.default_rng(5)
    truth = costs("deepseek-v2-lite", "rtx4090", single_copy=True)
    believed = truth.at(wrong)
    policy = MeasuredScan(believed)
    for _ in range(60):
        counts = np.bincount(rng.integers(0, 64, tokens * 6), minlength=64).clip(max=tokens)
        what = Work.of(counts, np.arange(64) < 16, tokens)
        plan = policy.place(what)
        policy.measured(what, plan, chains(truth, what, plan))
        if policy.wants_move:
            policy.measured_move(1.0, truth.move)
    counts = np.bincount(rng.integers(0, 64, tokens * 6), minlength=64).clip(max=tokens)
    what = Work.of(counts, np.arange(64) < 16, tokens)
    known = time(truth, what, Scan(truth).place(what))
    assert time(truth, what, policy.place(what)) <= known * 1.05


def test_a_loss_that_no_cost_explains_makes_it_fall_back():
    c = costs()
    what = work([1] * 8, resident=range(3))
    policy = MeasuredScan(c)
    assert policy.place(what).resident.stop == 3
    for _ in range(30):
        plan = policy.place(what)
        found = chains(c, what, plan)
        if plan.resident.stop:  # both sides at once stumble over each other
            found = type(found)(found.device, found.torch, found.total + 200e-6,
                                found.computing, 0.0, 0)
        policy.measured(what, plan, found)
    assert policy.place(what).resident.stop == 0
    for _ in range(4000):  # and then it is tried again
        plan = policy.place(what)
        policy.measured(what, plan, chains(c, what, plan))
    assert policy.place(what).resident.stop == 3


def test_a_side_that_was_not_seen_for_long_is_tried():
    c = costs(torch="cpu")
    what = work([1] * 8, resident=range(4))
    policy = MeasuredScan(c.at(Rates(torch=0.01)))  # believed to be hopeless
    drive(policy, c, what, 1200)
    assert policy.rates.torch == pytest.approx(100, rel=0.1)
    policy = MeasuredScan(costs().at(Rates(device=1e-3)))
    drive(policy, costs(), work([1] * 8, resident=range(8)), 1200)
    assert policy.rates.device == pytest.approx(1000, rel=0.1)


def test_it_says_when_more_residents_would_not_help():
    policy = MeasuredScan(costs("qwen3-30b-a3b", "cpu"))
    policy.place(work([1] * 8))
    assert not policy.useful
    policy = MeasuredScan(costs())
    policy.place(work([1] * 8))
    assert policy.useful


def test_unknown_placement():
    with pytest.raises(UnknownPolicy, match=r"placement must be one of .*not 'mond'.*mean monde"):
        placement("mond")
    assert placement("scan") is Scan
