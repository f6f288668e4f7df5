"""Models of the stand-in, each built once; later runs find Verilog and models in their caches."""

import hashlib
import os
from pathlib import Path

import pytest

from moeaccel.sim.cosim.verilator import build_model
from tests.sim import copy_engine

# Only speed is lost; the models that are measured are built as users build them.
QUICK = ("-O1",)


@pytest.fixture(scope="session")
def verilog_of(request):
    """Return a function from parameters to Verilog, with pytest's cache behind it."""
    folder = request.config.cache.mkdir("copy_engine")
    source = Path(copy_engine.__file__).read_text(encoding="utf-8")

    def get(**parameters):
        digest = hashlib.sha256(f"{source}{sorted(parameters.items())}".encode()).hexdigest()
        path = folder / f"{digest}.v"
        if not path.is_file():
            made = path.with_suffix(f".{os.getpid()}")
            made.write_text(copy_engine.copy_engine_verilog(**parameters), encoding="utf-8")
            made.replace(path)
        return path.read_text(encoding="utf-8")

    return get


@pytest.fixture(scope="session")
def model64(verilog_of):
    return build_model(verilog_of(data_width=64))


@pytest.fixture(scope="session")
def model512(verilog_of):
    return build_model(verilog_of(data_width=512))


@pytest.fixture(scope="session")
def model_waves(verilog_of):
    return build_model(verilog_of(data_width=64), waves=True, flags=QUICK)


@pytest.fixture(scope="session")
def model_split(verilog_of):
    verilog = verilog_of(data_width=32, ids=2, burst=4, addr_width=32, split=True)
    return build_model(verilog, flags=QUICK)
