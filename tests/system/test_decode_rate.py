"""One token an expert: memory is the limit, and it is busy."""

import numpy as np
import pytest

from moeaccel.formats import FORMATS
from moeaccel.sim import MemoryModel
from tests.support.pair import MEMORY_BYTES, draw_experts

D_MODEL, D_EXPERT, EXPERTS = 512, 256, 8


@pytest.fixture(scope="module")
def weights():
    return draw_experts(np.random.default_rng(0), EXPERTS, D_MODEL, D_EXPERT)


@pytest.fixture(scope="module", params=[40, 200])
def pair(request, pair_of):
    memory = MemoryModel.ideal(request.param, size=MEMORY_BYTES)
    with pair_of("small", memory=memory) as opened:
        yield opened


def decode(pair, weights, tokens=1, **options):
    """Run a decode step of every expert and return (cycles, counters, layer)."""
    rng = np.random.default_rng(1)
    call = (rng.standard_normal((tokens, D_MODEL), np.float32),
            np.tile(rng.permutation(EXPERTS), (tokens, 1)),
            rng.random((tokens, EXPERTS), np.float32))
    layers = {device: device.load_experts(*weights, **options) for device in pair.devices}
    pair.reset()
    pair.same(lambda device: layers[device](*call))
    counters = pair.check()
    for layer in layers.values():
        layer.close()
    return layers[pair.rtl].last.cycles, counters, layers[pair.rtl]


@pytest.mark.parametrize("name", FORMATS)
def test_two_planes_are_free(pair, weights, name):
    """a16 takes two lanes of one token; a decode leaves lanes idle anyway."""
    cycles = {bits: decode(pair, weights, weight_format=name, activation_bits=bits)[0]
              for bits in (8, 16)}
    assert cycles[16] <= cycles[8]


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_read_once(pair, weights, name):
    tokens = pair.config.max_slots // 2
    for count in (1, tokens):  # a pass of one token reads as much as a full one
        _, counters, layer = decode(pair, weights, count, weight_format=name)
        payload = layer.shape.image_bytes - layer.shape.header_bytes
        assert counters["expert_passes"] == EXPERTS
        assert counters["bytes_read_weights"] == EXPERTS * payload
        small = counters["bytes_read_other"] + counters["bytes_written"]
        if count == 1:
            assert small < 0.02 * counters["bytes_read_weights"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_decode_waits_for_weights_only(pair, weights, name):
    cycles, counters, _ = decode(pair, weights, weight_format=name)
    share = counters["bytes_read_weights"] / (cycles * pair.config.port_bytes)
    assert counters["stalled_output"] == 0
    # From gate_up to the first h; and the first x, which comes behind the first bursts of weights.
    assert counters["starved_activations"] < 170 * EXPERTS + 120
    latency = pair.simulation.memory_models[0].read_latency
    # 0.879997 at 200 cycles of latency: x is there a cycle later than it was.
    assert share > (0.96 if latency == 40 else 0.8795)
