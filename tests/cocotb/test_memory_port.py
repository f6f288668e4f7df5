"""The memory port in Verilator under cocotb; the bench is memory_port_bench.py."""

import pytest
from amaranth.back import verilog

from moeaccel.config import preset
from moeaccel.hdl.memory.memory_port import MemoryPort
from moeaccel.sim.cocotb_runner import run_cocotb

pytestmark = [pytest.mark.cocotb, pytest.mark.timeout(900)]  # the first run builds


def run(config, *, readers, writers, seed, folder):
    port = MemoryPort(preset(config), readers=readers, writers=writers)
    run_cocotb(
        verilog.convert(port, name="memory_port", emit_src=False), "memory_port",
        "tests.cocotb.memory_port_bench", seed=seed, folder=folder, optimise=False,
        env={"BENCH_CONFIG": config, "BENCH_READERS": str(readers), "BENCH_WRITERS": str(writers)})


def test_memory_port(tmp_path):
    run("tiny", readers=3, writers=2, seed=1, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize(("config", "readers", "writers"), [("tiny", 5, 3), ("small", 3, 2),
                                                            ("tiny", 1, 1)])
def test_memory_port_more(tmp_path, config, readers, writers, seed):
    run(config, readers=readers, writers=writers, seed=seed, folder=tmp_path)
