"""Hardware blocks: one name in five places, found by that name.

Sources are read, not imported, so that the page needs no Amaranth.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moeaccel.docs.markdown import ROOT, table

__all__ = ["Block", "blocks", "components"]

_GOLDEN = ("moeaccel/golden", "host/transports/golden")
_ELSEWHERE = {
    "Accelerator": "host/transports/golden/transport.py", "Dispatcher": "moeaccel/plan.py",
    "TokenRouter": "moeaccel/golden/router.py"}
"""Golden models that have a name of their own, since more than the golden device uses them."""

_FORMULA = re.compile(
    r":(?:func|mod):`~?moeaccel\.((?:arithmetic|tables|image|interface|router|golden)[\w.]*)`")
_SPEED = re.compile(r"(?:(?:Read l|L)atency|Throughput|Cycles)\b.*?\.(?=\s|$)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A public component.

    Parameters
    ----------
    name, text : :class:`str`
        Class and its docstring.
    path : :class:`str`
        Its file, from the root.
    """

    name: str
    text: str
    path: str

    @property
    def stem(self) -> str:
        """Name of its files."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.name).lower()

    @property
    def summary(self) -> str:
        """First sentence of its docstring."""
        return _line(re.split(r"(?<=\.)\s|:?\n\n", self.text)[0])

    @property
    def speed(self) -> str:
        """Sentences on latency and throughput."""
        prose = re.split(r"^(?:Parameters|Members)\n---", self.text, flags=re.MULTILINE)[0]
        return " ".join(_line(sentence) for sentence in _SPEED.findall(prose))

    def golden(self, root: Path) -> str:
        """Its golden model, as a link: the file of its name, else the functions it names."""
        if self.name in _ELSEWHERE:
            return _link(_ELSEWHERE[self.name])
        for folder in _GOLDEN:
            if (root / (path := f"{folder}/{self.stem}.py")).exists():
                return _link(path)
        names = dict.fromkeys(_FORMULA.findall(self.text))
        return ", ".join(f"`{name}`" for name in names)

    def cycles(self, root: Path) -> str:
        """Its cycle function, as a link."""
        path = f"moeaccel/cycles/{self.stem}.py"
        return _link(path) if (root / path).exists() else ""

    def tests(self, root: Path) -> str:
        """Its test, as a link: the file of its name, else those that import the component."""
        own = sorted((root / "tests").rglob(f"test_{self.stem}.py"))
        own = [path for path in own if path.is_relative_to(root / "tests/hdl")] or [
            path for path in sorted((root / "tests/hdl").rglob("test_*.py"))
            if re.search(rf"\bimport\b[^\n]*\b{self.name}\b", path.read_text(encoding="utf-8"))]
        return ", ".join(_link(str(path.relative_to(root))) for path in own)


def _line(text: str) -> str:
    """Return a text of reStructuredText as a line of a Markdown table."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?([^`]*)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", r"\|")


def _link(path: str) -> str:
    return f"[{Path(path).name}](../{path})"


def components(root: Path = ROOT) -> Iterator[Block]:
    """Yield the public components of hdl, by folder and name."""
    files = sorted((root / "hdl").rglob("*.py"), key=lambda p: (str(p.parent), p.name))
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (isinstance(node, ast.ClassDef) and not node.name.startswith("_")
                    and any(ast.unparse(base) == "wiring.Component" for base in node.bases)):
                yield Block(node.name, ast.get_docstring(node) or "", str(path.relative_to(root)))


def blocks() -> list[str]:
    """Return a table for each folder, a row for each component."""
    folders: dict[str, list[tuple[str, ...]]] = {}
    for block in components():
        folders.setdefault(str(Path(block.path).parent), []).append((
            f"[{block.name}](../{block.path})", block.summary, block.golden(ROOT),
            block.cycles(ROOT), block.tests(ROOT), block.speed))
    columns = ("component", "what it does", "golden", "cycles", "tests", "latency and throughput")
    return [line for folder, rows in folders.items()
            for line in (f"### {folder}", "", *table(columns, rows))]
