"""Figures of a benchmark, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.host import open_device
from moeaccel.host.benchmark import (
    Bench,
    BenchmarkError,
    bench_experts,
    bench_gemm,
    memory_share,
    routing,
)
from moeaccel.host.benchmark_checks import check_routed, routed_config
from moeaccel.host.benchmark_moe import bench_moe
from moeaccel.host.demo.run import run
from moeaccel.zoo import model as find_model

TINY = PRESETS["tiny"]


@pytest.mark.parametrize("channels", [1, 4])
def test_the_memory_share_is_of_all_channels(channels):
    config = TINY.replace(channels=channels)
    assert memory_share(config, 8 * 1000, 1000) == 1 / channels
    assert memory_share(config, 100, 0) == 0.0


def test_a_measurement_is_of_the_whole_machine():
    """On two channels a product takes half of the weights on each, and nothing is over 1."""
    config = TINY.replace(name="two", channels=2)
    with open_device("golden", config=config, memory_bytes=1 << 22, timing=True,
                     latency=9) as device:
        said = []
        bench = Bench(device=device, device_name="golden", memory="ideal", latency=9,
                      weight_format="mxint8", activation_bits=8, seed=3, progress=said.append)
        result = bench_gemm(bench, m=2, k=64, n=128)
        assert device.last_cycles == result.cycles == result.cycle_model_cycles
    assert result.matches_golden
    assert result.config == "two" and result.model == "2x64x128" and result.tokens == 2
    assert result.memory_share == round(result.stored_bytes / (2 * 8 * result.cycles), 5)
    assert 0 < result.memory_share < 1
    assert said == ["quantising and loading", "running"]


@pytest.mark.parametrize("name", ["gpt-oss-20b", "nllb-moe-54b", "deepseek-v4-flash"])
def test_experts_of_every_kind(name):
    """Biases, gpt-oss's gate, a limit, no up rows: measured, and checked against float64."""
    model = find_model(name)
    small = replace(model, d_model=96, n_experts=4, top_k=2,
                    expert=replace(model.expert, d_expert=64))
    with open_device("golden", config=TINY, memory_bytes=1 << 22, timing=True,
                     latency=9) as device:
        bench = Bench(device=device, device_name="golden", memory="ideal", latency=9,
                      weight_format="mxint8", activation_bits=16)
        result = bench_experts(bench, small, tokens=3)
    assert result.matches_golden and result.cycles == result.cycle_model_cycles
    assert result.rel_err_float < 0.02  # 8-bit weights


@pytest.mark.parametrize(("name", "message"), [
    ("inkling-2-small", "one of the activations silu, .*, not 'Inkling-2-Small'"),
    ("openmoe-8b", "two or three matrices"), ("swin-moe-s-32e", "one size for all of its layers")])
def test_experts_that_the_device_has_not(name, message):
    with open_device("golden", config=TINY, memory_bytes=1 << 22) as device:
        bench = Bench(device=device, device_name="golden", memory="", latency=9,
                      weight_format="mxint8", activation_bits=16)
        with pytest.raises(BenchmarkError, match=message):
            bench_experts(bench, find_model(name), tokens=1)


def test_the_demo_counts_channels():
    """The same passes in about as many cycles: more channels, a smaller share of them."""
    config = PRESETS["small"].replace(name="four", channels=4)
    result = run(["27+85="], device="golden", config=config)
    assert result.logits_equal
    peak = config.channels * config.port_bytes * result.cycles
    assert 0 < result.memory_share < result.bytes_read / peak


@pytest.mark.parametrize("kind", ["zipf", "zipf:", "zipf:-1", "zipf:nan", "zipf:101", ""])
def test_routings_are_named(kind):
    with pytest.raises(BenchmarkError, match="routing must be uniform or zipf:S"):
        routing(3, 8, 2, kind=kind, seed=0)


def test_ids_of_a_token_are_distinct():
    ids = routing(50, 8, 8, kind="zipf:2", seed=0)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert np.array_equal(ids, routing(50, 8, 8, kind="zipf:2", seed=0))


@pytest.mark.parametrize(("name", "shared"), [
    ("olmoe-1b-7b", 0), ("gpt-oss-20b", 0), ("deepseek-v3", 1), ("qwen1.5-moe-a2.7b", 1)])
def test_a_layer_with_its_router(name, shared):
    """Groups, biases, shared experts and gates, too: one command, whose cycles the model knows."""
    model = find_model(name)
    small = replace(model, d_model=96, n_experts=16, top_k=2, expert=replace(
        model.expert, d_expert=160), shared=replace(model.shared, width=32))
    config = routed_config(
        small, TINY.replace(name="routes", router=("softmax", "sigmoid", "identity"),
                            max_experts=32), tokens=3)
    assert config.router_modes == (("gates",) if name.startswith("qwen") else ())
    with open_device("golden", config=config, memory_bytes=1 << 22, timing=True,
                     latency=9) as device:
        bench = Bench(device=device, device_name="golden", memory="ideal", latency=9,
                      weight_format="mxint8", activation_bits=16)
        result = bench_moe(bench, small, tokens=3)
    assert result.matches_golden and result.cycles == result.cycle_model_cycles
    assert result.counters["commands"] == 1
    assert (result.shared_experts, result.task_cycles) == (shared, [])
    routed = result.experts_used - shared
    assert 2 <= routed <= 6
    assert result.assignments == 3 * (2 + shared)
    row = 1 + 1 / 32  # bytes of a weight with its scale, and 2 of each row, 4 with a bias
    outputs = 16 + (config.router_modes == ("gates",))
    wide, of_row = routed * 160 + 32 * shared, 4 if model.expert.bias else 2
    assert result.stored_bytes == row * (2 * outputs * 96 + 3 * wide * 96) + 2 * (
        2 * outputs) + of_row * (2 * wide + 96 * (routed + shared))
    assert result.rel_err_float < 0.02


def test_what_is_not_used_is_not_in_memory():
    """Eight experts of 3 MiB each in memory that has room for two."""
    model = find_model("deepseek-v3")
    small = replace(model, d_model=1024, n_experts=8, top_k=1, shared=None, expert=replace(
        model.expert, d_expert=1024), router=replace(model.router, groups=1, keep_groups=1))
    with open_device("golden", config="small", memory_bytes=8 << 20, timing=True) as device:
        bench = Bench(device=device, device_name="golden", memory="ideal", latency=100,
                      weight_format="mxint8", activation_bits=16)
        result = bench_moe(bench, small, tokens=1)
    assert result.matches_golden and result.experts_used == 1
    assert 7 << 19 > result.stored_bytes > 3 << 20


def test_tasks_with_routers_of_their_own():
    """Routers differ, so do what they choose, and each call names one."""
    model = find_model("olmoe-1b-7b")
    small = replace(model, d_model=96, n_experts=16, top_k=2, expert=replace(
        model.expert, d_expert=64))
    config = TINY.replace(name="routes", router=("softmax",))
    with open_device("golden", config=config, memory_bytes=1 << 22, timing=True,
                     latency=9) as device:
        bench = Bench(device=device, device_name="golden", memory="ideal", latency=9,
                      weight_format="mxint8", activation_bits=16)
        result = bench_moe(bench, small, tokens=3, tasks=3)
    assert result.matches_golden and len(result.task_cycles) == 3
    assert all(behind == switched for behind, switched in result.task_cycles)
    assert result.task_cycles[0][0] == result.cycles


def test_shared_experts_of_unknown_size():
    model = find_model("olmoe-1b-7b")
    unknown = replace(model, shared=replace(model.shared, count=1, width=None))
    with pytest.raises(BenchmarkError, match="shared experts of a known size, but that of olmoe"):
        check_routed(unknown, PRESETS["wide512"], weight_format_name="int4_g32", tokens=1)
