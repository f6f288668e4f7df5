"""The runner and the bus models, on the stand-in; the bench is runner_bench.py."""

import pytest

from moeaccel.sim.cocotb_runner import BenchFailure, build_simulator, run_cocotb
from moeaccel.sim.errors import BuildError, SimulationError
from tests.sim.copy_engine import copy_engine_verilog

pytestmark = pytest.mark.cocotb


@pytest.fixture(scope="module")
def verilog():
    return copy_engine_verilog(data_width=64)


@pytest.fixture
def run(verilog, tmp_path):
    def run_one(test_filter, **options):
        options = {"seed": 7, "folder": tmp_path, "optimise": False, **options}
        return run_cocotb(verilog, "top", "tests.sim.runner_bench", test_filter=test_filter,
                          **options)
    return run_one


def test_bus_models(run):
    done = run(r"\.(copies|errors)")
    names = [test.name for test in done.tests]
    assert len(names) == 4
    assert all(test.failure is None and not test.skipped for test in done.tests)


def test_environment_seed_and_folder(run, tmp_path):
    done = run("says_hello", env={"HELLO": "well"}, seed=1234)
    assert (done.seed, done.folder) == (1234, tmp_path)
    assert (tmp_path / "hello.txt").read_text() == "well 1234"
    assert "Warning" not in (tmp_path / "simulation.log").read_text()


def test_temporary_folder_goes_after_success(run):
    assert not run("says_hello", env={"HELLO": "x"}, folder=None).folder.exists()


def test_seed_comes_from_the_environment(run, monkeypatch):
    monkeypatch.setenv("COCOTB_RANDOM_SEED", "99")
    assert run("says_hello", env={"HELLO": "x"}, seed=None).seed == 99


def test_failure_has_message_seed_and_log(run, tmp_path):
    with pytest.raises(BenchFailure, match="the answer is wrong") as caught:
        run(r"\.(fails|says_hello)", env={"HELLO": "x"})
    text = str(caught.value)
    assert text.startswith("1 of 2 tests failed: tests.sim.runner_bench, seed 7")
    assert "COCOTB_RANDOM_SEED=7" in text
    assert "--- fails" in text
    assert caught.value.seed == 7
    assert caught.value.folder == tmp_path


def test_assertion_of_the_rtl_fails(run):
    with pytest.raises(BenchFailure, match="trap register was set"):
        run("trips_an_assertion")


def test_broken_bus_rule_fails(run):
    with pytest.raises(BenchFailure, match="last == "):
        run("breaks_the_bus")


def test_no_test_is_a_failure(run):
    with pytest.raises(BenchFailure, match="No test ran"):
        run("there_is_no_such_test")


def test_simulator_is_built_once(verilog):
    home = build_simulator(verilog, "top", optimise=False)
    built = (home / "top").stat().st_mtime_ns
    assert build_simulator(verilog, "top", optimise=False) == home
    assert (home / "top").stat().st_mtime_ns == built


@pytest.mark.slow
def test_waves_are_another_build(verilog, run, tmp_path):
    run("errors", waves=True)
    assert (tmp_path / "dump.vcd").stat().st_size > 1000
    one, other = (build_simulator(verilog, "top", waves=waves, optimise=False)
                  for waves in (True, False))
    assert one != other


def test_build_errors(tmp_path):
    with pytest.raises(BuildError, match="syntax error") as caught:
        build_simulator("module top(clk);\n  input clk;\n  nonsense here\nendmodule\n", "top",
                        cache=tmp_path)
    assert "syntax error" in caught.value.log.read_text()
    # Warnings that are not waived are errors.
    with pytest.raises(BuildError, match="LATCH"):
        build_simulator(
            "module top(clk, a, q);\n  input clk;\n  input a;\n  output q;\n  reg q;\n"
            "  always @* if (clk) q = a;\nendmodule\n", "top", cache=tmp_path)
    with pytest.raises(SimulationError, match="module named 'other'"):
        build_simulator("module top(clk);\n  input clk;\nendmodule\n", "other", cache=tmp_path)
