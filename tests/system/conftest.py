"""The accelerator of each configuration, built once; later runs find it in their caches."""

import os

import pytest
import torch

from moeaccel.config import preset
from tests.support.pair import Pair, cached_model


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Let workers side by side not spin for each other's cores: the products here are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_of(request):
    """Return a function from a configuration to its Verilated model."""
    folder = request.config.cache.mkdir("accelerators")
    models = {}

    def get(config, family="generic"):
        key = config.digest, family
        if key not in models:
            models[key] = cached_model(config, folder, family)
        return models[key]

    return get


@pytest.fixture(scope="session")
def pair_of(model_of):
    """Return a function that opens a :class:`Pair` of a configuration; the caller closes it."""
    def get(config, *, family="generic", **options):
        config = preset(config)
        return Pair(model_of(config, family), config, **options)

    return get


@pytest.fixture(scope="module")
def tiny(pair_of):
    with pair_of("tiny") as pair:
        yield pair


@pytest.fixture(scope="module")
def small(pair_of):
    with pair_of("small") as pair:
        yield pair
