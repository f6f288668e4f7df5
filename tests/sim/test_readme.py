"""What sim/README.md shows works."""

import re
from pathlib import Path

import pytest

from moeaccel.interface.registers import REGISTERS

README = Path(__file__).parents[2] / "sim" / "README.md"


@pytest.mark.timeout(900)  # the first run builds the model
def test_the_example_runs(capsys):
    block, = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(block, str(README), "exec"), {})
    assert f"ID {REGISTERS['ID'].reset:#x}, read in cycle " in capsys.readouterr().out
