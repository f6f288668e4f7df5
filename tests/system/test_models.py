"""Models generate the same tokens, from the same logits, on the RTL as on the golden model."""

import pytest
import torch

import moeaccel.host.transformers_plugin as plugin
from moeaccel.formats import FORMATS
from moeaccel.sim import MemoryModel, StallModel
from tests.support.models import MODELS, config_of, make
from tests.support.pair import MEMORY_BYTES


@pytest.fixture(scope="module")
def pair(pair_of):
    memory = MemoryModel(size=MEMORY_BYTES, read_latency=20, reorder=True,
                         stalls=StallModel.uniform(0.05, length=2))
    with pair_of("tiny", memory=memory, register_stalls=StallModel.uniform(0.1)) as opened:
        yield opened


@pytest.fixture
def use(pair):
    """Return a function that makes a device the plug-in's."""
    def use(device, **options):
        plugin.release()
        device.reset()
        plugin.use_device(device, **options)

    pair.reset()
    yield use
    plugin.release()
    plugin.use_device(None)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_generate(pair, use, name):
    layers, more = MODELS[name]
    model = make(config_of(name, **more), "moeaccel")
    ids = torch.randint(0, 128, (2, 5), generator=torch.Generator().manual_seed(0))
    number = list(MODELS).index(name)
    options = {"weight_format": list(FORMATS)[number % len(FORMATS)],
               "activation_bits": (16, 8)[number % 2]}
    results = []
    for device in pair.devices:
        use(device, **options)
        assert plugin.check_model(model) == layers
        results.append(model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True,
                                      return_dict_in_generate=True))
        assert device.counters()["commands"] == layers * len(results[-1].logits)
    rtl, golden = results
    assert torch.equal(rtl.sequences, golden.sequences)
    assert len(rtl.logits) == len(golden.logits)
    for found, expected in zip(rtl.logits, golden.logits, strict=True):
        assert torch.equal(found, expected)
    pair.check()
