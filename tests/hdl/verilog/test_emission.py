"""The emitted files: reproducible, linted without a waiver of their own, described truly."""

import json
import os
import re
import subprocess
import sys

import pytest

from moeaccel.hdl.array.multiplier import FAMILIES
from moeaccel.hdl.verilog.dsp_models import DSP_MODELS
from tests.support.emitted import emitted
from tests.support.verilated import lint


@pytest.fixture(params=[
    pytest.param(family, marks=[] if family == "xilinx" else pytest.mark.slow)
    for family in FAMILIES
])
def made(request):
    return request.param, emitted(request.param)


@pytest.mark.slow  # tests/fpga/test_vivado.py always lints the one for xilinx
@pytest.mark.parametrize("family", FAMILIES)
def test_lint(family, tmp_path):
    """Verilator has nothing to say beyond what Amaranth's Verilog cannot avoid."""
    files = emitted(family)
    assert files.get("core_models.v", "") == DSP_MODELS[family]
    lint(files["core.v"] + DSP_MODELS[family], tmp_path)


def test_ports_are_those_of_the_verilog(made):
    family, files = made
    described = json.loads(files["core.json"])
    assert described["family"] == family
    module = re.search(r"^module top\(.*?^endmodule", files["core.v"], re.DOTALL | re.MULTILINE)[0]
    found = {name: (direction, int(high or 0) + 1) for direction, high, name in re.findall(
        r"^  (input|output) (?:\[(\d+):0\] )?(\w+);", module, re.MULTILINE)}
    assert {port["name"]: (port["direction"], port["width"])
            for port in described["ports"]} == found


def test_assertions_are_for_simulators(made):
    """Where SYNTHESIS is defined nothing of SystemVerilog is left."""
    text = made[1]["core.v"]
    head, _, body = text.partition("`endif\n")
    assert "`define MOEACCEL_ASSERT(what) assert (what )" in head
    assert body.count("`MOEACCEL_ASSERT(") > 10
    assert not re.search(r"\bassert\b", body)


def test_another_process_writes_the_same():
    """Also where hashes of strings differ."""
    script = ("import sys; from tests.support.emitted import emitted; "
              "sys.stdout.write(''.join(emitted('xilinx').values()))")
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                           check=True, env={**os.environ, "PYTHONHASHSEED": "77"}).stdout
    assert other == "".join(emitted("xilinx").values())
    assert len(other) > 100_000
