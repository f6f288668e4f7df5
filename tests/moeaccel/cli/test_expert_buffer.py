"""``moeaccel bench expert-buffer``: tables, valid JSON, errors of one line."""

import json

from typer.testing import CliRunner

from moeaccel.cli import app

runner = CliRunner()
BENCH = ("bench", "expert-buffer", "--model", "mixtral-8x7b", "--config", "wide512", "--requests",
         "1", "--tokens", "12", "--prompt", "8")


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


def test_json():
    result = run(*BENCH, "--prediction", "none", "--prediction", "oracle", "--slots", 2,
                 "--slot-bytes", 1 << 20, "--gap", 20000, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["slot_bytes"] == 1 << 20 < found["image_bytes"]
    none, oracle = found["predictions"]
    assert none["prediction"] == "none" and none["fetched_bytes"] == 0
    assert oracle["accuracy"] == 1 and oracle["wasted_bytes"] == 0
    assert oracle["hits"] > 0 and oracle["cycles"] == none["cycles"]
    order, *_, last = found["prompts"]
    assert (order["window"], last["window"]) == (1, 8)
    assert order["pairs"] == last["pairs"] == 8 * 32 * 2 and last["loads"] < order["loads"]


def test_table():
    table = run(*BENCH, "--prediction", "circular").stdout
    assert "circular" in table and "pairs a load" in table


def test_a_device_beside_the_model():
    result = run(*BENCH, "--prediction", "circular", "--prediction", "oracle", "--slots", 4,
                 "--device", "golden", "--device-config", "tiny", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (row,) = found["on_device"]  # there is no oracle
    assert (found["device"], row["prediction"]) == ("golden", "circular")
    assert row["equal"] and row["device"] == row["model"]
    assert row["device"]["hits"] > 0 and row["device"]["wasted_bytes"] > 0


def test_what_is_wrong_is_named():
    result = run(*BENCH[:4], "--config", "tiny")
    assert result.exit_code == 2
    assert "config must take experts of 4096 x 14336, and 'tiny' takes 256" in result.stderr
    result = run(*BENCH, "--prediction", "flame")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and "circular" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
