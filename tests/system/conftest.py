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
def pair_of(request):
    """Return a function that opens a :class:`Pair` of a configuration; the caller closes it."""
    folder = request.config.cache.mkdir("accelerators")
    models = {}

    def get(config, **options):
        config = preset(config)
        if config.digest not in models:
            models[config.digest] = cached_model(config, folder)
        return Pair(models[config.digest], config, **options)

    return get


@pytest.fixture(scope="module")
def tiny(pair_of):
    with pair_of("tiny") as pair:
        yield pair


@pytest.fixture(scope="module")
def small(pair_of):
    with pair_of("small") as pair:
        yield pair
