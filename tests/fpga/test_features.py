"""What features cost: which blocks are compared, and what their difference is."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from moeaccel.errors import ConfigurationError
from moeaccel.fpga import features
from moeaccel.fpga.flow import CELLS

COUNTS = {"activation_unit": 5, "row_sums": 3, "route_unit": 70}


@pytest.fixture
def built(monkeypatch):
    """Blocks whose text is what of the configuration they depend on, and whose cells are known."""
    synthesised = []

    def block_build(block, config, *, folder):
        seen = {"activation_unit": config.activations, "row_sums": config.y_banks,
                "route_unit": config.router_top_k}.get(block, ())

        def cells(module):
            assert module == "top.block"
            assert (block, seen) in synthesised
            size = len(seen) if isinstance(seen, tuple) else seen
            return dict.fromkeys(CELLS, COUNTS.get(block, 0) * size)

        return SimpleNamespace(digest=f"{block} {seen}", tools="yosys 1, nextpnr 2", cells=cells,
                               synthesise=lambda: synthesised.append((block, seen)))

    monkeypatch.setattr(features, "block_build", block_build)
    return synthesised


def test_a_feature_costs_what_its_blocks_have_more(built):
    (cost,) = features.costs(["relu"])
    assert cost.blocks == ["activation_unit"]
    assert cost.lut4 == cost.block_rams == 5 * (2 - 1)
    assert {block for block, _ in built} == {"activation_unit"}


def test_copies_count(built):
    """With two results a cycle there are two of a block that is the same."""
    (cost,) = features.costs(["results_per_cycle=2"])
    assert cost.blocks == ["result_serialiser", "activation_unit", "row_sums"]
    assert cost.lut4 == (2 - 1) * (5 * 1 + 3 * 1)


def test_a_router_is_there_or_not(built):
    whole, wider = features.costs(["router (softmax, top-8)", "router: top-16"])
    assert (whole.blocks, whole.lut4) == (["route_unit"], 70 * 8)
    assert (wider.blocks, wider.lut4) == (["route_unit"], 70 * (16 - 8))


def test_the_table_is_written(built, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "REPORTS", tmp_path)
    features._save(list(features.costs(["relu", "y_banks=2"])), tmp_path)
    text = (tmp_path / "features.md").read_text()
    assert "| relu | +5 | +5 | +5 | +5 | +5 | +5 | activation_unit |" in text
    assert "| y_banks=2 | +3 | +3 | +3 | +3 | +3 | +3 | row_sums |" in text
    assert "with yosys 1:" in text


def test_printed(built):
    found = CliRunner().invoke(features.app, ["--feature", "relu", "--json"])
    assert [cost["feature"] for cost in json.loads(found.stdout)] == ["relu"]
    table = CliRunner().invoke(features.app, ["--feature", "relu"])
    assert "relu" in table.stdout


def test_unknown_features():
    with pytest.raises(ConfigurationError, match=r"feature must be one of relu, .*, not 'wings'"):
        next(features.costs(["wings"]))
    assert CliRunner().invoke(features.app, ["--feature", "wings"]).exit_code == 2


def test_each_feature_is_a_difference():
    """And a configuration that passes its checks."""
    for name, (before, after) in features.FEATURES.items():
        assert before.replace(name="") != after.replace(name=""), name
