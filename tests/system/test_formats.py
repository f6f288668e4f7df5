"""Formats, and second up rows, that presets have not: the golden model's bits, predicted cycles,
damaged images."""

from __future__ import annotations

import numpy as np
import pytest

from moeaccel import golden
from moeaccel.config import PRESETS
from moeaccel.formats import ALL_FORMATS
from moeaccel.image import Expert
from moeaccel.sim import MemoryModel
from tests.support.formats import EVERY
from tests.support.pair import MEMORY_BYTES, assert_same_bits, draw_experts
from tests.system.test_cycles import compare, compare_small

D_MODEL, D_EXPERT = 96, 160
NAMES = list(ALL_FORMATS)


@pytest.fixture(scope="module")
def every(pair_of):
    memory = MemoryModel.random(3, size=MEMORY_BYTES)
    with pair_of(EVERY, memory=memory) as pair:
        yield pair


@pytest.mark.timeout(900)  # the first run builds the model
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_every_format(every, name, bits):
    """Experts in passes of all sizes, and a matrix whose last tile is short."""
    rng = np.random.default_rng(NAMES.index(name))
    weights = draw_experts(rng, 3, D_MODEL, D_EXPERT, spread=4)
    x = rng.standard_normal((11, D_MODEL), np.float32)
    ids = rng.integers(-1, 3, (11, 2))
    scores = rng.standard_normal(ids.shape).astype(np.float32)
    every.reset()
    options = {"weight_format": name, "activation_bits": bits,
               "prune": "magnitude" if "+" in name else None}
    biases = {"gate_up_bias": rng.standard_normal((3, 2 * D_EXPERT), np.float32),
              "down_bias": rng.standard_normal((3, D_MODEL), np.float32)} if bits == 8 else {}

    def experts(device):
        with device.load_experts(*weights, grid_exponent=-28, **options, **biases) as loaded:
            return loaded(x, ids, scores)

    def linear(device):
        with device.load_linear(weights[1][0], **options) as loaded:
            return loaded(np.resize(x, (5, D_EXPERT)))

    found = every.same(experts)
    layer = [Expert.quantise(gate_up, down, name, prune="magnitude",
                             **{kind: bias[e] for kind, bias in biases.items()})
             for e, (gate_up, down) in enumerate(zip(*weights, strict=True))]
    assert_same_bits(found, golden.experts(x, ids, scores, layer, planes=bits // 8).y)
    every.same(linear)
    every.check()


def hold_mixed(pair, seed):
    """Hold a layer to the golden model whose experts have all formats in turn, down other ones;
    some have second up rows."""
    config = pair.config
    rng = np.random.default_rng(seed)
    layer = []
    for e, (name, down) in enumerate(zip(rng.permutation(NAMES), rng.permutation(NAMES),
                                         strict=True)):
        if e == config.max_experts:
            break
        width = 32 * int(rng.integers(1, 4))
        gate_up, matrix = draw_experts(rng, 1, D_MODEL, width, spread=4)
        if config.second_up and (e + seed) % 3 == 0:
            gate_up = np.concatenate([gate_up, gate_up[:, :width] + 1], axis=1)
        layer.append(Expert.quantise(
            gate_up[0], matrix[0], str(name), down_format=str(down), prune="magnitude",
            limit=4.0 if e % 2 else None))
    x = rng.standard_normal((5, D_MODEL), np.float32)
    ids = np.stack([rng.permutation(len(layer))[:8] for _ in x])
    scores = rng.standard_normal(ids.shape).astype(np.float32)
    pair.reset()

    def script(device):
        with device.load_quantised(layer, grid_exponent=-24) as loaded:
            return loaded(x, ids, scores)

    assert_same_bits(pair.same(script), golden.experts(x, ids, scores, layer,
                                                       grid_exponent=-24).y)
    pair.check()


@pytest.mark.parametrize("seed", range(3))
def test_mixed_layers(every, seed):
    hold_mixed(every, seed)


@pytest.mark.slow  # models of their own
@pytest.mark.timeout(10_800)
@pytest.mark.parametrize("config", [
    PRESETS["wide512-sparse"],
    EVERY.replace(name="every on eight channels", channels=8, quantiser_lanes=1)],
    ids=lambda config: config.name)
def test_mixed_layers_of_other_configurations(pair_of, config):
    """Memory is random, and answers when it likes on each channel."""
    for seed in range(2):
        memory = MemoryModel.random(seed, size=MEMORY_BYTES)
        with pair_of(config, memory=memory) as pair:
            hold_mixed(pair, seed)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("latency", [1, 40])
def test_the_model_predicts_the_rtl(pair_of, latency):
    compare(pair_of, EVERY, latency, count=14, seed=latency, most_cycles=30_000)
    compare_small(pair_of, EVERY, latency, count=50, seed=latency)


@pytest.mark.parametrize("name", ["mxint8", "int4_g32_zp", "int8_g32", "int8_g32+2:4",
                                  "mxfp4+1:4", "int4_g64+2:4", "int2_g32", "ternary_g256",
                                  "int4_g32_min"])
def test_damaged_images_are_read_as_golden_reads_them(every, name):
    """Scales and minima beyond their range, zero points, and patterns that name one place twice."""
    rng = np.random.default_rng(7)
    weights = draw_experts(rng, 2, D_MODEL, D_EXPERT)
    x = rng.standard_normal((3, D_MODEL), np.float32)
    ids = np.tile(np.arange(2), (3, 1))
    scores = np.ones(ids.shape, np.float32)
    noise = rng.integers(0, 256, 1 << 18).astype(np.uint8)
    every.reset()

    def script(device):
        with device.load_experts(*weights, weight_format=name,
                                 prune="magnitude" if "+" in name else None,
                                 grid_exponent=-10) as loaded:
            shape = loaded.shape
            for e in range(2):
                at = loaded._images.address + e * shape.memory_bytes + shape.header_bytes
                for section in shape.sections:
                    size = section.words * section.word_bytes
                    words = device.transport.memory_read(at, size).reshape(section.words, -1)
                    kinds = section.kinds()
                    damaged = words.copy()
                    damaged[kinds != 0] = np.resize(noise, damaged[kinds != 0].shape)
                    device.transport.memory_write(at, damaged.reshape(-1))
                    at += size
            return loaded(x, ids, scores)

    every.same(script)
    every.check()
