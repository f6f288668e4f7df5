import numpy as np
import pytest

from moeaccel.errors import OutputError
from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.compare import compare, device_alone, tuned
from moeaccel.host.policies.costs import machine
from moeaccel.host.policies.plot import plot
from moeaccel.host.policies.systems import SYSTEMS
from moeaccel.host.traces.presets import generate
from moeaccel.zoo import model

MODEL = model("mixtral-8x7b")
COSTS = machine().holding(MODEL, "int4_g32").layer(MODEL)


@pytest.fixture(scope="module")
def rows():
    trace = generate("mixtral-8x7b", requests=2, tokens=24, prompt=8, seed=3)
    seen = []
    chosen = [SYSTEMS[name] for name in (
        "all-on-device", "moeaccel", "belady", "cache-conditional")]
    found = compare(trace, COSTS, gpu_bytes=64 * COSTS.resident_bytes, systems=chosen,
                    progress=seen.append)
    assert seen == [s.name for s in chosen]
    return {row.outcome.system.name: row for row in found}


def test_quickest_first_and_beside_belady(rows):
    seconds = [row.outcome.seconds for row in rows.values()]
    assert seconds == sorted(seconds)
    assert rows["belady"].to_belady == 0 and rows["moeaccel"].to_belady > 0
    assert rows["all-on-device"].to_belady == rows["belady"].outcome.hit_rate
    assert rows["moeaccel"].outcome.to_optimum == pytest.approx(0, abs=0.05)
    assert rows["cache-conditional"].outcome.to_optimum > 1


def test_as_numbers(rows):
    found = rows["moeaccel"].as_dict()
    assert found["policy"] == "moeaccel" and found["lossless"] is True
    assert len(found["layers"]["hits"]) == 32
    assert sum(found["layers"]["hits"]) / sum(found["layers"]["uses"]) == found["hit_rate"]
    assert found["seconds_per_token"] > found["moe_seconds_per_token"] > 0


def test_mondes_alpha_is_tuned_for_the_trace():
    prompts = generate("mixtral-8x7b", requests=1, tokens=512, prompt=512, seed=3)
    decode = generate("mixtral-8x7b", requests=1, tokens=8, seed=3)
    monde = SYSTEMS["monde"]
    assert tuned(monde, prompts, COSTS).placement.options["alpha"] > 0
    assert tuned(monde, decode, COSTS).placement.options["alpha"] == 0
    assert tuned(SYSTEMS["monde-ceil"], prompts, COSTS) is SYSTEMS["monde-ceil"]


def test_where_the_device_alone_is_best():
    """Of single tokens; not of prompts, whose hot experts are worth a move."""
    trace = generate("mixtral-8x7b", requests=2, tokens=264, prompt=256, seed=3)
    assert device_alone(trace, COSTS) == {1: 1.0, 256: 0.0}


def test_plot(rows, tmp_path):
    plot(list(rows.values()), tmp_path / "p.png", title="a title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidOption, match=r"plot must end in one of .*, not '\.xyz'"):
        plot(list(rows.values()), tmp_path / "p.xyz")
    with pytest.raises(OutputError, match="must be a place that can be written"):
        plot(list(rows.values()), tmp_path / "no" / "p.svg")
    assert np.isfinite([row.outcome.seconds for row in rows.values()]).all()
