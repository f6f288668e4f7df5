"""``moeaccel policies`` and ``moeaccel bench policies``: tables, valid JSON, errors of one line."""

import json

import pytest
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.host.policies.systems import SYSTEMS

runner = CliRunner()
BENCH = ("bench", "policies", "--model", "mixtral-8x7b", "--policy", "moeaccel", "--policy", "daop")
SMALL = ("--requests", "1", "--tokens", "16", "--prompt", "4")


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


def fails(message, *arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_list():
    rows = {row["policy"]: row for row in json.loads(run("policies", "--json").stdout)}
    assert list(rows) == list(SYSTEMS)
    assert rows["sida"]["lossless"] is False and rows["moeaccel"]["routing"] is None
    assert rows["moeaccel"]["placement"]["name"] == "measured-scan"
    assert rows["promoe"]["prefetch"]["options"]["depth"] == 3
    table = run("policies").stdout
    assert "mixtral-offloading" in table and "arXiv 2401.14361" in table and "lossy" in table


def test_compare(tmp_path):
    picture = tmp_path / "p.svg"
    result = run(*BENCH, *SMALL, "--gpu-bytes", "8GiB", "--plot", picture, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["gpu_bytes"], found["tokens"]) == (8 << 30, 16)
    assert found["machine"] == "h100 + 2 x u55c"
    assert {row["policy"] for row in found["policies"]} == {"moeaccel", "daop"}
    assert found["device_alone_is_best"]["h100"]["1"] == 1
    assert set(found["over_monde"]) == {"h100", "rtx4090", "cpu"}
    assert all(gain["rounded up"] >= gain["best alpha"] for gain in found["over_monde"].values())
    assert picture.read_text().startswith("<?xml")
    table = run(*BENCH, *SMALL, "--gpu-bytes", "10%", "--torch", "cpu", "--profile",
                trace_of(tmp_path, "mixtral-8x7b")).stdout
    assert "all on the device is already best: 100% of calls of 1" in table
    assert "moeaccel" in table and "cpu + 2 x u55c" in table


def trace_of(folder, name, *more):
    path = folder / f"{name}.safetensors"
    run("trace", "generate", "--model", name, "--requests", 1, "--tokens", 8, "-o", path, *more)
    return path


def test_what_is_wrong_is_named(tmp_path):
    fails("policy must be one of", *BENCH, "--policy", "doap")
    fails("gpu_bytes must be 0 or at least 352,321,536, one expert, not 1", *BENCH, *SMALL,
          "--gpu-bytes", 1)
    fails("gpu_bytes must be a number of bytes", *BENCH, *SMALL, "--gpu-bytes", "much")
    fails("or a share from 0% to 100%, not '200%'", *BENCH,
          "--gpu-bytes", "200%")
    fails("gpu_bytes must be a number of bytes from 0 on", *BENCH, *SMALL, "--gpu-bytes", "-5%")
    fails("torch device must be one of", *BENCH, "--torch", "tpu")
    fails("model must be one of `moeaccel models`", "bench", "policies", "--model", "nothing")
    fails("a trace must be given with --trace for glm-4.5", "bench", "policies", "--model",
          "glm-4.5", *SMALL)
    fails("weight_format must be one of", *BENCH, "--weight-format", "int3")
    other = trace_of(tmp_path, "olmoe-1b-7b")
    fails("must be of a model with 32 layers of 8 experts, top-2", *BENCH, "--trace", other)
    fails("must have 32 layers of 8 experts", *BENCH, *SMALL, "--profile", other)
    other.write_bytes(other.read_bytes()[:-5])
    fails("must be a whole safetensors file", *BENCH, "--trace", other)
    fails("plot must end in one of", *BENCH, *SMALL, "--plot", tmp_path / "p.xyz")


@pytest.mark.parametrize(("text", "size"), [
    ("0", 0), ("100", 100), ("8GiB", 8 << 30), ("1.5 GB", 1_500_000_000), ("25%", 250),
    ("2mb", 2_000_000), ("3B", 3)])
def test_sizes(text, size):
    from moeaccel.host.sizes import size_of

    assert size_of("gpu_bytes", text).of(1000) == size
