"""The synthesis report: what it reads, what it refuses, and one real run."""

import json

import pytest
from typer.testing import CliRunner

from moeaccel.config import PRESETS
from moeaccel.errors import ToolMissingError
from moeaccel.fpga import synth

TINY = PRESETS["tiny"]


def test_cells_are_those_of_the_block(tmp_path):
    """The fold's own registers do not count."""
    (tmp_path / "stat.json").write_text(json.dumps({"modules": {
        "\\top": {"num_cells_by_type": {"TRELLIS_FF": 500, "top.block": 1}},
        "\\top.block": {"num_cells_by_type": {"TRELLIS_FF": 7, "LUT4": 3, "MULT18X18D": 2}},
    }}))
    assert synth._cells(tmp_path) == {
        "multipliers": 2, "lut4": 3, "carry": 0, "block_rams": 0, "lut_rams": 0, "flip_flops": 7}


def test_timing_is_the_routed_clock(tmp_path):
    """Fmax of the one clock; the slowest path within it, not one from or to a pin."""
    def path(kind, start, end):
        return {"from": kind[0], "to": kind[1],
                "path": [{"from": {"cell": start}}, {"from": {"cell": "x"}, "to": {"cell": end}}]}

    (tmp_path / "report.json").write_text(json.dumps({
        "fmax": {"$glbnet$clk": {"achieved": 123.456, "constraint": 120}},
        "critical_paths": [path(("<async>", "posedge $glbnet$clk"), "pin", "a"),
                           path(("posedge $glbnet$clk", "posedge $glbnet$clk"), "b", "c")],
    }))
    assert synth._timing(tmp_path) == {"fmax_mhz": 123.5, "critical_path": ["b", "c"]}


def test_unknown_names():
    with pytest.raises(ValueError, match=r"block must be one of dot_array, .*, not 'adder'"):
        synth.synthesise("adder", TINY)
    result = CliRunner().invoke(synth.app, ["--block", "adder"])
    assert result.exit_code == 2


def test_tools_are_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(synth.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ToolMissingError, match="Synthesis needs yosys"):
        synth.synthesise("weight_streamer", TINY, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_block_is_placed_and_routed(tmp_path):
    """A real run; the second call takes the result from the first."""
    report = synth.synthesise("weight_streamer", TINY, folder=tmp_path)
    assert report.block_rams == 2
    assert report.multipliers == 0
    assert report.fmax_mhz > 60
    (home,) = tmp_path.iterdir()
    (home / "top.json").unlink()
    assert synth.synthesise("weight_streamer", TINY, folder=tmp_path) == report
