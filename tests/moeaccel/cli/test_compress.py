"""``moeaccel compress``: passes over the demo model."""

import json

import pytest
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.host.compress.method import methods

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, ["compress", *map(str, arguments)])


def test_list():
    rows = json.loads(run("--list", "--json").stdout)
    assert {row["method"] for row in rows} == set(methods())
    table = run("--list").stdout
    assert "moe-pruner" in table and "arXiv 2402.14800" in table and "share=0.75" in table


def test_passes_and_their_accuracy():
    small = ("--prompts", 4, "--calibration-texts", 8)
    result = run(*small, "--method", "naee", "--method", "moe-pruner", "--option", "share=0.5",
                 "--option", "pattern=1:4", "--json")
    assert result.exit_code == 0, result.output
    none, naee, sparse = json.loads(result.stdout)
    assert none["report"]["output_error"] == 0 and none["report"]["experts"] == 24
    assert naee["report"]["experts"] == 12 and naee["options"] == {"share": 0.5}
    assert naee["report"]["stored_bytes"] == none["report"]["stored_bytes"] / 2
    assert sparse["options"] == {"pattern": "1:4"} and sparse["report"]["output_error"] > 0.1
    assert set(none["accuracy"]) == {"add", "sort", "reverse", "close"}
    assert none["mean_accuracy"] > sparse["mean_accuracy"]
    table = run(*small, "--method", "naee-skip", "--weight-format", "mxint8").stdout
    assert "naee-skip" in table and "mxint8" in table


@pytest.mark.parametrize(("arguments", "message"), [
    (("--method", "shrink"), "method must be one of adapmoe"),
    (("--method", "naee", "--option", "bits=4"), "option must be one of a chosen pass"),
    (("--option", "share"), "option must be NAME=VALUE"),
    (("--option", "share=half"), "share must be a value such as 0.75"),
    (("--option", "share=2"), "share of eep must be a share of the experts above 0 and at most 1"),
    (("--option", "pattern=3:4"), "pattern of magnitude must be one of 2:4, 1:4, not '3:4'"),
    (("--option", "rank=nan"), "rank of moe-i2 must be a share of the full rank"),
    (("--weight-format", "int5"), "weight_format must be one of")])
def test_what_is_wrong_is_named(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
