"""Where models are kept, and which compiler builds them."""

import os
from pathlib import Path

import pytest

from moeaccel.errors import CacheError, ToolMissingError
from moeaccel.toolchain import CACHE_VARIABLE, cache_folder, find_compiler, using_cache


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, "relative")
    assert cache_folder() == tmp_path / "relative"  # compilers run elsewhere
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "moeaccel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "moeaccel"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(CacheError, match="set MOEACCEL_CACHE to a folder"):
        cache_folder()


def test_errors_of_this_package_stay_what_they_are():
    class Own(CacheError):
        pass

    with pytest.raises(Own), using_cache(Path("x")):
        raise Own("mine")


@pytest.mark.parametrize("name", ["g++", "clang++", "c++"])
def test_the_first_compiler_on_path(monkeypatch, tmp_path, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", " ")
    with pytest.raises(ToolMissingError, match="there is none on PATH"):
        find_compiler()
    (tmp_path / name).write_text("")
    (tmp_path / name).chmod(0o755)
    assert find_compiler() == os.fspath(tmp_path / name)
