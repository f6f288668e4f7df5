"""Cases are data: drawn, printed, read back, made smaller; a soak goes on, reports and ends."""

import functools
import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.config import PRESETS
from moeaccel.cycles import Prediction
from moeaccel.router.choices import Renormalize, Score
from moeaccel.sim import MemoryModel, StallModel, cases, soak
from moeaccel.sim.cases import PROMPT, Call, Case, Kind, afford, draw_case, shrink
from moeaccel.sim.errors import SimulationError
from moeaccel.sim.routed import Routed

TARGETS = [("tiny", 1), ("small", 1), ("tiny", 4), ("small", 4)]


@functools.cache
def drawn(count):
    return [draw_case(seed, *TARGETS[seed % 4], budget=60_000) for seed in range(count)]


def smallest(case, fails):
    simpler = [other for other, _ in shrink(case, lambda other: "wrong" if fails(other) else None)]
    return simpler[-1] if simpler else case


def test_cases_are_reproducible_and_differ():
    found = drawn(60)
    assert found == drawn.__wrapped__(60)
    assert len({case.to_json() for case in found}) == 60


def test_cases_are_read_back():
    for case in drawn(100):
        text = case.to_json()
        assert "\n" not in text and Case.from_json(text) == case
    assert Case.from_json('{"calls":[{}],"memories":[{}]}') == Case()


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"calls":[],"memories":[{}]}', '{"calls":[{}],"memories":[]}',
    '{"calls":[{"x":1}],"memories":[{}]}', '{"config":"huge","calls":[{}],"memories":[{}]}',
    '{"calls":[{"ids":[[0],[]]}],"memories":[{}]}', '{"calls":[{"end":"bang"}],"memories":[{}]}',
    '{"calls":[{"kinds":[{"d_expert":0}]}],"memories":[{}]}',
    '{"calls":[{"kinds":[{"activation":"mish"}]}],"memories":[{}]}',
    '{"calls":[{"kinds":[{"d_expert":288}]}],"memories":[{}]}', '{"calls":[{"kinds":[1]}]}',
    '{"calls":[{"ids":[[]],"routed":{"top_k":2}}],"memories":[{}]}',
    '{"calls":[{"routed":{}}],"memories":[{}]}',
    '{"calls":[{"ids":[[]],"routed":{"only":true,"shared":1}}],"memories":[{}]}',
    '{"calls":[{}],"memories":[{"read_latency":0}]}'])
def test_what_is_no_case_is_refused(text):
    with pytest.raises(SimulationError, match="case must be a line that"):
        Case.from_json(text)


def test_cases_have_everything():
    """A few hundred seeds reach each kind that a fault may need."""
    found = drawn(400)
    calls = [call for case in found for call in case.calls]
    assert {call.weight_format for call in calls} == set(cases.FORMATS)
    assert {call.activation_bits for call in calls} == {8, 16}
    assert {call.end for call in calls} == set(cases.ENDS)
    routers = [call.routed for call in calls if call.routed is not None]
    assert {router.only for router in routers} == {True, False}
    assert {router.score for router in routers} == {score.key for score in Score}
    assert {router.renormalize for router in routers} == {one.key for one in Renormalize}
    assert any(router.shared and router.keep_groups > 1 for router in routers)
    assert any(call.end and call.routed for call in calls)
    kinds = [kind for call in calls for kind in call.kinds]
    assert {kind.activation for kind in kinds} == set(cases.ACTIVATIONS)
    assert {(k.weight_format, k.down_format) for k in kinds} == set(
        itertools.product(cases.FORMATS, cases.FORMATS))
    assert any(len({call.kind_of(e).d_expert for e in range(call.experts)}) > 2 for call in calls)
    assert any(call.nan >= 0 for call in calls) and any(not call.experts for call in calls)
    without = [call for call in calls if call.experts and call.ids
               and {all(not 0 <= i < call.experts for i in row) for row in call.ids}
               == {True, False}]
    assert len(without) > 50
    assert any(len(call.ids) > PRESETS["tiny"].max_slots and call.experts > 1 for call in calls)
    assert any(len(case.calls) > 3 for case in found)
    assert any(case.memories.count(PROMPT) == 3 for case in found)
    for case in found:
        for at, call in enumerate(case.calls):
            assert not call.end or at + 1 < len(case.calls)


def test_a_case_is_within_its_budget():
    """Extreme memories are made gentler, and only as far as they must."""
    limits, budget = PRESETS["tiny"], 100_000
    little = Prediction(bytes_read_weights=64, bytes_read_other=64, bytes_written=64)
    much = Prediction(bytes_read_weights=1 << 16, bytes_read_other=1 << 16, bytes_written=1 << 16)
    slow = MemoryModel(read_latency=10_000, last_beat_delay=10,
                       stalls=StallModel(r=0.99, b=0.5, length=100))
    assert afford(replace(slow, stalls=StallModel()), limits, little, budget=budget).read_latency \
        == 10_000
    gentle = afford(slow, limits, much, budget=budget)
    assert gentle.read_latency < 100 and gentle.stalls.length < 10
    assert afford(PROMPT, limits, little, budget=budget) == PROMPT


def test_shrinking_finds_what_matters():
    """Whatever is drawn with a token without an expert and slow acknowledgements ends the same."""
    def fails(case):
        return any(call.experts and call.routed is None and any(
            all(not 0 <= i < call.experts for i in row) for row in call.ids)
            for call in case.calls) and any(
            memory.stalls.b > 0 or memory.write_latency > 400 for memory in case.memories)

    found = {smallest(case, fails) for case in drawn(400) if fails(case)}
    assert len(found) > 5
    for case in found:
        (call,), (memory,) = case.calls, case.memories
        ((expert,),) = call.ids
        assert not 0 <= expert < call.experts and call.end == ""
        assert (call.d_in, call.d_other, case.config, case.channels) == (32, 32, "tiny", 1)
        changed = replace(memory, seed=PROMPT.seed, write_latency=1,
                          stalls=StallModel(length=memory.stalls.length))
        assert changed == replace(PROMPT, stalls=StallModel(length=1))
        assert memory.write_latency == 1 or 400 < memory.write_latency < 804


def test_shrinking_of_a_token():
    rng = random.Random(0)
    ids = tuple((rng.randrange(3),) for _ in range(37))
    case = Case(calls=(Call(experts=3, ids=(*ids, (-1,)), nan=37), Call(), Call(experts=0,
                                                                             ids=((),) * 5)))
    found = smallest(case, lambda other: any(call.nan >= 0 and call.ids[call.nan] == (-1,)
                                             for call in other.calls))
    assert found == Case(calls=(Call(ids=((-1,),), nan=0),))


def test_shrinking_of_a_kind():
    """What differs in one way keeps it; of several kinds the one that matters is left."""
    kinds = (Kind(d_expert=160), Kind(down_format="mxfp4", activation="relu"), Kind())
    case = Case(calls=(Call(experts=5, kinds=kinds, ids=((4, 3), (1, 0))),))
    found = smallest(case, lambda other: any(
        call.kind_of(e).activation == "relu"
        for call in other.calls for row in call.ids for e in row if call.experts))
    assert found == Case(calls=(Call(kinds=(Kind(activation="relu"),)),))


def test_shrinking_of_a_router():
    """What is no router is left out on the way: two groups are more than one expert has."""
    routed = Routed(top_k=3, score="sigmoid", renormalize="sum", groups=4, keep_groups=2,
                    group_score="top2_sum", bias=True, shared=2)
    case = Case(config="small", calls=(Call(d_in=96, experts=8, ids=((),) * 9, routed=routed),))
    found = smallest(case, lambda other: any(
        call.routed is not None and call.routed.groups > 1 for call in other.calls))
    assert found == Case(calls=(Call(experts=4, ids=((),), routed=Routed(groups=4)),))
    assert Case.from_json(found.to_json()) == found


def test_a_mixed_layer_costs_about_its_parts():
    """What the cycle model says goes into how large cases are drawn."""
    tiny = PRESETS["tiny"]
    kinds = Kind(weight_format="mxint8", down_format="mxint8"), Kind(d_expert=160)
    each = [Call(experts=2, ids=((0, 1),), kinds=(kind,)) for kind in kinds]
    mixed = Call(experts=2, ids=((0, 1),), kinds=kinds)
    parts = [call.predict(tiny) for call in each]
    assert 2 * mixed.predict(tiny).bytes_read_weights == sum(p.bytes_read_weights for p in parts)
    plain = Call(experts=2, ids=((0, 1),), weight_format="mxint8")
    assert each[0].predict(tiny) == plain.predict(tiny)


@pytest.mark.parametrize("end", cases.ENDS)
def test_shrinking_of_an_end(end):
    """What takes a reset of the pin keeps it; what any end does, the first one does."""
    ended = [case for case in drawn(400) if any(call.end == end for call in case.calls)]
    assert ended
    for case in ended[:3]:
        found = smallest(case, lambda other: any(
            cases.ENDS.index(call.end) >= cases.ENDS.index(end) for call in other.calls))
        (call,) = found.calls
        assert (call.end, call.after, found.memories) == (end, 1 if end else 0, (PROMPT,))


# -- soaking ---------------------------------------------------------------------------------------
@pytest.fixture
def fails(monkeypatch):
    """Let cases fail without a simulator: those with so many calls."""
    checked = []

    def check(self, case):
        checked.append(case)
        return "wrong" if len(case.calls) > 2 else None

    monkeypatch.setattr(soak.Soak, "check", check)
    monkeypatch.setattr(soak, "build_accelerator_model", lambda config: config.name)
    return checked


def run(*arguments):
    return CliRunner().invoke(app, ["soak", *arguments])


def test_a_soak_reports_what_fails(fails):
    result = run("--minutes", "1", "--seed", "5", "--config", "tiny", "--channels", "1", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert len(report["failures"]) == soak.MOST_FAILURES and not report["interrupted"]
    for failure in report["failures"]:
        case, small = (Case.from_json(failure[name]) for name in ("case", "smallest"))
        assert case == draw_case(failure["seed"], "tiny", 1, budget=soak.BUDGET["tiny"])
        assert len(case.calls) > 2 and len(small.calls) == 3
        for call in small.calls:
            assert len(call.ids) == 1 and len(call.ids[0]) <= 1
            assert replace(call, ids=((0,),), experts=1) == Call()
        assert small.memories == (PROMPT,)
    assert [case.config for case in fails] == ["tiny"] * len(fails)


def test_a_soak_is_printed_so_that_it_can_be_run_again(fails):
    result = run("--seed", "5", "--config", "tiny", "--channels", "1")
    assert result.exit_code == 1 and "5 failed" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "--case" in line)
    again = run("--case", line.split("'")[1])
    assert (again.exit_code, again.stdout.strip()) == (1, "wrong")
    assert json.loads(run("--case", line.split("'")[1], "--json").stdout) == {"failed": "wrong"}
    assert run("--case", Case().to_json()).exit_code == 0


def test_a_soak_without_a_failure_ends_in_time(fails, monkeypatch):
    monkeypatch.setattr(soak.Soak, "check", lambda self, case: fails.append(case))
    result = run("--minutes", "0.01", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["cases"] == len(fails) > 4
    assert [(case.config, case.channels) for case in fails[:4]] == TARGETS


@pytest.mark.parametrize("after", [3, 40])
def test_control_c_ends_a_soak_with_what_it_found(monkeypatch, fails, after):
    """Also while a case is being made smaller: the best so far is printed."""
    check = soak.Soak.check

    def interrupted(self, case):
        if len(fails) == after:
            raise KeyboardInterrupt
        return check(self, case)

    monkeypatch.setattr(soak.Soak, "check", interrupted)
    result = run("--minutes", "5", "--seed", "5", "--config", "tiny", "--channels", "1", "--json")
    report = json.loads(result.stdout)
    assert report["interrupted"] and result.exit_code == (1 if report["failures"] else 0)
    assert bool(report["failures"]) == (after == 40)


@pytest.mark.parametrize("arguments", [
    ["--config", "huge"], ["--minutes", "0"], ["--seed", "-1"], ["--channels", "0"],
    ["--channels", "3"], ["--case", "{"]])
def test_bad_options(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_ids_of_a_call_that_has_none_are_empty_rows():
    for case in drawn(100):
        for call in case.calls:
            assert np.array(call.ids).shape == (len(call.ids), len(call.ids[0]))
            assert bool(call.ids[0]) == bool(call.experts and call.routed is None)
