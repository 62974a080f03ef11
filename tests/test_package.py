"""The package as it is installed: typed, small at the top, one OpenMP pool, a core that links no torch and no BLAS."""

import ast
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import loraspan
from loraspan import _core

PACKAGE = Path(__file__).parents[1] / "python" / "loraspan"
# DESIGN's public API: what else a user may want is one module down
PUBLIC = {"compress", "open", "attach", "bake", "Subspace", "Adapter", "LoraspanError", "__version__"}
ROOMS = {
    "adapters",
    "collection",
    "compat",
    "errors",
    "linalg",
    "many",
    "ops",
    "serve",
    "space",
    "store",
    "subspace",
    "train",
}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def stubs():
    return {
        node.name: node
        for node in ast.parse((PACKAGE / "_core.pyi").read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


def test_types_are_installed():
    installed = resources.files("loraspan")
    assert installed.joinpath("py.typed").is_file()
    assert installed.joinpath("_core.pyi").is_file()


def test_the_stub_lists_what_the_core_has():
    assert set(stubs()) == {name for name in vars(_core) if not name.startswith("__")}


def functions():
    """What can be called: functions by name, and how the classes that are no choices are made."""
    for name, node in stubs().items():
        if isinstance(node, ast.FunctionDef):
            yield name, getattr(_core, name), node
            continue
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef):
                yield f"{name}.{inner.name}", getattr(getattr(_core, name), inner.name), inner


@pytest.mark.parametrize("name", [name for name, _, _ in functions()])
def test_the_stub_names_the_arguments(name):
    function, node = {of: both for of, *both in functions()}[name]
    # pybind11 begins a docstring with the signature
    signature = function.__doc__.splitlines()[0]
    wanted = [argument.arg for argument in node.args.args]
    assert re.findall(r"(\w+): ", signature.split(" -> ")[0]) == wanted


@pytest.mark.parametrize("name", [name for name, node in stubs().items() if isinstance(node, ast.ClassDef)])
def test_the_stub_lists_the_choices(name):
    members = [node.targets[0].id for node in stubs()[name].body if isinstance(node, ast.Assign)]
    assert members == list(getattr(getattr(_core, name), "__members__", ()))


def test_the_top_of_the_package_is_small():
    public = {name for name in vars(loraspan) if not name.startswith("_")} - {"annotations", "TYPE_CHECKING"}
    modules = {name for name in public if isinstance(getattr(loraspan, name), type(sys))}
    # kernels for a GPU are there once a call has asked for them
    assert modules <= ROOMS | {"cli", "triton_ops"}
    assert public - modules <= PUBLIC
    names = set(getattr(loraspan, "__all__", ()))
    assert names <= PUBLIC | ROOMS
    for name in names:
        assert getattr(loraspan, name) is not None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists a process's libraries in a file")
def test_one_openmp_pool():
    """torch's threads are ours: one library of threads in the process after an operator ran, whatever its name."""
    code = """
import re, torch
from loraspan.ops import gram
torch.set_num_threads(2)
torch.ones(512, 512) @ torch.ones(512, 512)
gram(torch.ones(64, 9000), backend="cpu")
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(*(path for path in paths if re.search(r"/lib[gi]?omp[^/]*$", path)))
"""
    pools = run(code)
    assert len(pools) == 1, pools


def needed():
    """The libraries that the core asks the loader for."""
    if tool := shutil.which("readelf"):
        listing = subprocess.run([tool, "-d", _core.__file__], capture_output=True, text=True, check=True).stdout
        return re.findall(r"\(NEEDED\).*\[(.+)\]", listing)
    if tool := shutil.which("otool"):
        listing = subprocess.run([tool, "-L", _core.__file__], capture_output=True, text=True, check=True).stdout
        return re.findall(r"^\t(\S+)", listing, flags=re.MULTILINE)
    return pytest.skip("neither readelf nor otool is here to list the libraries")


def test_the_core_links_neither_torch_nor_a_blas():
    libraries = needed()
    assert any(re.search(r"libstdc\+\+|libc\+\+|libSystem|libc\.", name) for name in libraries), libraries
    assert not [name for name in libraries if re.search(r"torch|c10|blas|mkl|lapack|accelerate", name, re.IGNORECASE)]
    assert not [name for name in libraries if "python" in name.lower()]


def test_the_core_loads_without_torch():
    code = f"""
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("_core", {_core.__file__!r}, loader=ExtensionFileLoader("_core", {_core.__file__!r}))
core = module_from_spec(spec)
spec.loader.exec_module(core)
print("torch" in sys.modules, core.instruction_sets()[0][0])
"""
    assert run(code) == ["False", "baseline"]
