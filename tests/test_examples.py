"""Every example runs, and what it prints is what it promises."""

import re
import runpy
from pathlib import Path

import pytest

import moeaccel.host.transformers_plugin as plugin

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture
def printed(capsys):
    """Return a function that runs an example and returns what it prints."""
    def run(name, *arguments):
        path = next(path for path in EXAMPLES if path.stem == name)
        runpy.run_path(str(path))["main"](*arguments)
        return capsys.readouterr().out

    yield run
    plugin.release()
    plugin.use_device(None)


def shares(line):
    """Return the percentages of a line by name."""
    return {name.strip(): float(value) for name, value in re.findall(r"([\w ]+) ([\d.]+)%", line)}


def test_experts(printed):
    out = printed("experts")
    assert "golden: y (12, 64), gate and up off by " in out
    assert "three commands in flight: bits equal" in out


def test_mixed_layer(printed):
    lines = printed("mixed_layer").splitlines()
    assert len(lines) == 4 and all(line.endswith("as it is alone: yes") for line in lines)
    assert "expert 1: int4_g32 then mxint8, d_expert 128" in lines[1]
    sizes = [int(re.search(r"([\d,]+) bytes", line)[1].replace(",", "")) for line in lines]
    assert sizes == sorted(sizes, reverse=True)


def test_hugging_face(printed):
    out = printed("hugging_face")
    assert 0 < float(re.search(r"off by ([\d.]+)%", out)[1]) < 2
    assert "2 layers on golden" in out and "10 commands" in out  # five forward passes
    routed = re.search(r"device: model.layers.0.mlp, model.layers.1.mlp; .* by ([\d.]+)%", out)
    assert float(routed[1]) < 0.1


def test_counters(printed):
    decode, decode_times, batch, batch_times = printed("counters").splitlines()
    assert decode.startswith("1 token(s)") and "2 passes" in decode
    assert batch.startswith("16 token(s)")
    for line in (decode_times, batch_times):
        assert sum(shares(line).values()) == pytest.approx(100, abs=3)
    assert 50 < shares(decode)["weights take"] <= 100


def test_residency(printed):
    title, quarter, half = printed("residency").splitlines()
    assert title == "Mixtral-8x7B: 64 steps of decode, 32 layers of 8 experts"
    few, many = shares(quarter.partition(":")[2]), shares(half.partition(":")[2])
    assert max(few, key=few.get).endswith("who knows the future")
    assert [many[name] > few[name] for name in few] == [True] * 4


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES} <= tested
    assert all(len(path.read_text().splitlines()) <= 55 for path in EXAMPLES)
