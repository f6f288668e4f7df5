"""The synthesis report: what it refuses, and one real run."""

import pytest
from typer.testing import CliRunner

from moeaccel.config import PRESETS
from moeaccel.fpga import synth

TINY = PRESETS["tiny"]


def test_unknown_names():
    with pytest.raises(ValueError, match=r"block must be one of dot_array, .*, not 'adder'"):
        synth.synthesise("adder", TINY)
    result = CliRunner().invoke(synth.app, ["--block", "adder"])
    assert result.exit_code == 2


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
