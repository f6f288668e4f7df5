"""The whole accelerator in Verilator under cocotb; the bench is top_bench.py.

``moeaccel bench simulators`` says why only small things run here: the in-process co-simulation
runs the same RTL many times faster.
"""

import pytest

from moeaccel.config import preset
from moeaccel.sim.cocotb_runner import run_cocotb
from moeaccel.sim.cosim.accelerator import shipped_design

pytestmark = [pytest.mark.cocotb, pytest.mark.timeout(1800)]  # the first run builds


LONG = "random_layers|largest_dimensions"


def run(config, *, stalls, seed, folder, test_filter=None):
    run_cocotb(shipped_design(preset(config)), "top", "tests.cocotb.top_bench", seed=seed,
               folder=folder, optimise=False, test_filter=test_filter,
               env={"BENCH_CONFIG": config, "BENCH_STALLS": stalls})


def test_tiny(tmp_path):
    run("tiny", stalls="none", seed=1, folder=tmp_path, test_filter=f"^((?!{LONG}).)*$")


def test_tiny_with_pauses_everywhere(tmp_path):
    run("tiny", stalls="heavy", seed=1, folder=tmp_path, test_filter=(
        "routings|gemm.*many|side=behind|errors_of_memory|ring_log2=2|abort|soft_reset|watchdog"))


@pytest.mark.slow  # the same on another configuration, whose model takes most of its time
def test_small(tmp_path):
    run("small", stalls="light", seed=1, folder=tmp_path,
        test_filter="formats|ring_log2=2|registers")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 4))
@pytest.mark.parametrize("stalls", ["light", "heavy", "reads", "writes"])
@pytest.mark.parametrize("config", ["tiny", "small"])
def test_more(tmp_path, config, stalls, seed):
    run(config, stalls=stalls, seed=seed, folder=tmp_path)
