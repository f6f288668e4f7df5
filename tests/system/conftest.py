"""The accelerator of each configuration, built once; later runs find it in the cache."""

import functools
import os

import pytest
import torch

from moeaccel.config import preset
from moeaccel.sim import build_accelerator_model
from tests.support.pair import Pair


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Let workers side by side not spin for each other's cores: the products here are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_of():
    """Return a function from a configuration to its Verilated model."""
    @functools.cache
    def get(config, family="generic"):
        return build_accelerator_model(config, family=family)

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
