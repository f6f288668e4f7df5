import pytest
import torch

import moeaccel.host.transformers_plugin as plugin
from moeaccel.host import open_device
from moeaccel.host.plugins.transformers import operator


@pytest.fixture(autouse=True)
def not_warned_yet(monkeypatch):
    monkeypatch.setattr(operator, "_warned", set())


@pytest.fixture
def device():
    with open_device("golden", config="small", memory_bytes=1 << 28) as opened:
        plugin.use_device(opened, weight_format="mxint8", activation_bits=16)
        yield opened
        plugin.release()
        plugin.use_device(None)


@pytest.fixture
def environment(monkeypatch):
    """Take the device from the environment, which says nothing; return monkeypatch."""
    for name in ("DEVICE", "CONFIG", "MEMORY", "WEIGHT_FORMAT", "ACTIVATION_BITS",
                 "QUANTISER"):
        monkeypatch.delenv(f"MOEACCEL_{name}", raising=False)
    plugin.use_device(None)
    yield monkeypatch
    plugin.release()
    plugin.use_device(None)


@pytest.fixture
def ids():
    return torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(0))
