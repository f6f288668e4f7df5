"""What commands compute, count and refuse on the golden device."""

import numpy as np
import pytest

from moeaccel import golden
from moeaccel.formats import quantise
from moeaccel.host.errors import InvalidOption
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.host.transports.golden.expert_table import sections_of
from moeaccel.image import Expert
from moeaccel.interface.commands import EXPERT, NonFinite, Status, decode, encode
from moeaccel.plan import plan
from tests.support.golden_bench import TINY, GoldenBench

TIME = ("busy", "starved_weights", "starved_activations", "stalled_output", "idle")


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def mixed_layer(rng, d=64):
    """Experts that differ in all that they may: both formats, width, activation; and matrices."""
    return [
        Expert.quantise(draw(rng, 64, d), draw(rng, d, 32), "int4_g32"),
        Expert.quantise(draw(rng, 256, d), draw(rng, d, 128), "mxint8", down_format="mxfp4",
                        activation="relu"),
        quantise(draw(rng, d, d), "int4_g128"),
        Expert.quantise(draw(rng, 192, d), draw(rng, d, 96), "mxfp4", down_format="int4_g64"),
        quantise(draw(rng, d, d), "mxint8")]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("planes", [1, 2])
def test_a_mixed_layer(planes, channels):
    rng = np.random.default_rng(planes)
    config = TINY.replace(name="channels", channels=channels)
    bench = GoldenBench(config)
    layer = bench.layer(mixed_layer(rng), planes=planes)
    ids = rng.integers(-1, 6, (9, 3))
    x, weights = draw(rng, 9, 64), rng.random((9, 3)).astype(np.float32)
    completion, counted, y = bench.run(layer, x, ids, weights)
    assert completion["status"] == Status.OK
    expected = golden.experts(x, ids, weights, layer.experts, planes=planes)
    assert np.array_equal(y, expected.y) and np.abs(y).max() > 1
    planned = plan(ids, 5, config.max_slots // planes)
    words = [entry["words0"] + entry.get("words1", 0) for entry in layer.entries]
    assert counted["bytes_read_weights"] == channels * config.word_bytes * sum(
        words[now.expert] for now in planned.passes)
    assert counted["expert_passes"] == len(planned.passes)
    assert counted["assignments"] == ((ids >= 0) & (ids < 5)).sum()
    assert counted["bytes_read_other"] == (
        64 * (2 + len(planned.experts)) + 2 * -(-4 * 27 // 8) * 8 + 256 * len(planned.loads)
        + 512 * sum(not row.first for row in planned.rows))
    assert [counted[name] for name in TIME] == [0] * 5 and completion["cycles"] == 0


@pytest.mark.parametrize("index", range(5))
def test_a_gemm_is_expert_0_of_any_kind(index):
    rng = np.random.default_rng(index)
    bench = GoldenBench()
    layer = bench.layer([mixed_layer(rng)[index]])
    x = draw(rng, 5, 64)
    every = np.zeros((5, 1), int), np.ones((5, 1), np.float32)
    completion, counted, y = bench.run(layer, x)
    _, routed, same = bench.run(layer, x, *every)
    assert completion["status"] == Status.OK
    assert np.array_equal(y, same) and np.array_equal(y, golden.experts(x, *every, layer.experts).y)
    # ids and weights, 20 bytes in beats of 8 each
    assert routed["bytes_read_other"] - counted["bytes_read_other"] == 48
    assert counted["bytes_read_weights"] == routed["bytes_read_weights"] > 0


def test_a_gemm_has_one_expert_a_token():
    bench = GoldenBench()
    layer = bench.layer([quantise(np.ones((32, 32), np.float32), "mxint8")])
    completion, _, _ = bench.run(layer, np.ones((2, 32), np.float32), top_k=2)
    assert (completion["status"], completion["detail"]) == (Status.BAD_FIELD, 2)


def test_images_that_change_are_decoded_again():
    rng = np.random.default_rng(9)
    bench = GoldenBench()
    one, other = (quantise(draw(rng, 64, 64), "mxfp4") for _ in range(2))
    layer = bench.layer([one, other])
    x = draw(rng, 2, 64)
    first = bench.run(layer, x)[2]
    payload = layer.entries[0]["words0"] * TINY.word_bytes
    weights = bench.device.memory_read(layer.entries[1]["image_address"], payload)
    bench.device.memory_write(layer.entries[0]["image_address"], weights)
    assert not np.array_equal(bench.run(layer, x)[2], first)
    assert np.array_equal(bench.run(layer, x)[2], golden.gemm(x, other).y)


@pytest.mark.parametrize("gemm", [True, False])
@pytest.mark.parametrize("latency", [1, 100])
def test_time_is_counted_when_asked(gemm, latency):
    from moeaccel.cycles import predict_command

    rng = np.random.default_rng(4)
    bench = GoldenBench(timing=True, latency=latency)
    experts = mixed_layer(rng)[:1 if gemm else None]
    layer = bench.layer(experts)
    x, ids = draw(rng, 6, 64), rng.integers(0, 5, (6, 2))
    call = () if gemm else (ids, np.ones(ids.shape, np.float32))
    completion, counted, _ = bench.run(layer, x, *call)
    whole = [decode(EXPERT, encode(EXPERT, entry)) for entry in layer.entries]
    sections = {e: sections_of(entry, 64, 64, TINY) for e, entry in enumerate(whole)}
    found = predict_command(
        TINY, sections, np.zeros((6, 1), int) if gemm else ids, len(experts), d_in=64, d_out=64,
        planes=2, latency=latency, gemm=gemm)
    assert completion["cycles"] == found.cycles == sum(counted[name] for name in TIME) > 0
    assert {name: counted[name] for name in TIME} == {name: getattr(found, name) for name in TIME}
    for name in ("bytes_read_weights", "bytes_read_other", "bytes_written"):
        assert counted[name] == getattr(found, name)


def test_timing_is_true_or_false():
    with pytest.raises(InvalidOption, match="timing must be True or False, not 'yes'"):
        GoldenTransport(TINY, memory_bytes=1 << 20, timing="yes")


# -- faults ----------------------------------------------------------------------------------------
STREAMS = ["ids", "weights", "table", "image", "x", "zeros", "partial", "y"]


@pytest.mark.parametrize("at", range(len(STREAMS)), ids=STREAMS)
def test_of_several_faults_the_first_stream_is_named(at):
    """All streams from ``at`` on are outside the window, and an entry is bad."""
    rng = np.random.default_rng(at)
    bench, top = GoldenBench(), 1 << 21
    bench.write(WINDOW_LIMIT_LO=top)
    outside = {name: top + 4096 * (i + 1) for i, name in enumerate(STREAMS)}
    layer = bench.layer([quantise(draw(rng, 32, 32), "mxint8") for _ in range(4)])
    layer.change(3, flags=1)
    if at <= STREAMS.index("image"):
        layer.change(0, image_address=outside["image"])
    if at <= STREAMS.index("table"):  # the second of its entries
        table = bench.device.memory_read(layer.table, 256)
        layer = bench.layer(layer.experts, table_address=top - 64)
        bench.device.memory_write(top - 64, table)
    changes = {f"{name}_address": outside[name] for name in ("ids", "weights", "x")
               if at <= STREAMS.index(name)}
    if at <= STREAMS.index("partial"):
        changes["workspace_address"] = outside["partial"]
    if at <= STREAMS.index("zeros"):
        changes["y_address"] = outside["zeros"]
    elif at <= STREAMS.index("y"):
        changes["y_address"] = top - 128  # the row of zeros is inside
    # Token 0 has no expert; token 1 has two, with the first of which token 2 leaves.
    ids = np.array([[-1, -1], [0, 1], [0, -1], [3, -1]])
    call = draw(rng, 4, 32), ids, np.ones(ids.shape, np.float32)
    completion, counted, _ = bench.run(layer, *call, **changes)
    expected = outside | {"table": top, "x": outside["x"] + 128,
                          "partial": outside["partial"] + 256, "y": top + 128}
    first = Status.WINDOW, expected[STREAMS[at]]
    assert (completion["status"], completion["address"]) == first
    assert first in bench.device.possible_faults
    assert counted["expert_passes"] == 0


def test_nonfinite_x_comes_before_weights():
    rng = np.random.default_rng(1)
    bench = GoldenBench()
    layer = bench.layer(mixed_layer(rng))
    x, ids = draw(rng, 3, 64), np.array([[0, 1], [2, 3], [4, 0]])
    weights = np.ones(ids.shape, np.float32)
    weights[0, 1], x[2, 3] = np.inf, np.nan
    completion, _, _ = bench.run(layer, x, ids, weights)
    assert (completion["status"], completion["detail"], completion["address"]) == (
        Status.NONFINITE, 2, NonFinite.X)
