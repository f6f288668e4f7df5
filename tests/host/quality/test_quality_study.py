"""The fast path beside the golden model; what variants are, cost and give."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from moeaccel.config import PRESETS
from moeaccel.errors import FormatError
from moeaccel.formats import ALL_FORMATS
from moeaccel.host.errors import InvalidOption, UnsupportedExperts
from moeaccel.host.quality import Study, Variant, every_variant, open_study
from moeaccel.host.quality.experts import (
    FastExperts,
    experts_modules,
    float_experts,
    use_layers,
)
from moeaccel.host.quality.measure import compare, predictions
from moeaccel.host.quality.plot import pareto
from moeaccel.host.quality.study import QualityResult

TOKENS = 48


def peaked_model(**changes):
    """Return a model whose predictions depend on its experts."""
    torch.manual_seed(5)
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
                if "lm_head" in name:
                    parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def study():
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(0, 64, (1, 2 * TOKENS), generator=draw)
    return Study(peaked_model(), text[:, :TOKENS], text[:, TOKENS:], config=PRESETS["small"])


@pytest.mark.parametrize("variant", [
    Variant("int4_g32", 16), Variant("mxint8", 8), Variant("mxfp4+2:4", 8, criterion="activation")],
    ids=lambda variant: variant.label)
def test_fast_path_is_golden_s_within_a_thousandth(study, variant):
    reference, row = study.measure([variant], golden_tokens=TOKENS)
    assert row.golden_tokens == TOKENS
    assert row.fast_perplexity == pytest.approx(row.golden_perplexity, rel=1e-3)
    assert row.fast_perplexity == pytest.approx(row.perplexity, rel=1e-6)
    # It is no accident: what quantising changes is far more than what the fast path leaves out.
    assert abs(row.golden_perplexity / reference.perplexity - 1) > 3e-3
    assert abs(row.fast_perplexity - row.golden_perplexity) < 0.05 * abs(
        row.golden_perplexity - reference.perplexity)


def test_what_formats_cost_and_give(study):
    names = ("mxint8", "int4_g32", "int4_g32+1:4")
    rows = list(study.measure([Variant(n, 16, criterion="magnitude" if "+" in n else None)
                               for n in names]))
    reference, int8, int4, sparse = rows
    assert (reference.kl, reference.top1, reference.loss_difference) == (0, 1, 0)
    assert 0 < int8.kl < int4.kl < sparse.kl and int8.top1 > sparse.top1
    assert int8.weight_error < int4.weight_error < sparse.weight_error
    assert int4.bits_per_weight == pytest.approx(4.5, abs=0.3)  # and row exponents
    assert int4.stored_bytes < int8.stored_bytes < reference.stored_bytes
    assert int4.decode_cycles is not None and int4.decode_cycles < int8.decode_cycles
    assert rows[0].decode_cycles is None
    assert sparse.stored_bytes < 0.7 * int4.stored_bytes and sparse.weight_format in ALL_FORMATS
    assert sparse.decode_cycles is not None and sparse.decode_cycles < int4.decode_cycles
    assert pareto(rows, "bytes") == [sparse.variant, int4.variant, int8.variant]


def test_what_activations_cost(study):
    floats, a16, a8 = (row for row in study.measure(
        [Variant("mxint8", bits) for bits in (32, 16, 8)]) if row.variant != "float")
    assert floats.decode_cycles is None and a16.decode_cycles and a8.decode_cycles
    assert abs(a16.perplexity / floats.perplexity - 1) < 1e-3
    assert abs(a8.perplexity / floats.perplexity - 1) > 1e-3
    assert floats.kl < a8.kl


def test_decode_cycles_are_those_of_the_device(study):
    """A token's cycles: counted by the golden device with the cycle model."""
    from moeaccel.host import open_device

    (row,) = list(study.measure([Variant("int4_g32", 8)]))[1:]
    total = 0
    with open_device("golden", config="small", timing=True) as device:
        for index, experts in enumerate(study.quantised(Variant("int4_g32", 8))):
            layer = device.load_quantised(experts, activation_bits=8)
            ids = study._routes[index][:1]
            layer(np.ones((1, 64), np.float32), ids, np.ones(ids.shape, np.float32))
            total += layer.last.cycles
    assert row.decode_cycles == total


def test_calibration_and_mixed_bits(study):
    rows = {row.variant: row for row in study.measure([
        Variant("int4_g128", 16), Variant("int4_g128", 16, "gptq", True),
        Variant("mixed:5.5", 16, "search", True), Variant("mixed:12", 16, "search", True)])}
    mixed, all_of_it = rows["mixed:5.5 a16 calibrated"], rows["mixed:12 a16 calibrated"]
    assert 4.5 < mixed.bits_per_weight <= 5.5
    assert all_of_it.bits_per_weight == pytest.approx(8.25, abs=0.3)  # mxint8, all of them
    assert all_of_it.kl < mixed.kl < rows["int4_g128 a16"].kl
    assert rows["int4_g128 a16 gptq"].weight_error > rows["int4_g128 a16"].weight_error


def test_the_float_layers_are_the_model(study):
    with torch.inference_mode():
        exact = study.model(study.tokens).logits
    found = predictions(exact, study.tokens)
    assert torch.allclose(found.loss, study.reference.loss, atol=1e-5)
    assert study.model.config._experts_implementation != "moeaccel-study"


def test_comparison_of_predictions():
    tokens = torch.tensor([[0, 1, 0]])
    exact, other = (predictions(torch.log(torch.tensor([values])), tokens) for values in (
        [[0.5, 0.5], [0.75, 0.25], [1.0, 1.0]], [[0.25, 0.75], [0.75, 0.25], [9.0, 1.0]]))
    found = compare(other, exact)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.kl == pytest.approx(kl / 2, rel=1e-5)
    assert found.perplexity == pytest.approx(0.75**-1, rel=1e-5)
    loss = -math.log(0.75) + math.log(0.5)
    assert found.loss_difference == pytest.approx(loss / 2, rel=1e-5)
    assert found.loss_difference_error == pytest.approx(abs(loss) / 2, rel=1e-5)
    assert found.top1 == 0.5


def test_a_layer_that_is_skipped():
    (_, weights), *_ = experts_modules(peaked_model())
    fast = FastExperts(float_experts(weights), 2)
    x, weights = torch.randn(3, 64), torch.ones(3, 2)
    assert torch.equal(fast(x, torch.full((3, 2), -1), weights), torch.zeros(3, 64))
    one = fast(x, torch.tensor([[0, -1], [4, 0], [0, 9]]), weights)
    assert torch.allclose(one, fast(x, torch.zeros(3, 1, dtype=torch.long), weights[:, :1]))


def test_what_is_wrong_is_named(study, tmp_path):
    for wrong, error, message in [
            ({"weight_format": "int5"}, FormatError, "weight_format must be one of"),
            ({"weight_format": "int4_g32+4:2", "criterion": "magnitude"}, InvalidOption, "N:M"),
            ({"weight_format": "int4_g32+2:4"}, InvalidOption, "criterion must be given"),
            ({"weight_format": "int4_g32", "criterion": "magnitude"}, InvalidOption, "only then"),
            ({"weight_format": "mixed:few"}, InvalidOption, "mixed:BITS"),
            ({"weight_format": "int4_g32", "activation_bits": 4}, InvalidOption, "8 or 16"),
            ({"weight_format": "int4_g32", "quantiser": "best"}, InvalidOption, "search"),
            ({"weight_format": "int4_g32+2:4", "criterion": "x"}, InvalidOption, "magnitude")]:
        with pytest.raises(error, match=message):
            Variant(**wrong)
    with pytest.raises(InvalidOption, match=r"budget must be at least the .* not"):
        list(study.measure([Variant("mixed:2", 16, "search", True)]))
    with pytest.raises(InvalidOption, match="model must be smollm2, or the folder"):
        open_study(tmp_path)
    short = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(InvalidOption, match="tokens must be 2 to"):
        Study(study.model, short, study.tokens, config=PRESETS["small"])
    with pytest.raises(InvalidOption, match="layers must be as many"), use_layers(study.model, []):
        pass
    dense = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedExperts, match="must have experts"):
        Study(dense, study.tokens, study.tokens, config=PRESETS["small"])


def test_every_variant_is_there_once():
    found = every_variant()
    assert len(set(found)) == len(found)
    labels = [variant.label for variant in found]
    assert {"int4_g32 a16", "mxint8 a8", "int4_g32+2:4 a16 activation", "mxint8+1:4 a16 magnitude",
            "int4_g32 a16 gptq", "mixed:5.5 a16 calibrated"} <= set(labels)
    assert all(isinstance(v, Variant) for v in found) and QualityResult.__dataclass_fields__
