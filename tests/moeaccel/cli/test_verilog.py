"""``moeaccel verilog``: which files it writes, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.config import PRESETS

runner = CliRunner()


def test_files(tmp_path):
    arguments = ["verilog", "--config", "tiny", "--output", str(tmp_path / "new" / "core.v"),
                 "--board", "u55c", "--core-mhz", "150"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "new"
    assert {path.name for path in folder.iterdir()} == {
        "core.v", "core.json", "core.h", "core_models.v", "moeaccel_u55c.v", "u55c.xdc",
        "build_u55c.tcl"}
    described = json.loads((folder / "core.json").read_text())
    assert described["digest"] == f"{PRESETS['tiny'].digest:#010x}"
    assert described["family"] == "xilinx"
    assert "DSP48E2" in (folder / "core.v").read_text()
    script = (folder / "build_u55c.tcl").read_text()
    assert "set core_mhz 150\n" in script
    assert "[file join $here core.v]" in script


@pytest.mark.parametrize(("arguments", "match"), [
    (["--config", "huge"], "config must be one of"),
    (["--family", "asic"], "family must be one of generic, ecp5, xilinx, not 'asic'"),
    (["--board", "u55c", "--family", "ecp5"], "family must be one of xilinx, not 'ecp5'"),
    (["--board", "vcu118"], "board must be one of u55c, not 'vcu118'"),
    (["--board", "u55c", "--core-mhz", "1000"], "core_mhz must be from 10 to 500, not 1000.0"),
    (["--core-mhz", "100"], "core_mhz must come with a board"),
])
def test_refused(tmp_path, arguments, match):
    result = runner.invoke(app, ["verilog", "--output", str(tmp_path / "a.v"), *arguments])
    assert result.exit_code == 2
    assert match in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
