"""A model that the cache gives is never older than the sources it is made from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moeaccel
from moeaccel.config import PRESETS
from moeaccel.hdl import core
from moeaccel.sim.board.board import board_design
from moeaccel.sim.cosim import accelerator, sources, verilator
from moeaccel.sim.cosim.accelerator import accelerator_design
from moeaccel.sim.cosim.sources import Design, design_from, digest, sources_of

TINY = PRESETS["tiny"]
REPOSITORY = Path(core.__file__).parents[1]

LOADED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from moeaccel.config import PRESETS
from moeaccel.hdl.core import Core
from moeaccel.hdl.verilog.verilog_target import VerilogTarget
from amaranth.hdl import Fragment
Fragment.get(Core(PRESETS["tiny"]), VerilogTarget())
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("moeaccel")),
      sep="\\n")
"""


@pytest.fixture(autouse=True)
def old_sources(monkeypatch):
    """Sources count as older than this process, also where somebody works on them meanwhile."""
    monkeypatch.setattr(sources, "_BEGIN", float("inf"))


def changed(monkeypatch, path):
    """Let a file have another content."""
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda one: read(one) + (
        b"#" if one.resolve() == path.resolve() else b""))


@pytest.mark.parametrize("name", [
    "hdl/top.py", "hdl/array/dot_array.py", "hdl/verilog/verilog_target.py",
    "moeaccel/__init__.py", "moeaccel/config.py", "moeaccel/tables.py",
    "moeaccel/formats/base.py", "moeaccel/interface/registers.py"])
def test_any_source_is_in_the_keys(monkeypatch, name):
    before = accelerator_design(TINY).key, board_design(TINY).key
    assert before == (accelerator_design(TINY).key, board_design(TINY).key)
    changed(monkeypatch, REPOSITORY / name)
    for one, other in zip(before, (accelerator_design(TINY).key, board_design(TINY).key),
                          strict=True):
        assert one != other


def test_each_design_has_its_own_sources(monkeypatch):
    before = accelerator_design(TINY).key, board_design(TINY).key
    changed(monkeypatch, REPOSITORY / "sim/board/sdram_chip.py")
    assert accelerator_design(TINY).key == before[0]
    assert board_design(TINY).key != before[1]
    changed(monkeypatch, REPOSITORY / "sim/cosim/accelerator.py")
    assert accelerator_design(TINY).key != before[0]


@pytest.mark.parametrize("name", ["moeaccel/cycles.py", "sim/soak.py", "sim/cosim/memory.py"])
def test_what_no_model_is_made_from_is_in_no_key(monkeypatch, name):
    before = accelerator_design(TINY).key
    files = verilator._build_files(verilator._HARNESS, speedup=True)
    changed(monkeypatch, REPOSITORY / name)
    assert accelerator_design(TINY).key == before
    assert REPOSITORY / name not in files.values()


def test_nothing_that_is_imported_is_missing():
    folder = REPOSITORY / "hdl"
    modules = [".".join(["moeaccel.hdl", *path.relative_to(folder).with_suffix("").parts])
               for path in sorted(folder.rglob("*.py")) if path.stem != "__init__"]
    done = subprocess.run([sys.executable, "-c", LOADED, *modules], capture_output=True, text=True,
                          check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    loaded = {Path(line).resolve() for line in done.stdout.splitlines()}
    assert len(loaded) > len(modules) > 30
    found = sources_of(Path(accelerator.__file__))
    assert loaded <= {path.resolve() for path in found.values()}


def test_configuration_family_and_versions_are_in_the_key(monkeypatch):
    before = accelerator_design(TINY).key
    assert accelerator_design(TINY.replace(name="another name")).key == before
    assert accelerator_design(TINY.replace(token_groups=4)).key != before
    assert accelerator_design(TINY, "ecp5").key != before
    assert board_design(TINY, 5).key != board_design(TINY, 4).key
    monkeypatch.setattr(sources, "_versions", lambda: ("0.5.99", "1"))
    assert accelerator_design(TINY).key != before


def package(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_all_below_a_package_is_a_source(monkeypatch, tmp_path):
    """Also what nothing imports by name, and what is no Python."""
    package(tmp_path, {
        "own.py": "from moeaccel.parts.one import part\nfrom moeaccel import (\n    single,\n)\n",
        "parts/__init__.py": "", "parts/one.py": "def part():\n    import moeaccel.deep\n",
        "parts/deeper/two.py": "", "parts/table.json": "", "parts/__pycache__/one.pyc": "",
        "single.py": "", "deep.py": "", "other.py": ""})
    monkeypatch.setattr(moeaccel, "__path__", [str(tmp_path)])
    found = sources_of(tmp_path / "own.py")
    assert [name for name in found if not name.endswith("own.py")] == [
        "__init__.py", "deep.py", "parts/__init__.py", "parts/deeper/two.py", "parts/one.py",
        "parts/table.json", "single.py"]
    keys = {design_from(tmp_path / "own.py", parameters="", verilog=str).key}
    for name in ("parts/table.json", "parts/deeper/two.py"):
        (tmp_path / name).write_text("1", encoding="utf-8")
        keys.add(design_from(tmp_path / "own.py", parameters="", verilog=str).key)
    (tmp_path / "parts/one.py").rename(tmp_path / "parts/three.py")
    keys.add(design_from(tmp_path / "own.py", parameters="", verilog=str).key)
    assert len(keys) == 4


def test_sources_that_change_while_a_process_runs(monkeypatch, tmp_path):
    """It may have imported what was there before: what it makes then is keyed by its text."""
    own = tmp_path / "own.py"
    own.write_text("", encoding="utf-8")

    def make(text):
        return design_from(own, parameters="", verilog=lambda: text, busy=lambda: "busy")

    assert make("old").name(tmp_path) == make("new").name(tmp_path) == digest("old", "busy")
    monkeypatch.setattr(sources, "_BEGIN", 0.0)
    assert make("new").name(tmp_path) == digest("new", "busy")
    assert make("old").name(tmp_path) == digest("old", "busy")


def test_a_text_is_its_own_name(tmp_path):
    one, other = Design.of("module a; endmodule"), Design.of("module b; endmodule")
    assert one.name(tmp_path) == Design.of("module a; endmodule").name(tmp_path)
    assert one.name(tmp_path) != other.name(tmp_path)
    assert one.verilog() == "module a; endmodule"
    assert one.busy() == ""
    assert Design.of(one) is one
    assert not list(tmp_path.iterdir())


def test_other_sources_of_the_same_text_have_the_same_name(tmp_path):
    """Nothing is compiled again after an edit that changes no Verilog."""
    made = []

    def design(key, text="text", busy="busy"):
        return Design(key=key, verilog=lambda: made.append(key) or text, busy=lambda: busy)

    notes = tmp_path / "notes"
    name = design("one").name(notes)
    assert design("one").name(notes) == design("two").name(notes) == name
    assert made == ["one", "two"]
    assert design("three", text="other").name(notes) != name
    assert design("four", busy="other").name(notes) != name


def test_notes_that_cannot_be_written(tmp_path):
    """The cache may be one that others have filled, and this user only reads."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    design = Design(key="one", verilog=lambda: "text")
    assert design.name(tmp_path / "file" / "notes") == digest("text", "")


@pytest.mark.parametrize(("name", "always"), [
    ("sim/cosim/harness.cpp", True), ("sim/cosim/memory_port.h", True),
    ("sim/cosim/lz4/lz4.h", True), ("sim/cosim/runtime_hooks.h", True),
    ("sim/cosim/verilator.py", True), ("sim/speedup/gating.py", False),
    ("sim/speedup/statements.py", False)])
def test_what_builds_a_model_is_in_its_digest(name, always):
    """The rewriters are, where they are used."""
    for speedup in (True, False):
        files = verilator._build_files(verilator._HARNESS, speedup=speedup)
        assert (REPOSITORY / name in files.values()) is (always or speedup)
    assert REPOSITORY / "sim/board/board.h" in verilator._build_files(
        REPOSITORY / "sim/board/board.cpp", speedup=True).values()


def test_a_cached_model_is_opened_without_its_verilog(monkeypatch, tmp_path):
    made = []
    design = Design(key="one", verilog=lambda: made.append(1) or MODULE)
    monkeypatch.setattr(verilator._Build, "compile", lambda self, harness: (
        (self._work / verilator.LIBRARY_NAME).write_text("")))
    first = verilator.build_model(design, cache=tmp_path)
    assert first.memory_ports == ("mem", "mem10")
    before = len(made)
    assert verilator.build_model(design, cache=tmp_path) == first
    assert len(made) == before
    first.library.with_name(verilator.VERILOG_NAME).unlink()  # a damaged entry
    assert verilator.build_model(design, cache=tmp_path).memory_ports == ("mem", "mem10")
    assert len(made) == before + 1


PORTS = ("input clk", "input rst", "input axil__awvalid", "input mem__awready",
         "output irq", "output mem__awburst", "output mem10__awburst")
MODULE = "\n".join([
    f"module top({', '.join(port.split()[1] for port in PORTS)});", *(f"{port};" for port in PORTS),
    *(f"assign {port.split()[1]} = 0;" for port in PORTS if port.startswith("output")),
    "endmodule"])
