"""The synthesis report: what it refuses, and one real run."""

import json

import pytest
from typer.testing import CliRunner

from moeaccel.config import PRESETS
from moeaccel.errors import ToolFailedError
from moeaccel.fpga import synth

TINY = PRESETS["tiny"]


def test_unknown_names():
    with pytest.raises(ValueError, match=r"block must be one of dot_array, .*, not 'adder'"):
        synth.synthesise("adder", TINY)
    result = CliRunner().invoke(synth.app, ["--block", "adder"])
    assert result.exit_code == 2


@pytest.mark.parametrize("name", synth.BLOCKS)
def test_every_block_can_be_made(name):
    """Blocks are imported by name when they are needed: a file that has moved shows here."""
    assert synth.BLOCKS[name](TINY).signature.members


def test_what_is_kept_makes_a_table(tmp_path):
    """A block that is done again replaces its row; others stay."""
    def report(block, fmax_mhz):
        return synth.Report(
            block=block, config="tiny", seed=1, multipliers=2, lut4=30, carry=4, block_rams=5,
            lut_rams=6, flip_flops=70, fmax_mhz=fmax_mhz, critical_path=[], tools="yosys 1",
            digest="0", seconds=1.0)

    for kept in (report("sequencer", 90.0), report("combiner", 110.0), report("sequencer", 120.0)):
        synth._save(kept, tmp_path)
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if "tiny" in line]
    assert rows == [
        "| combiner | tiny | 2 | 30 | 4 | 5 | 6 | 70 | 110.0 | 1 | yosys 1 |",
        "| sequencer | tiny | 2 | 30 | 4 | 5 | 6 | 70 | 120.0 | 1 | yosys 1 |",
    ]


def test_a_block_that_fails_does_not_stop_the_others(monkeypatch):
    """Each is named, the others are reported, and the exit status tells."""
    def synthesise(name, config, **options):
        if name == "combiner":
            raise ToolFailedError("yosys failed with exit status 1")
        return synth.Report(
            block=name, config=config.name, seed=1, multipliers=0, lut4=0, carry=0, block_rams=0,
            lut_rams=0, flip_flops=0, fmax_mhz=100.0, critical_path=[], tools="", digest="",
            seconds=0.0)

    monkeypatch.setattr(synth, "synthesise", synthesise)
    result = CliRunner().invoke(
        synth.app, ["--block", "combiner", "--block", "sequencer", "--json"])
    assert result.exit_code == 1
    assert "combiner: yosys failed with exit status 1" in result.stderr
    assert [report["block"] for report in json.loads(result.stdout)] == ["sequencer"]


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
