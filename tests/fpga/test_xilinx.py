"""The UltraScale+ report: how it counts, and one real run."""

import pytest
from typer.testing import CliRunner

from moeaccel.config import PRESETS
from moeaccel.errors import ToolMissingError
from moeaccel.fpga import flow, xilinx
from moeaccel.fpga.boards import board

U55C = board("u55c")


def test_equal_parts_count_as_often_as_they_are_there():
    usages = xilinx._count({
        "top": {"moeaccel_core": 3, "LUT6": 10, "CARRY4": 5, "top.port": 1},
        "top.port": {"FDRE": 7, "RAM32M16": 1, "RAMB18E2": 1},
        "moeaccel_core": {"moeaccel_core.array": 1, "LUT2": 1},
        "moeaccel_core.array": {"DSP48E2": 4, "RAMB36E2": 2, "URAM288": 1, "FDSE": 2},
        "unused": {"LUT1": 1},
    })
    assert [(u.block, u.times) for u in usages] == [
        ("top", 1), ("moeaccel_core", 3), ("moeaccel_core.array", 3), ("top.port", 1)]
    assert usages[0].resources == {"lut": 10 + 8 + 3, "flip_flop": 7 + 6, "dsp": 12,
                                   "block_ram": 6.5, "ultra_ram": 3}


def test_a_cell_that_it_does_not_know():
    with pytest.raises(ValueError, match=r"cell must be one that this table knows, not \$mul"):
        xilinx._count({"top": {"$mul": 1}})


def test_the_page_says_whether_it_fits():
    def page(**resources):
        usage = xilinx.Usage(block="top", times=1, resources=dict.fromkeys(xilinx.RESOURCES, 0.0)
                             | resources)
        return xilinx._page(U55C, PRESETS["tiny"], [usage], "yosys 0")

    assert "it fits the Alveo U55C" in page(dsp=9024.0)
    assert "it does not fit the Alveo U55C" in page(dsp=9025.0)
    assert "| share taken |  | 50.0 % |" in page(lut=651840.0)


def test_tools_are_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(flow.importlib.metadata, "entry_points", lambda **_: ())
    with pytest.raises(ToolMissingError, match="Synthesis needs yosys"):
        xilinx.map_blocks(PRESETS["tiny"], folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_smallest_accelerator(tmp_path):
    """A real run: the array has its multipliers as DSP48E2, the second call takes the first's."""
    usages, _ = xilinx.map_blocks(PRESETS["tiny"], folder=tmp_path)
    tiny = PRESETS["tiny"]
    by_name = {u.block: u for u in usages}
    array = next(u for name, u in by_name.items() if name.endswith(".array"))
    assert array.resources["dsp"] == tiny.multipliers + tiny.rows * tiny.token_lanes
    assert by_name["top"].resources["block_ram"] > 0
    assert by_name["top"].resources["lut"] < U55C.resources["lut"]
    (home,) = tmp_path.iterdir()
    (home / "top.v").unlink()
    assert xilinx.map_blocks(tiny, folder=tmp_path)[0] == usages


def test_command_line(monkeypatch):
    usage = xilinx.Usage(block="top", times=1, resources=dict.fromkeys(xilinx.RESOURCES, 1.0))
    monkeypatch.setattr(xilinx, "map_blocks", lambda *_, **__: ([usage], "yosys 0"))
    result = CliRunner().invoke(xilinx.app, ["--config", "tiny"])
    assert result.exit_code == 0
    assert "1,303,680" in result.output
