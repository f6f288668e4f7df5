"""What two bits a weight save, and several channels, of published layers, by the cycle model (which
the RTL's tests hold)."""

import pytest

from moeaccel.config import PRESETS
from moeaccel.cycles import predict_experts
from moeaccel.formats import ALL_FORMATS, weight_format
from moeaccel.host.benchmark import routing
from moeaccel.image import ExpertShape
from moeaccel.zoo import model


def predict(config, name, what, *, tokens, planes):
    """Return the prediction of a layer and an expert's stored bytes."""
    shape = ExpertShape(weight_format(name), what.d_model, what.d_expert, config.row_multipliers,
                        channels=config.channels)
    ids = routing(tokens, what.n_experts, what.top_k, kind="uniform", seed=0)
    return predict_experts(config, [shape] * what.n_experts, ids, what.n_experts, planes=planes,
                           latency=100), shape.stored_bytes


@pytest.mark.parametrize("name", ["int2_g32", "ternary_g256"])
@pytest.mark.parametrize("config", ["hbm32", "wide512"])
def test_decode(config, name):
    """Of two cycles of memory a word, the array needs both: bytes and steps take as long. Where a
    word comes every cycle, what is parsed in a cycle each decides: steps, scales, rows."""
    config = PRESETS[config].replace(formats=tuple(ALL_FORMATS))
    what = model("qwen3-30b-a3b")
    two, stored = predict(config, name, what, tokens=1, planes=2)
    four, _ = predict(config, "int4_g32", what, tokens=1, planes=2)
    assert two.busy == four.busy
    shape = ExpertShape(weight_format(name), what.d_model, what.d_expert, config.row_multipliers,
                        channels=config.channels)
    parsed = what.top_k * sum(section.words + section.tiles * (
        section.steps - section.weight_words) for section in shape.sections)
    streamed = what.top_k * stored / config.channels / config.port_bytes
    most = max(parsed, streamed)
    assert most <= two.cycles < 1.02 * most + 4000  # what a layer takes to begin and to end
    assert two.cycles < (0.6 if config.beats_per_word > 1 else 1) * four.cycles


@pytest.mark.parametrize("name", ["int4_g32", "mxint8", "int4_g32+2:4", "int4_g32_min"])
def test_channels_share_a_decode(name):
    """Of a layer of DeepSeek-V3's size two take 1.95 times less time, eight 7.6 times."""
    what = model("deepseek-v3-r1")
    base = PRESETS["wide512-sparse"]
    found = [predict(base.replace(channels=channels), name, what, tokens=1, planes=2)[0].cycles
             for channels in (1, 2, 8)]
    assert found[0] > 1.95 * found[1] and found[0] > 7.6 * found[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "planes", "y_banks", "least"), [
    ("int4_g32", 2, 1, 7.6), ("mxint8+1:4", 2, 1, 7.6), ("int4_g32", 1, 2, 7.6),
    # Below the 7.6 that eight channels should reach: x and y go over channel 0 alone.
    ("mxint8+1:4", 1, 2, 7.35)])
def test_channels_share_a_prefill(name, planes, y_banks, least):
    """With 8-bit activations passes are so short that rows of y must leave beside them."""
    what = model("deepseek-v3-r1")
    base = PRESETS["wide512-sparse"].replace(y_banks=y_banks)
    found = [predict(base.replace(channels=channels), name, what, tokens=64,
                     planes=planes)[0].cycles for channels in (1, 2, 8)]
    assert found[0] > 1.95 * found[1] and found[0] > least * found[2]
