"""The RTL gives the golden model's bits, whatever it computes and however memory behaves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from moeaccel.arithmetic import to_bfloat16
from moeaccel.config import PRESETS, AcceleratorConfig
from moeaccel.formats import FORMATS
from moeaccel.image import Expert
from moeaccel.interface.commands import Status
from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import MEMORY_BYTES, Buffers, assert_same_bits, draw_experts, execute

# -- what is drawn ---------------------------------------------------------------------------------
ROUTINGS = {
    "free": lambda rng, shape, experts: rng.integers(0, experts, shape),
    "one expert": lambda rng, shape, experts: np.full(shape, rng.integers(experts)),
    "one expert but for one token": lambda rng, shape, experts: np.where(
        np.arange(shape[0])[:, None] == shape[0] // 2, experts - 1, np.zeros(shape, int)),
    "half of the experts": lambda rng, shape, experts: 2 * rng.integers(0, -(-experts // 2), shape),
    "repeated": lambda rng, shape, experts: np.repeat(
        rng.integers(0, experts, (shape[0], 1)), shape[1], axis=1),
    "same for all": lambda rng, shape, experts: np.tile(
        rng.permutation(experts)[np.arange(shape[1]) % experts], (shape[0], 1)),
    "invalid too": lambda rng, shape, experts: rng.integers(-2, experts + 2, shape),
    "few valid": lambda rng, shape, experts: np.where(
        rng.random(shape) < 0.1, rng.integers(0, experts, shape), -1),
    "none valid": lambda rng, shape, experts: np.full(shape, experts),
}


def _spread(rng, shape, low, high):
    """Return numbers of every size between two powers of two."""
    return np.ldexp(rng.uniform(0.5, 1, shape), rng.integers(low, high, shape)) * rng.choice(
        [-1, 1], shape)


X = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "zero": lambda rng, shape: np.copysign(0.0, rng.standard_normal(shape)),
    "sparse": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.02),
    "outliers": lambda rng, shape: rng.standard_normal(shape) * np.where(
        rng.random(shape) < 0.02, 1000, 1),
    "every size": lambda rng, shape: _spread(rng, shape, -20, 8),
    "any exponent": lambda rng, shape: _spread(rng, shape, -140, 128),
    "huge": lambda rng, shape: _spread(rng, shape, 120, 128),
    "subnormal": lambda rng, shape: _spread(rng, shape, -149, -120),
    # 32639.5 / 32768 is where a16 raises its exponent
    "raised": lambda rng, shape: rng.choice([1, -1], shape) * np.ldexp(
        rng.choice([0.5, 32639.49, 32639.5, 32639.51, 32767.9], shape) / 32768,
        rng.integers(-3, 3, (shape[0], 1))),
    "halves": lambda rng, shape: (rng.integers(-128, 128, shape) + 0.5) / 64,
    "token by token": lambda rng, shape: rng.standard_normal(shape) * np.exp2(
        rng.integers(-100, 60, (shape[0], 1))),
}

SCORES = {
    "positive": lambda rng, shape: rng.random(shape),
    "signed": lambda rng, shape: rng.standard_normal(shape),
    "zero": lambda rng, shape: np.zeros(shape),
    "every size": lambda rng, shape: _spread(rng, shape, -40, 10),
    "odd": lambda rng, shape: rng.choice(
        [0.0, -0.0, 1e-45, -1e-39, 1.0, -1.0, 1.99999988, 2**-126, 2**-30, -(2**-32)], shape),
    "not finite": lambda rng, shape: rng.choice([0.5, 1e-45, np.nan, np.inf, -np.inf], shape),
}


BIASES = (
    lambda rng, shape: rng.standard_normal(shape),
    lambda rng, shape: _spread(rng, shape, -40, 12),
    lambda rng, shape: rng.choice([0, -0.0, 1, -1, 2**-130, 2**60, -(2**-60)], shape),
)


@dataclass(frozen=True)
class Case:
    """One call of one layer."""

    seed: int
    experts: int
    d_model: int
    d_expert: int
    tokens: int
    top_k: int
    name: str = "int4_g32"
    bits: int = 16
    routing: str = "free"
    x: str = "normal"
    scores: str = "signed"
    spread: int = 0
    scale: int = 0
    grid_exponent: int = -28
    narrow: bool = False  # x and y in bfloat16
    biases: int = 0  # 1: of gate and up rows; 2: of down rows; 3: of both

    def run(self, pair):
        """Run the call on both devices."""
        rng = np.random.default_rng(self.seed)
        shape = self.tokens, self.top_k
        gate_up, down = draw_experts(rng, self.experts, self.d_model, self.d_expert,
                                     spread=self.spread)
        gate_up *= np.float32(2.0**self.scale)
        biases = {
            name: BIASES[self.seed % len(BIASES)](rng, weights.shape[:2])
            for bit, name, weights in ((1, "gate_up_bias", gate_up), (2, "down_bias", down))
            if self.biases & bit}
        with np.errstate(over="ignore"):
            x = X[self.x](rng, (self.tokens, self.d_model)).astype(np.float32)
        x[~np.isfinite(x)] = np.finfo(np.float32).max
        if self.narrow:  # cut off, not rounded: the largest number stays finite
            x = torch.from_numpy(to_bfloat16(x).view(np.int16)).view(torch.bfloat16)
        ids = ROUTINGS[self.routing](rng, shape, self.experts)
        scores = SCORES[self.scores](rng, shape).astype(np.float32)

        def script(device):
            with device.load_experts(
                    gate_up, down, weight_format=self.name, activation_bits=self.bits,
                    grid_exponent=self.grid_exponent, **biases) as loaded:
                return loaded(x, ids, scores)

        y = pair.same(script)
        pair.check()
        return y


@st.composite
def cases(draw, config: AcceleratorConfig, *, beats: int):
    """Draw a case that reads about so many beats of weights at most."""
    steps = st.sampled_from(sorted({1, 2, 3, 4, 5, 8, config.max_steps}))
    experts = draw(st.sampled_from([1, 2, 3, 4, 7, config.max_experts]))
    bits = draw(st.sampled_from([16, 8]))
    name = draw(st.sampled_from(list(FORMATS)))
    top_k = draw(st.integers(1, 16))
    lanes, slots = config.token_lanes, config.max_slots
    tokens = draw(st.sampled_from(sorted({
        1, 2, lanes - 1, lanes, lanes + 1, slots // 2, slots // 2 + 1, slots, slots + 1,
        2 * slots + 3, config.max_tokens, config.max_tokens + 1} - {0})))
    d_model, d_expert = 32 * draw(steps), 32 * draw(steps)
    # Large in one way at a time.
    def cost():
        pairs = tokens * top_k
        passes = min(experts, pairs) + pairs * bits // 8 // slots
        return passes * 3 * d_model * d_expert * FORMATS[name].bits_per_weight() / 8
    while cost() > beats * config.port_bytes:
        if d_model * d_expert > 64 * 64:
            d_model, d_expert = (max(32, d // 64 * 32) for d in (d_model, d_expert))
        elif experts > 4:
            experts = 4
        elif top_k > 2:
            top_k = 2
        elif tokens > slots + 1:
            tokens = slots + 1
        else:
            break
    return Case(
        draw(st.integers(0, 1 << 30)), experts, d_model, d_expert, tokens, top_k, name, bits,
        routing=draw(st.sampled_from(list(ROUTINGS))), x=draw(st.sampled_from(list(X))),
        scores=draw(st.sampled_from(list(SCORES))), spread=draw(st.sampled_from([0, 0, 4, 20])),
        scale=draw(st.sampled_from([0, 0, 4, -30, 60])),
        grid_exponent=draw(st.sampled_from([-28, -28, -40, -12, 8, 60, -100])),
        narrow=draw(st.booleans()), biases=draw(st.sampled_from([0, 0, 1, 2, 3])))


stalls = st.sampled_from([None, *(StallModel.uniform(p, length=n) for p in (0.1, 0.5)
                                  for n in (1, 9))])
seeds = st.integers(0, 1 << 30)


def random_memory(seed: int) -> MemoryModel:
    return MemoryModel.random(seed, size=MEMORY_BYTES)


def property_of(examples: int):
    """Return settings for a property whose every example is a simulation."""
    return settings(max_examples=examples, deadline=None, derandomize=True, print_blob=True,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


# -- properties ------------------------------------------------------------------------------------
@property_of(100)
@given(cases(PRESETS["tiny"], beats=8000), seeds, stalls)
def test_experts_on_tiny(pair_of, case, seed, pauses):
    with pair_of("tiny", memory=random_memory(seed), register_stalls=pauses) as pair:
        case.run(pair)


@property_of(30)
@given(cases(PRESETS["small"], beats=3000), seeds, stalls)
def test_experts_on_small(pair_of, case, seed, pauses):
    with pair_of("small", memory=random_memory(seed), register_stalls=pauses) as pair:
        case.run(pair)


@pytest.mark.parametrize(("config", "examples"), [("tiny", 25), ("small", 8)])
def test_linear(pair_of, config, examples):
    limits = PRESETS[config]
    steps = st.sampled_from(sorted({1, 2, 3, 4, 5, limits.max_steps}))
    tokens = st.sampled_from([1, 2, 3, 7, limits.max_slots + 1, limits.max_tokens + 1])

    @property_of(examples)
    @given(steps, steps, tokens, st.sampled_from(list(FORMATS)), st.sampled_from([8, 16]),
           st.sampled_from(list(X)), seeds, seeds, stalls, st.booleans())
    def holds(d_in, d_out, tokens, name, bits, kind, draw, seed, pauses, biased):
        rng = np.random.default_rng(draw)
        weight = draw_experts(rng, 1, 32 * d_in, 32 * d_out, spread=4)[0][0, :32 * d_out]
        with np.errstate(over="ignore"):
            x = np.nan_to_num(X[kind](rng, (tokens, 32 * d_in)).astype(np.float32))
        bias = rng.standard_normal(32 * d_out) if biased else None

        def script(device):
            with device.load_linear(weight, weight_format=name, activation_bits=bits,
                                    bias=bias) as loaded:
                return loaded(x)

        with pair_of(config, memory=random_memory(seed), register_stalls=pauses) as pair:
            pair.same(script)
            pair.check()

    holds()


# -- corners by name -------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("config", ["tiny", "small"])
def test_formats(pair_of, config, name, bits):
    """A short last group, scales of every size, one lane too few for the tokens."""
    case = Case(7, 5, 160, 96, PRESETS[config].token_lanes + 1, 3, name, bits, spread=20)
    with pair_of(config, memory=random_memory(len(name) + bits)) as pair:
        y = case.run(pair)
        assert y.any(axis=1).all()


TINY = Case(11, 3, 64, 64, 1, 1)
CORNERS = {
    "one token": TINY,
    "one token, sixteen experts": replace(TINY, experts=16, top_k=16, routing="same for all"),
    "one token, sixteen times the same expert": replace(TINY, top_k=16, routing="repeated"),
    "as many tokens as lanes": replace(TINY, tokens=2, routing="one expert"),
    "as many tokens as lanes, one plane": replace(TINY, tokens=2, bits=8, routing="one expert"),
    "one token more than lanes": replace(TINY, tokens=3, bits=8, routing="one expert"),
    "as many tokens as slots": replace(TINY, tokens=4, bits=8, routing="one expert"),
    "one token more than slots": replace(TINY, tokens=5, bits=8, routing="one expert"),
    "many more tokens than slots": replace(TINY, tokens=64, routing="one expert"),
    "the same tokens twice in a pass": replace(TINY, tokens=9, top_k=2, routing="repeated"),
    "the same token through many passes": replace(TINY, tokens=3, top_k=16, routing="repeated"),
    "the same tokens in consecutive passes": replace(
        TINY, tokens=2, top_k=3, bits=8, routing="same for all"),
    "every token at every expert, in parts": replace(
        TINY, tokens=11, top_k=3, routing="same for all"),
    "experts without tokens": replace(TINY, experts=16, tokens=3, top_k=2,
                                      routing="half of the experts"),
    "no expert for any token": replace(TINY, tokens=20, top_k=5, routing="none valid"),
    "no expert for most tokens": replace(TINY, tokens=40, top_k=2, routing="few valid"),
    "most assignments": replace(TINY, tokens=16, top_k=16, experts=16),
    "most tokens": replace(TINY, tokens=64, top_k=4, experts=2),
    "several commands": replace(TINY, tokens=70, top_k=5, experts=2, d_model=32, d_expert=32),
    "narrow": replace(TINY, d_model=32, d_expert=32, tokens=5, top_k=2),
    "h wider than x": replace(TINY, d_model=32, d_expert=256, tokens=5, top_k=2),
    "x wider than h": replace(TINY, d_model=256, d_expert=32, tokens=5, top_k=2),
    "largest": replace(TINY, d_model=256, d_expert=256, tokens=5, top_k=2, name="mxint8"),
    "zeros": replace(TINY, tokens=5, top_k=2, x="zero"),
    "weights of zero": replace(TINY, tokens=5, top_k=2, scores="zero"),
    "weights that are no numbers": replace(TINY, tokens=32, top_k=8, scores="not finite"),
    "weights that are no numbers, few valid": replace(
        TINY, tokens=64, top_k=4, scores="not finite", routing="few valid"),
    "weights of every kind": replace(TINY, tokens=32, top_k=8, scores="odd"),
    "outliers": replace(TINY, tokens=9, top_k=2, x="outliers", bits=8, grid_exponent=-8),
    "every exponent, which overflows": replace(TINY, tokens=9, top_k=2, x="any exponent",
                                               grid_exponent=60, scores="every size"),
    "large sums on a coarse grid": replace(TINY, tokens=9, top_k=2, scale=20, grid_exponent=20),
    "raised exponents": replace(TINY, tokens=9, top_k=2, x="raised"),
    "bfloat16, rows of one block": replace(
        TINY, d_model=32, d_expert=32, tokens=5, top_k=2, narrow=True),
    "bfloat16, sums by way of memory": replace(
        TINY, tokens=9, top_k=2, d_model=96, narrow=True),
    "bfloat16, raised exponents": replace(TINY, tokens=9, top_k=2, x="raised", narrow=True),
    "ties of rounding": replace(TINY, tokens=9, top_k=2, x="halves", bits=8),
    "overflows of the grid": replace(TINY, tokens=9, top_k=2, grid_exponent=-45),
    "everything overflows": replace(TINY, tokens=9, top_k=2, grid_exponent=-100),
    "everything rounds to zero": replace(TINY, tokens=9, top_k=2, grid_exponent=60),
    "large weights, which overflow": replace(TINY, tokens=5, top_k=2, scale=100, x="huge",
                                             grid_exponent=60),
    "small weights": replace(TINY, tokens=5, top_k=2, scale=-100, x="subnormal"),
    "biases": replace(TINY, seed=12, tokens=9, top_k=3, biases=3),
    "biases of every size, 8-bit weights": replace(
        TINY, seed=13, tokens=9, top_k=2, name="mxint8", biases=3, grid_exponent=-16),
    "biases that overflow": replace(TINY, tokens=9, top_k=2, biases=3),
    "biases of x that is zero": replace(TINY, seed=12, tokens=5, top_k=2, x="zero", biases=1),
    "biases of down alone, which others follow": replace(
        TINY, seed=12, tokens=5, top_k=3, d_model=96, d_expert=32, bits=8, biases=2),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corners(pair_of, corner):
    with pair_of("tiny", memory=random_memory(CORNERS[corner].tokens + len(corner)),
                 register_stalls=StallModel.uniform(0.3)) as pair:
        result = CORNERS[corner].run(pair)
    overflows = isinstance(result, tuple) and result[1] == Status.OVERFLOW
    assert overflows == ("overflow" in corner)


@pytest.mark.parametrize("config", ["tiny", "small"])
def test_ids_of_any_32_bits(pair_of, config):
    """Everything outside [0, E) is skipped, also what looks like an id in its low bits."""
    rng = np.random.default_rng(0)
    gate_up, down = draw_experts(rng, 5, 64, 32)
    odd = np.array([-1, -5, -(1 << 31), (1 << 31) - 1, 5, 7, 8, 16, 64, 128, 256, 1 << 16,
                    (1 << 16) + 1, 1 << 24, 4, 0])
    ids = np.stack([odd, np.roll(odd, 3), np.full(16, -1), np.roll(odd, 5)])
    x = rng.standard_normal((4, 64), np.float32)
    scores = rng.standard_normal((4, 16)).astype(np.float32)

    def script(device):
        loaded = device.load_experts(gate_up, down)
        buffers = Buffers(device, x, ids, scores, d_out=64)
        raw = np.full(buffers.memory.size, 0xFF, np.uint8)
        at = buffers.addresses["y"] - buffers.memory.address
        device.transport.memory_write(buffers.addresses["y"], raw[at:])
        command = execute(device, buffers.fields(loaded._descriptor.address))
        assert command.error() is None
        y = buffers.y()
        assert not y[2].any()
        assert_same_bits(y, loaded(x, ids, scores))
        return y

    with pair_of(config, memory=random_memory(5)) as pair:
        pair.same(script)
        assert pair.check()["assignments"] == 2 * 6


def test_commands_follow_one_another(pair_of):
    """Experts and matrices of all formats, many in flight: no command shows in another."""
    rng = np.random.default_rng(3)
    layers = []
    for i, name in enumerate([*FORMATS, *FORMATS]):
        shape = [(64, 32), (32, 64), (96, 96), (128, 32)][i % 4]
        layers.append((name, 8 + 8 * (i % 2), draw_experts(rng, 3, *shape)))
    calls = []
    for i in rng.integers(0, len(layers), 24):
        d_model = layers[i][2][1].shape[1]
        tokens, top_k = int(rng.integers(1, 8)), int(rng.integers(1, 4))
        calls.append((int(i), rng.standard_normal((tokens, d_model), np.float32),
                      rng.integers(-1, 3, (tokens, top_k)),
                      rng.standard_normal((tokens, top_k)).astype(np.float32)))

    def script(device):
        experts = [device.load_experts(*weights, weight_format=name, activation_bits=bits)
                   for name, bits, weights in layers]
        linear = [device.load_linear(weights[0][0], weight_format=name, activation_bits=bits)
                  for name, bits, weights in layers]
        handles = []
        for i, x, ids, scores in calls:
            handles.append((experts[i], experts[i].submit(x, ids, scores)))
            handles.append((linear[i], linear[i].submit(x)))
        return np.concatenate([layer.sync(handle).ravel() for layer, handle in handles])[None]

    for seed in range(2):
        with pair_of("tiny", memory=random_memory(seed),
                     register_stalls=StallModel.uniform(0.2, length=5)) as pair:
            pair.same(script)
            pair.check()


def test_a_command_without_valid_ids_reads_its_weights_too(pair_of):
    """What is still on its way when a command completes would arrive in the next one."""
    rng = np.random.default_rng(0)
    weights = draw_experts(rng, 2, 32, 32)
    x = rng.standard_normal((2, 32), np.float32)
    scores = rng.standard_normal((2, 1)).astype(np.float32)
    for seed in range(4):
        memory = replace(random_memory(seed), read_latency=200,
                         stalls=StallModel(ar=0.4, r=0.2, length=30))
        with pair_of("tiny", memory=memory) as pair:
            layers = {device: device.load_experts(*weights) for device in pair.devices}
            for ids in ([[-1], [-1]], [[1], [0]], [[5], [-1]], [[0], [-1]]):
                pair.same(lambda device, ids=ids, layers=layers: layers[device](
                    x, np.array(ids), scores))
                pair.check()


# -- other configurations, real sizes --------------------------------------------------------------
VARIANTS = {
    "16-byte port": {"port_bytes": 16},
    "16-byte port, four quantiser lanes": {"port_bytes": 16, "quantiser_lanes": 4},
    "four token lanes": {"token_lanes": 4},
    "four row multipliers": {"row_multipliers": 4, "tile_words": 32},
    "eight lanes, one group": {"token_lanes": 8, "token_groups": 1},
    "one quantiser lane": {"quantiser_lanes": 1},
    "32-byte port, eight rows": {"port_bytes": 32, "row_multipliers": 8, "quantiser_lanes": 4},
    "two banks of y": {"y_banks": 2},
    "wide quantiser, two banks of y": {"port_bytes": 16, "quantiser_lanes": 8, "y_banks": 2},
    "two results a cycle": {"results_per_cycle": 2, "channels": 2, "quantiser_lanes": 4},
    "passes overlap": {"results_per_cycle": 2, "y_banks": 2, "hidden_banks": 2},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_tiny(pair_of, variant):
    config = PRESETS["tiny"].replace(name=variant, **VARIANTS[variant])

    @property_of(40)
    @given(cases(config, beats=6000), seeds, stalls)
    def holds(case, seed, pauses):
        with pair_of(config, memory=random_memory(seed), register_stalls=pauses) as pair:
            case.run(pair)

    holds()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", ["tiny", "small"])
def test_many_more_cases(pair_of, config):
    limits = PRESETS[config]

    @property_of(400)
    @given(cases(limits, beats=12000), seeds, stalls)
    def holds(case, seed, pauses):
        with pair_of(config, memory=random_memory(seed), register_stalls=pauses) as pair:
            case.run(pair)

    holds()


REAL = {  # d_model, d_expert, experts, distinct experts, tokens, top_k, format, bits
    "OLMoE-1B-7B, decode": (2048, 1024, 8, 8, 1, 8, "int4_g32", 16),
    "OLMoE-1B-7B, prefill": (2048, 1024, 4, 4, 24, 2, "mxfp4", 16),
    "gpt-oss, short last group": (2880, 2880, 4, 2, 3, 2, "int4_g128", 16),
    "Qwen1.5-MoE, 60 experts": (2048, 1408, 60, 3, 5, 4, "int4_g128", 8),
    "DeepSeek-V3": (7168, 2048, 1, 1, 2, 1, "int4_g32", 16),
    "DeepSeek-V3, 8 bits": (7168, 2048, 1, 1, 3, 1, "mxint8", 8),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("real", REAL)
def test_real_sizes(pair_of, real):
    d_model, d_expert, experts, distinct, tokens, top_k, name, bits = REAL[real]
    rng = np.random.default_rng(0)
    gate_up, down = draw_experts(rng, distinct, d_model, d_expert)
    some = [Expert.quantise(*matrices, name) for matrices in zip(gate_up, down, strict=True)]
    layer = [some[e * distinct // experts] for e in range(experts)]
    x = rng.standard_normal((tokens, d_model), np.float32)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    scores = rng.random((tokens, top_k), np.float32)

    def script(device):
        with device.load_quantised(layer, activation_bits=bits) as loaded:
            return loaded(x, ids, scores)

    with pair_of("wide512", memory=MemoryModel.dram(size=1 << 29)) as pair:
        pair.same(script)
        pair.check()
