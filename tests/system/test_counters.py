"""The counters of the RTL: where the cycles went, and what was moved."""

import numpy as np
import pytest

from moeaccel.formats import FORMATS
from moeaccel.interface.registers import REGISTERS
from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import MEMORY_BYTES, TIME, draw_experts, read_register


def times(pair):
    """Return (cycles counted by the five, clock cycles) of a device that rests, idle read last."""
    values = [read_register(pair.rtl, f"{name.upper()}_LO") for name in TIME]
    return dict(zip(TIME, values, strict=True)), pair.simulation.cycle


def call_of(rng, tokens, top_k, experts, d_model):
    return (rng.standard_normal((tokens, d_model), np.float32),
            rng.integers(-1, experts, (tokens, top_k)), rng.random((tokens, top_k), np.float32))


MEMORIES = {
    "ideal": MemoryModel.ideal(size=MEMORY_BYTES),
    "slow": MemoryModel(size=MEMORY_BYTES, read_latency=300, write_latency=300, max_reads=2),
    "writes stall": MemoryModel(size=MEMORY_BYTES, max_writes=1, write_latency=200,
                                stalls=StallModel(aw=0.5, w=0.5, b=0.5, length=20)),
    "random": MemoryModel.random(8, size=MEMORY_BYTES),
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("config", ["tiny", "small"])
def test_every_cycle_is_counted_once(pair_of, config, memory):
    assert TIME[-1] == "idle"
    rng = np.random.default_rng(0)
    weights = draw_experts(rng, 4, 96, 64)
    with pair_of(config, memory=MEMORIES[memory]) as pair:
        layers = {device: device.load_experts(*weights) for device in pair.devices}
        pair.reset()
        start, begin = times(pair)
        # Nothing has run: all are idle, since about the end of the reset.
        assert not any(start[name] for name in TIME[:-1])
        assert 0 < start["idle"] < 2000
        for tokens, top_k in [(1, 1), (1, 4), (9, 2), (40, 3), (2, 16)]:
            call = call_of(rng, tokens, top_k, 4, 96)
            pair.same(lambda device, call=call: layers[device](*call))
            pair.check()
            counted, now = times(pair)
            assert sum(counted.values()) - start["idle"] == now - begin
            assert counted["busy"] > 0
        for _ in range(2):  # a rest is idle
            pair.simulation.run(777, until_irq=False)
            rested, now = times(pair)
            assert rested == counted | {"idle": rested["idle"]}
            assert sum(rested.values()) - start["idle"] == now - begin


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("config", ["tiny", "small"])
def test_busy_is_the_steps_of_the_array(pair_of, config, name, bits):
    """Tiles of rows x groups of tokens x blocks of K, for each pass: nothing twice."""
    rng = np.random.default_rng(0)
    d_model, d_expert = 96, 64
    weights = draw_experts(rng, 4, d_model, d_expert)
    x, ids, scores = call_of(rng, 13, 3, 4, d_model)
    with pair_of(config) as pair:
        layer = pair.rtl.load_experts(*weights, weight_format=name, activation_bits=bits)
        layer(x, ids, scores)
        limits = pair.config
        rows = FORMATS[name].rows(limits.row_multipliers)
        lanes, slots = (size * 8 // bits for size in (limits.token_lanes, limits.max_slots))
        steps = passes = 0
        for e in range(4):
            count = int((ids == e).sum())
            for first in range(0, count, slots):
                groups = -(-min(slots, count - first) // lanes)
                steps += groups * (-(-2 * d_expert // rows) * (d_model // 32)
                                   + -(-d_model // rows) * (d_expert // 32))
                passes += 1
        counters = pair.rtl.counters()
        assert counters["busy"] == steps
        assert counters["expert_passes"] == passes
        payload = layer.shape.image_bytes - layer.shape.header_bytes
        assert counters["bytes_read_weights"] == passes * payload
        assert counters["assignments"] == (ids >= 0).sum()


@pytest.mark.parametrize("config", ["tiny", "small"])
def test_underflows_are_those_of_the_golden_model(pair_of, config):
    """In the register, and call by call; a call has several commands; zeros do not count."""
    rng = np.random.default_rng(0)
    weights = draw_experts(rng, 4, 64, 64)
    with pair_of(config, memory=MEMORIES["random"]) as pair:
        layers = {device: device.load_experts(*weights) for device in pair.devices}
        linear = {device: device.load_linear(weights[1][0], grid_exponent=2)
                  for device in pair.devices}
        tokens = pair.config.max_tokens + 1
        x, ids, scores = call_of(rng, tokens, 2, 4, 64)
        total, found = 0, {}
        for name, (layer, call) in {
            "all there": (layers, (x, ids, scores)),
            "small": (layers, (x, ids, scores * np.float32(1e-8))),
            "tiny": (layers, (x, ids, scores * np.float32(1e-30))),
            "subnormal": (layers, (x, ids, np.full_like(scores, 1e-45))),
            "zero": (layers, (x, ids, 0 * scores)),
            "no x": (layers, (0 * x, ids, scores)),
            "linear": (linear, (x,)),
        }.items():
            pair.same(lambda device, layer=layer, call=call: layer[device](*call))
            found[name], expected = (layer[device].last.underflows for device in pair.devices)
            assert found[name] == expected
            total += expected
            assert pair.check()["underflows"] == total
        outputs = 64 * int((ids >= 0).sum())
        assert found["all there"] == found["zero"] == found["no x"] == 0
        assert found["tiny"] == found["subnormal"] == outputs
        assert 0 < found["small"] < outputs and 0 < found["linear"] < 64 * tokens


def test_large_counts_carry(pair_of):
    """The high halves are there; none of them moves by itself."""
    with pair_of("tiny") as pair:
        assert all(read_register(pair.rtl, name) == 0 for name in REGISTERS
                   if name.endswith("_HI") and name.removesuffix("_HI").lower() in TIME)
