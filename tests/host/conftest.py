import os

import numpy as np
import pytest
import torch

from moeaccel.host import open_device
from tests.support.device import TINY, Hung, draw_weights


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Let workers side by side not spin for each other's cores: the products here are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device():
    with open_device("golden", config="tiny", memory_bytes=1 << 24, timeout_s=1) as opened:
        yield opened


@pytest.fixture
def hung():
    with open_device(Hung(TINY, memory_bytes=1 << 24), config="tiny", timeout_s=0.1) as device:
        yield device


@pytest.fixture
def experts(device):
    return device.load_experts(*draw_weights(np.random.default_rng(7)))
