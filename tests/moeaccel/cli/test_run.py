"""``moeaccel run`` and ``moeaccel bench`` on the golden transport; tests/system has the RTL."""

import json

from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.traces import RoutingTrace

runner = CliRunner()


def test_run_answers_and_compares():
    result = runner.invoke(app, ["run", "--prompt", "27+85=", "--prompt", "sort cab=",
                                 "--device", "golden", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["device_answers"] == ["112", "abc"] and report["logits_equal"]
    assert report["expert_passes"] > 0 and report["bytes_read"] > 0


def test_run_with_the_routes_of_the_device():
    asked = ["run", "--prompt", "27+85=", "--device", "golden", "--route"]
    result = runner.invoke(app, [*asked, "--json"])
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["device_answers"] == ["112"] and report["logits_equal"]
    assert report["routed"] == 3 and report["bytes_read"] > 0
    result = runner.invoke(app, asked)
    assert "the device has routed the tokens of 3 layers" in result.output
    result = runner.invoke(app, [*asked, "--config", "ulx3s"])
    assert result.exit_code == 2 and "there is no router in config 'ulx3s'" in result.output


def test_run_by_a_recorded_trace(tmp_path):
    trace = str(tmp_path / "trace.safetensors")
    result = runner.invoke(app, ["trace", "record", str(CHECKPOINT), "--prompt", "27+85=",
                                 "--new-tokens", "8", "--out", trace])
    assert result.exit_code == 0, result.output
    asked = ["run", "--device", "golden", "--json", "--routes", trace, "--prompt", "27+85="]
    result = runner.invoke(app, asked)
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["device_answers"] == ["112"] and report["logits_equal"]
    result = runner.invoke(app, [*asked, "--prompt", "1+1="])
    assert result.exit_code == 2 and "prompts must be one with routes" in result.output
    RoutingTrace.load(trace).select(layers=[0]).save(trace)
    result = runner.invoke(app, asked)
    assert result.exit_code == 2 and "routes must be of all layers" in result.output


def test_run_needs_a_prompt():
    result = runner.invoke(app, ["run"])
    assert result.exit_code == 2 and "give --prompt TEXT or --demo" in result.output


def test_bench_decode_of_a_small_model():
    result = runner.invoke(app, [
        "bench", "decode", "--model", "granite-3.x-3b-a800m", "--device", "golden",
        "--config", "peer256", "--tokens", "1", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["matches_golden"] and report["experts_used"] == 8
    assert report["stored_bytes"] > 0 and report["rel_err_float"] < 0.2


def test_bench_names_a_bad_routing_and_a_bad_model():
    result = runner.invoke(app, ["bench", "prefill", "--device", "golden", "--routing", "zip",
                                 "--model", "granite-3.x-3b-a800m", "--config", "peer256"])
    assert result.exit_code == 2 and "routing must be uniform or zipf:S" in result.output
    result = runner.invoke(app, ["bench", "decode", "--model", "olmo-1b"])
    assert result.exit_code == 2 and "did you mean olmoe-1b-7b" in result.output


def test_models_lists_the_zoo():
    result = runner.invoke(app, ["models", "olmoe", "--json"])
    rows = json.loads(result.stdout)
    assert [(r["key"], r["d_model"], r["d_expert"], r["n_experts"], r["top_k"]) for r in rows] == [
        ("olmoe-1b-7b", 2048, 1024, 64, 8)]
