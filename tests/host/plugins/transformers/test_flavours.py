import re

import pytest
import torch

import moeaccel.host.transformers_plugin as plugin
from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.plugins.transformers.gates import Gate
from moeaccel.host.plugins.transformers.modules import look
from tests.support.experts import relative
from tests.support.flavours import decorated, every_class, modelling, quantised, small

CALL = (torch.randn(6, 64, generator=torch.Generator().manual_seed(1)),
        torch.tensor([[0, 1], [2, 3], [1, 1], [0, 3], [2, 0], [3, 2]]),
        torch.rand(6, 2, generator=torch.Generator().manual_seed(2)))

# Classes whose experts are no plain SwiGLU: in what, and what of it the device does not do.
TAKEN = {
    "DeepseekV4Experts": Gate("silu", 10.0),
    "DiffusionGemmaTextExperts": Gate("gelu_tanh"),
    "Gemma4TextExperts": Gate("gelu_tanh"),
    "Glm5NextTextExperts": Gate("silu", 10.0),
    "HYV4Experts": Gate("silu", 10.0),
    "GptOssExperts": Gate("gpt_oss", 7.0),
    "MiniMaxM3VLExperts": Gate("gpt_oss", 7.0),
    "NemotronHExperts": Gate("relu2"),
    "OpenAIPrivacyFilterExperts": Gate("gpt_oss", 7.0),
}
REFUSED = {
    "Inkling2Experts": "a gate without soft caps, but",
    "MuseSparkExperts": "no norm behind its experts, but",
}

FLAVOURS = {  # model -> whether its experts have up rows
    "aria": True,  # transposed
    "beam": True,  # a gate in float32
    "deepseek_v4": True,
    "gemma4": True,
    "gpt_oss": True,  # biases, transposed, interleaved
    "minimax_m3_vl": True,
    "nemotron_h": False,
    "olmoe": True,
    "openai_privacy_filter": True,  # biases, transposed
    "zaya": True,  # its activation is no module
}


def check(cls):
    """Compare the device with the class's own code: by its float weights and by those in memory."""
    module = small(cls)
    weights, reason = look(module)
    assert weights is not None, reason
    expected = TAKEN.get(cls.__name__, Gate())
    assert (weights.activation, weights.limit) == (expected.activation, expected.limit)
    eager = small(cls, "eager")
    y = module(*CALL)
    assert relative(y, eager(*CALL)) < 0.025
    assert relative(y, quantised(eager)(*CALL)) < 2e-4
    plugin.release(module)
    return weights


@pytest.mark.parametrize("model", FLAVOURS)
@torch.no_grad()
def test_one_class_of_each_flavour(device, model):
    (cls,) = decorated(modelling(model))
    assert check(cls).gated == FLAVOURS[model]


@torch.no_grad()
def test_limits_are_reached():
    module = small(decorated(modelling("deepseek_v4"))[0], "eager")
    y = module(*CALL)
    module.limit = 1e9
    assert relative(y, module(*CALL)) > 0.1


@pytest.mark.parametrize("model", ["inkling2", "muse_spark"])
def test_refused_classes_say_why(device, model):
    (cls,) = decorated(modelling(model))
    why = f"{cls.__name__} must have {REFUSED[cls.__name__]}"
    with pytest.raises(UnsupportedExperts, match=why):
        small(cls)(*CALL)


@pytest.mark.slow
@torch.no_grad()
def test_every_class_that_transformers_decorates(device):
    refused, ran = {}, []
    for cls in every_class():
        reason = look(small(cls))[1]
        if reason is not None:
            refused[cls.__name__] = reason
            continue
        check(cls)
        ran.append(cls.__name__)
    assert refused.keys() == REFUSED.keys()
    for name, reason in refused.items():
        assert re.match(f"{name} must have {REFUSED[name]}", reason), reason
    assert len(ran) == len(set(ran)) >= 63
    assert TAKEN.keys() < set(ran)
