"""Models of the stand-in, each built once; later runs find them in the cache."""

import functools
from pathlib import Path

import pytest

from moeaccel.sim.cosim.sources import design_from
from moeaccel.sim.cosim.verilator import build_model
from tests.sim import copy_engine

# Only speed is lost; the models that are measured are built as users build them.
QUICK = ("-O1",)


def engine(**parameters):
    """Return the stand-in's design."""
    return design_from(
        Path(copy_engine.__file__), parameters=str(sorted(parameters.items())),
        verilog=functools.partial(copy_engine.copy_engine_verilog, **parameters))


@pytest.fixture(scope="session")
def model64():
    return build_model(engine(data_width=64))


@pytest.fixture(scope="session")
def model512():
    return build_model(engine(data_width=512))


@pytest.fixture(scope="session")
def model_waves():
    return build_model(engine(data_width=64), waves=True, flags=QUICK)


@pytest.fixture(scope="session")
def model_split():
    design = engine(data_width=32, ids=2, burst=4, addr_width=32, split=True)
    return build_model(design, flags=QUICK)
