"""What models and designs are built with, and where models are kept; ``moeaccel doctor`` looks for
the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from moeaccel.errors import CacheError, ToolMissingError, instead_of_os_error

__all__ = ["CACHE_VARIABLE", "cache_folder", "executing", "find_compiler", "is_as_new",
           "using_cache"]

CACHE_VARIABLE = "MOEACCEL_CACHE"

_COMPILERS = ("g++", "clang++", "c++")


def find_compiler() -> str:
    """Return the C++ compiler's command: ``$CXX``, or the first one found.

    ``$CXX`` may hold a launcher and options, as in ``ccache g++``.

    Raises
    ------
    ToolMissingError
        If there is none.
    """
    named = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(named)] if named else [[name] for name in _COMPILERS]
    except ValueError as error:
        raise ToolMissingError(f"$CXX must be a command, not {named!r}: {error}") from error
    for program, *options in commands:
        if path := shutil.which(program):
            return shlex.join([path, *options])
    what = f"$CXX names {named!r}, which is not there" if named else "there is none on PATH"
    hint = ("run 'xcode-select --install'" if sys.platform == "darwin" else
            "install g++, for example with 'apt install g++' or 'dnf install gcc-c++'")
    raise ToolMissingError(f"Simulating the RTL needs a C++ compiler, and {what}: {hint}")


@contextlib.contextmanager
def executing(program: str) -> Iterator[None]:
    """Turn what the system says when a program cannot be executed into an error that names it.

    Raises
    ------
    ToolMissingError
        In the place of :class:`OSError`.
    """
    with instead_of_os_error(lambda error: ToolMissingError(
            f"{program} must be a program that can be executed, but the system says "
            f"{error.strerror or error}; install it again, or name another one")):
        yield


def is_as_new(native: str, shipped: str) -> bool:
    """Return whether a program on PATH is as new as the one of this environment's packages.

    Figures of an old tool are worse, and nobody sees why; so one that does not say its version is
    not taken, either.

    Parameters
    ----------
    native, shipped : str
        Lines that hold a version: dotted numbers, of which the first two count.
    """
    def numbers(line: str) -> list[int]:
        found = re.search(r"\d+(?:\.\d+)+", line)
        return [int(part) for part in found[0].split(".")[:2]] if found else []

    return numbers(native) >= numbers(shipped)


def cache_folder() -> Path:
    """Return where built models are kept.

    It is ``$MOEACCEL_CACHE`` if set, else ``moeaccel`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises
    ------
    CacheError
        If there is no home folder, either.
    """
    try:
        if chosen := os.environ.get(CACHE_VARIABLE):
            return Path(chosen).expanduser().absolute()
        if chosen := os.environ.get("XDG_CACHE_HOME"):
            return Path(chosen).absolute() / "moeaccel"
        return Path.home() / ".cache" / "moeaccel"
    except RuntimeError as error:
        raise CacheError(f"cache folder of built models must be known, but {error}; set "
                         f"{CACHE_VARIABLE} to a folder") from error


@contextlib.contextmanager
def using_cache(folder: Path) -> Iterator[None]:
    """Turn what the system refuses in a cache folder into an error that says what to do.

    Raises
    ------
    CacheError
        In the place of :class:`OSError`.
    """
    def error_for(error: OSError) -> CacheError:
        match error.errno:
            case errno.ENOTDIR | errno.EEXIST:
                what = f"a file is in its place ({error.filename or folder})"
            case errno.EACCES | errno.EPERM | errno.EROFS:
                what = f"this user may not write there ({error.strerror})"
            case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
                what = f"there is no room ({error.strerror}); free some, there or in $TMPDIR"
            case _:
                what = f"the system says {error.strerror or error}"
        return CacheError(
            f"cache folder of built models must be one that can be written, not {str(folder)!r}: "
            f"{what}, or set {CACHE_VARIABLE} to another folder")

    with instead_of_os_error(error_for):
        yield
