"""Imports point one way, and what is heavy and optional is imported where it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "loraspan"
TRITON = ROOT / "kernels" / "triton_ops"

# rooms that anyone may use: they know nothing of the rest
LEAVES = {"errors", "_default_device", "_dispatch", "_native", "_core"}
KERNELS = {"_core", "_default_device", "_device", "_native", "_dispatch", "errors"}
# the glue of GPU kernels takes the operators' own types and their way back to the CPU, and is imported by name where a
# call asks for it
GLUE = {"ops.blocks", "ops.combine", "ops.reconstruct", "ops.cores", "ops.places", "ops.rounding", "_native", "errors"}
BELOW_STORE = {"collection", "linalg", "ops", *LEAVES}
BELOW_SUBSPACE = {"store", "serve", "train", "adapters", *BELOW_STORE}
# what each room may import; a new room needs its line, and DESIGN's picture a thought
MAY_IMPORT = {
    "errors": set(),
    "_core": set(),
    "_default_device": set(),
    "_dispatch": {"errors"},
    "_native": {"_core", "_dispatch", "errors"},
    "_device": {"_dispatch", "errors"},
    "_cuda": GLUE,
    "triton_ops": GLUE,
    "ops": KERNELS,
    "linalg": {"ops", *LEAVES},
    # files are mapped by the core
    "adapters": {"_native", "errors"},
    "collection": {"linalg", "ops", "adapters.base", *LEAVES},
    "store": {"adapters", *BELOW_STORE},
    "serve": {"adapters", *BELOW_STORE},
    # an engine asks it for tasks of a store
    "serve.vllm": {"store", "adapters", *BELOW_STORE},
    "serve.vllm_cache": {"store", "adapters", *BELOW_STORE},
    "train": BELOW_STORE,
    "many": {"store", "adapters", *BELOW_STORE},
    "space": {"many", *BELOW_SUBSPACE},
    "subspace": {"many", "space", *BELOW_SUBSPACE},
    "cli": {"subspace", "loraspan", "many", *BELOW_SUBSPACE},
    "compat": {"subspace", "loraspan", "many", *BELOW_SUBSPACE},
    "__main__": {"cli"},
    "loraspan": {"subspace", *BELOW_SUBSPACE},
}
# the rest of the dependencies is small, or torch
HEAVY = {"sklearn", "matplotlib", "peft", "transformers", "huggingface_hub", "triton", "scipy", "pandas", "mlx", "vllm"}
# an estimator has to subclass scikit-learn's, and nobody imports this file who does not want that
ADAPTERS = {PACKAGE / "compat" / "sklearn.py": {"sklearn"}}

FILES = sorted([*PACKAGE.rglob("*.py"), *TRITON.rglob("*.py")])


def module_of(path):
    if path.is_relative_to(TRITON):
        path = Path("loraspan/triton_ops") / path.relative_to(TRITON)
    else:
        path = Path("loraspan") / path.relative_to(PACKAGE)
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts), parts[-1] == "__init__"


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_module(name):
    parts = name.split(".")[1:]
    if parts[:1] in (["_core"], ["triton_ops"]):
        return True
    path = PACKAGE.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").exists()


def imported(module, source, package=False):
    """Every module of ours that a module imports, anywhere in it, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + package]
                base = ".".join([*kept, base] if base else kept)
            names = [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "loraspan":
                yield name, node.lineno


def wrong_arrows(module, source, package=False):
    """What a module imports that its room may not, as ``line: from -> to``."""
    room = room_of(module)
    allowed = MAY_IMPORT.get(".".join(module.split(".")[1:3]), MAY_IMPORT[room])
    wrong = []
    for name, line in imported(module, source, package):
        parts = name.split(".")
        targets = {room_of(name), ".".join(parts[1:3])}
        if room != room_of(name) and not targets & allowed:
            wrong.append(f"line {line}: {module} -> {name}")
    return wrong


def heavy_at_the_top(source):
    """Heavy libraries that are imported when the module is, as ``line: name``."""
    found = []

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        found.extend(f"line {node.lineno}: {name}" for name in names if name.split(".")[0] in HEAVY)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module, package = module_of(path)
    assert room_of(module) in MAY_IMPORT, f"{room_of(module)} is a new room: say in MAY_IMPORT what it may import"
    assert not wrong_arrows(module, path.read_text(), package)


@pytest.mark.parametrize(
    "path", [p for p in FILES if not p.is_relative_to(TRITON)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    own = ADAPTERS.get(path, set())
    assert not [found for found in heavy_at_the_top(path.read_text()) if found.split(": ")[1].split(".")[0] not in own]


def test_the_files_are_found():
    """An empty list would pass all of the above."""
    names = {module_of(path)[0] for path in FILES}
    assert {"loraspan", "loraspan.ops.gram", "loraspan.collection.columns", "loraspan.triton_ops"} <= names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loraspan.ops.gram", "from loraspan.linalg import eig"),
        ("loraspan.ops.gram", "from loraspan import linalg, _core"),
        ("loraspan.ops.gram", "def f():\n    import loraspan.collection.columns"),
        ("loraspan.ops.gram", "from ..store import writer"),
        ("loraspan.errors", "from loraspan._native import threads"),
        ("loraspan.collection.fit", "from loraspan.adapters.peft import read"),
        ("loraspan.collection.fit", "from loraspan.adapters import base, peft"),
        ("loraspan.collection.fit", "if TYPE_CHECKING:\n    from loraspan.store import reader"),
        ("loraspan.store.reader", "from loraspan.serve import attach"),
        ("loraspan.adapters.peft", "from loraspan.ops import gram"),
        ("loraspan.cli.info", "from loraspan.compat import peft"),
        ("loraspan.subspace", "import loraspan.cli"),
        ("loraspan.store.reader", "import loraspan"),
    ],
)
def test_a_wrong_arrow_is_seen(module, source):
    assert len(wrong_arrows(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loraspan.ops.gram", "from loraspan import _core, _native\nfrom loraspan.ops.blocks import RowBlocks"),
        ("loraspan.ops.gram", "from . import blocks\nfrom .blocks import RowBlocks"),
        ("loraspan.collection.fit", "from loraspan.adapters.base import Slot\nfrom loraspan.adapters import base"),
        ("loraspan.subspace", "from loraspan.store import open_store\nimport torch"),
    ],
)
def test_a_right_arrow_is_left_alone(module, source):
    assert not wrong_arrows(module, source)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import sklearn.datasets", 1),
        ("try:\n    from triton import language\nexcept ImportError:\n    pass", 1),
        ("class A:\n    import peft", 1),
        ("def f():\n    import peft", 0),
        ("if TYPE_CHECKING:\n    import peft", 0),
        ("import torch", 0),
    ],
)
def test_a_heavy_import_is_seen(source, count):
    assert len(heavy_at_the_top(source)) == count


def test_importing_loraspan_imports_nothing_heavy():
    """Beyond what its own dependencies bring along."""
    code = "import sys, torch, numpy, safetensors, click; before = set(sys.modules); import loraspan, loraspan.cli; "
    code += "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(done.stdout.split())
    assert "loraspan" in new
    assert not new & HEAVY
