"""The whole accelerator in Verilator under cocotb; the bench is top_bench.py.

``moeaccel bench simulators`` says why only small things run here: the in-process co-simulation
runs the same RTL many times faster.
"""

import functools

import pytest

from moeaccel.config import preset
from moeaccel.sim.cocotb_runner import run_cocotb

pytestmark = pytest.mark.cocotb


@functools.cache
def verilog_of(config):
    from moeaccel.hdl.top import generate_verilog

    return generate_verilog(preset(config), family="generic")


def run(config, *, stalls, seed, folder, test_filter=None):
    run_cocotb(verilog_of(config), "top", "tests.cocotb.top_bench", seed=seed, folder=folder,
               test_filter=test_filter, env={"BENCH_CONFIG": config, "BENCH_STALLS": stalls})


@pytest.mark.parametrize("stalls", ["none", "heavy"])
def test_tiny(tmp_path, stalls):
    run("tiny", stalls=stalls, seed=1, folder=tmp_path)


def test_small(tmp_path):
    run("small", stalls="light", seed=1, folder=tmp_path, test_filter="formats|back_to_back")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("stalls", ["light", "heavy", "reads", "writes"])
@pytest.mark.parametrize("config", ["tiny", "small"])
def test_more(tmp_path, config, stalls, seed):
    run(config, stalls=stalls, seed=seed, folder=tmp_path)
