"""House rules that no linter knows."""

import ast
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
FILES = [
    str(path.relative_to(ROOT))
    for folder in PACKAGES.values() for path in sorted((ROOT / folder).rglob("*.py"))
]

MOST_LINES = 600
LONG_FILES: dict[str, str] = {}
"""Files over `MOST_LINES`, and what will shorten them; this list only gets shorter."""


def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def module_name(path: str) -> str:
    folder, *rest = Path(path).with_suffix("").parts
    package = next(name for name, place in PACKAGES.items() if place == folder)
    return ".".join([package, *rest]).removesuffix(".__init__")


def bound_names(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that a module's statements bind; ``*`` stands for a star import."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    yield alias.asname or alias.name.split(".")[0]
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                for child in ast.walk(node):
                    if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                        yield child.id
            case _:
                for field in ("body", "orelse", "finalbody"):
                    yield from bound_names(getattr(node, field, []))
                for handler in getattr(node, "handlers", []):
                    yield from bound_names(handler.body)


def exported(tree: ast.Module) -> list[str]:
    """Return the entries of ``__all__``, also of ``__all__ += [...]``."""
    names: list[str] = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
            assert node.value is not None
            names.extend(ast.literal_eval(node.value))
    return names


def problems(tree: ast.Module, *, may_print: bool) -> Iterator[str]:
    """Yield every use of something that the house does not use."""
    uses_amaranth = False
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            from_amaranth = (node.module or "").split(".")[0] == "amaranth"
            uses_amaranth |= from_amaranth
            for alias in node.names:
                if alias.name == "*" and node.module != "amaranth":
                    yield f"line {node.lineno}: star import from {node.module}"
                if alias.name == "Record" and from_amaranth:
                    yield f"line {node.lineno}: Record goes with Amaranth 0.6; use wiring or data"
    own = set(bound_names(tree.body))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("hdl.Record", "am.Record", "amaranth.Record") or (
            name == "Record" and uses_amaranth and "Record" not in own
        ):
            yield f"line {node.lineno}: Record goes with Amaranth 0.6; use wiring or data"
        if name.endswith(".Case") and not node.args and not node.keywords:
            yield f"line {node.lineno}: an empty Case() never matches; use Default()"
        if name == "print" and not may_print:
            yield f"line {node.lineno}: print(); use logging, or print in moeaccel/cli"


@pytest.mark.parametrize("path", FILES)
def test_exports_exist(path):
    tree = tree_of(path)
    names = exported(tree)
    assert len(set(names)) == len(names), "__all__ names something twice"
    bound = set(bound_names(tree.body))
    missing = [name for name in names if name not in bound]
    if missing and bound & {"*", "__getattr__"}:
        # Star imports and lazy attributes are seen by importing only.
        module = importlib.import_module(module_name(path))
        missing = [name for name in missing if not hasattr(module, name)]
    # A package may export its modules.
    folder = (ROOT / path).parent
    assert [
        name for name in missing
        if not (path.endswith("__init__.py")
                and ((folder / f"{name}.py").exists() or (folder / name).is_dir()))
    ] == []


@pytest.mark.parametrize("path", FILES)
def test_house_rules_of(path):
    may_print = path.startswith(("moeaccel/cli/", "fpga/"))
    assert list(problems(tree_of(path), may_print=may_print)) == []


@pytest.mark.parametrize(("source", "wrong"), [
    ("from amaranth import *\nr = Record([])", True),
    ("from amaranth.hdl import Record", True),
    ("from amaranth import *\nclass Record: pass\nRecord()", False),
    ("from moeaccel.host.replay import Record\nRecord()", False),
    ("with m.Case():\n    pass", True),
    ("with m.Case(1):\n    pass", False),
    ("with m.Default():\n    pass", False),
    ("def f():\n    print(1)", True),
    ("m.d.sync += Print(1)", False),
    ("from moeaccel.config import *", True),
    ("from amaranth import *", False),
])
def test_the_rules_themselves(source, wrong):
    assert bool(list(problems(ast.parse(source), may_print=False))) is wrong


@pytest.mark.parametrize(("source", "names"), [
    ("import a.b, c as d\nfrom e import f", {"a", "d", "f"}),
    ("x = y = 1\nz: int = 2\n(p, q) = r", {"x", "y", "z", "p", "q"}),
    ("try:\n    import a\nexcept ImportError:\n    b = None", {"a", "b"}),
    ("if c:\n    def f(): pass\nelse:\n    class G: pass", {"f", "G"}),
    ("def f():\n    inner = 1", {"f"}),
])
def test_bound_names(source, names):
    assert set(bound_names(ast.parse(source).body)) == names


def test_every_folder_with_modules_is_a_package():
    """A folder without __init__.py imports from a checkout and is missing from the wheel."""
    folders = {(ROOT / path).parent for path in FILES}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()] == []


def test_tests_are_no_packages():
    """They mirror the tree, so tests/moeaccel as a package could hide the real one."""
    assert [str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("__init__.py")] == []


def long_files() -> set[str]:
    """Return the Python, C++ and header files over `MOST_LINES`."""
    folders = [*PACKAGES.values(), "tests", *(["examples"] if (ROOT / "examples").exists() else [])]
    return {
        str(path.relative_to(ROOT))
        for folder in folders for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp")
        and len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES
    }


def test_no_file_is_long():
    assert long_files() - set(LONG_FILES) == set(), "split them by topic"


def test_exceptions_are_needed():
    assert set(LONG_FILES) - long_files() == set(), "take them off the list"
