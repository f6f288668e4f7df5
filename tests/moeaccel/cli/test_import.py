"""``moeaccel import``: what it writes and says."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeaccel.cli import app
from moeaccel.host.importers import open_quantised

CHECKPOINT = str(Path(__file__).parents[3] / "host" / "demo" / "checkpoint")
runner = CliRunner()


def test_figures_and_file(tmp_path):
    path = tmp_path / "experts"
    result = runner.invoke(app, ["import", CHECKPOINT, "--output", str(path), "--layer", "2",
                                 "--weight-format", "mxint8", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["weight_format"] == "mxint8" and found["bytes"] == path.stat().st_size
    layer, = found["layers"]
    assert layer["layer"] == 2 and layer["stored_as"] == ["floats"] and layer["experts"] == 8
    assert layer["requantised"] == layer["groups"] and 0.005 < layer["relative_error"] < 0.01
    with open_quantised(path) as file:
        assert list(file.layers) == [2] and len(file.layers[2]) == 8


def test_table(tmp_path):
    result = runner.invoke(app, ["import", CHECKPOINT, "--output", str(tmp_path / "experts"),
                                 "--quantiser", "amax"])
    assert result.exit_code == 0, result.output
    assert "8 of 128 x 64" in result.output and "589,824 weights in int4_g32" in result.output


@pytest.mark.parametrize("output", ["model.safetensors", "link"])
def test_the_checkpoint_itself_is_not_replaced(tmp_path, output):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "link").symlink_to("model.safetensors")
    before = (folder / "model.safetensors").read_bytes()
    result = runner.invoke(app, ["import", str(folder), "--output", str(folder / output)])
    assert result.exit_code == 2 and "the checkpoint's own" in result.output
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.part"))
