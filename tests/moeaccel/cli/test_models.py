"""``moeaccel models``; tests/system has the RTL."""

import json

import pytest
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.zoo import models

runner = CliRunner()


@pytest.fixture(scope="module")
def listed():
    rows = runner.invoke(app, ["models", "--json"])
    assert rows.exit_code == 0, rows.output
    table = runner.invoke(app, ["models"])
    return json.loads(rows.stdout), table.stdout.splitlines()


def test_every_model_has_a_router_experts_and_whether_it_runs(listed):
    rows, _ = listed
    assert [row["key"] for row in rows] == list(models())
    assert all(row["router"] and row["experts"] for row in rows)
    assert {row["runs"] for row in rows} <= {"yes", "experts", "no"}
    assert all(bool(row["missing"]) is (row["runs"] != "yes") for row in rows)
    v3 = next(row for row in rows if row["key"] == "deepseek-v3-r1")
    assert v3["aliases"] == ["deepseek-v3", "deepseek-r1"]
    assert (v3["router"], v3["experts"]) == ("R5 4/8 x2.5", "silu")
    assert v3["router_settings"]["group_score"] == "top2_sum"
    assert v3["shared"] == {"count": 1, "width": 2048, "gate": None, "combined": "sum",
                            "place": "parallel"}


def test_the_table_is_read_at_80_columns(listed):
    rows, lines = listed
    assert max(map(len, lines)) <= 80
    assert "model                       width x h" in lines[0]
    for row in rows:  # the name is whole, and on the line with its router
        line = next(line for line in lines if line.startswith(f"{row['key']} "))
        assert f" {row['router']} " in line and line.rstrip().endswith(row["runs"])
    # What is missing is said once for all that lack it, in the driver's words.
    text = " ".join(" ".join(lines).split())
    assert "muse-spark-816b-a42b: experts: silu, norm: experts must be what load_experts" in text


def test_a_part_of_the_list():
    found = runner.invoke(app, ["models", "list", "qwen3-next", "--json"])
    assert [row["key"] for row in json.loads(found.stdout)] == ["qwen3-next-80b-a3b"]
    other = runner.invoke(app, ["models", "deepseek-r1"])
    assert "deepseek-v3-r1 is also deepseek-v3, deepseek-r1." in other.stdout


def test_a_part_that_no_model_has():
    """It is an error, with names that are near, and no empty table."""
    for more in ([], ["--json"]):
        found = runner.invoke(app, ["models", "olmo-1b", *more])
        assert (found.exit_code, found.stdout) == (2, "")
        assert "not 'olmo-1b'; did you mean olmoe-1b-7b" in found.stderr


def test_help_names_both():
    text = runner.invoke(app, ["models", "--help"]).output
    assert " list " in text and " verify " in text
