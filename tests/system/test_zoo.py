"""Models of the zoo on the RTL: few rows here, all of them in the slow tests."""

import json

import pytest
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.config import PRESETS, preset
from moeaccel.host.zoo.support import Supports, equipped
from moeaccel.host.zoo.true_size import TrueSizes
from moeaccel.host.zoo.verify import verify
from moeaccel.router.choices import MODES, Score
from moeaccel.zoo import model, models

# That of tests/system/test_routing.py, so that both find one model in the cache.
ROUTER = preset("tiny").replace(
    name="tiny-router", router=tuple(score.key for score in Score), router_top_k=8,
    router_modes=MODES, max_experts=64, second_up=True)
ALL = list(models().values())


def check(verdict, support):
    """Hold a verdict to what the driver says that it can do, and nothing else may be wrong."""
    assert verdict.ok is (support.runs == "yes"), verdict.reason
    assert support.experts or verdict.relative_error < 1e-4
    assert verdict.selection_differences == 0


def test_some_rows(pair_of):
    keys = ["grok-1", "llama-4-scout", "nemotron-3-nano-30b-a3b", "deepseek-v2",
            "deepseek-v4-flash", "phi-3.5-moe", "switch-base-128", "swin-moe-s-32e", "openmoe-8b"]
    with pair_of(ROUTER) as pair, Supports() as supports:
        for key in keys:
            check(verify(model(key), pair.golden, pair.rtl), supports(model(key)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_rows(pair_of):
    with pair_of(equipped("small")) as pair, Supports() as supports:
        verdicts = [(verify(m, pair.golden, pair.rtl), supports(m)) for m in ALL]
    assert [verdict for verdict, support in verdicts
            if verdict.ok is not (support.runs == "yes")] == []
    for verdict, support in verdicts:
        assert (verdict.relative_error is None) is bool(support.experts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("key", [m.key for m in ALL if m.survey])
def test_one_expert_at_its_true_size(true_sizes, key):
    m = model(key)
    with Supports() as supports:
        refusal = supports(m).experts
    if refusal:
        pytest.skip(refusal)
    for d_in, d_expert in m.expert_widths:
        differ, error = true_sizes(m, d_in, d_expert)
        assert not differ
        assert error < 1e-4


@pytest.fixture(scope="module")
def true_sizes():
    with TrueSizes() as sizes:
        yield sizes


def test_the_command(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", ROUTER)
    result = CliRunner().invoke(app, [
        "models", "verify", "mixtral-8x7b", "jamba-v0.1", "--config", "tiny", "--json"])
    rows = json.loads(result.stdout)
    assert result.stderr == ""
    assert [row["name"] for row in rows] == ["mixtral-8x7b", "jamba-v0.1"]
    assert all(list(row) == ["name", "ok", "router", "expert", "selection_differences",
                             "relative_error", "reason"] for row in rows)
    assert all(row["selection_differences"] == 0 and row["relative_error"] < 1e-4 for row in rows)
    assert result.exit_code == (0 if all(row["ok"] for row in rows) else 1)
