"""The CUDA kernels compiled by g++, and the option ``--emulate-cuda`` that lets them take CPU tensors in the tests.

    pytest --emulate-cuda tests/ops
    pytest --emulate-cuda --thread-order reverse tests/ops

``cuda/emulate.hpp`` says how; the kernels' own sources are not changed.
"""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from loraspan._cuda import library

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "cuda"
EMULATION = Path(__file__).parent / "cuda"
CACHE = ROOT / "build" / "emulation"
ORDERS = ("forward", "reverse", "random")
# -fno-gnu-unique: two libraries in one process, each with state of its own
FLAGS = ("-std=c++17", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")


def compiler():
    """g++, or what stands in its place; None where there is none."""
    return shutil.which("g++") or shutil.which("c++")


def sources():
    return sorted(path for path in KERNELS.glob("*.cu") if path.stem != "library")


def compile_object(source, place, *flags, headers=KERNELS):
    """Compile one source, CUDA's or the emulation's own."""
    kind = ("-x", "c++", "-DLORASPAN_EMULATED")
    command = [compiler(), *FLAGS, *flags, *kind, f"-I{headers}", f"-I{EMULATION}", "-c", str(source), "-o", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place


def build(folder):
    """Compile the emulated library into ``folder``, unless it is there already from the same sources."""
    read = sorted([*KERNELS.iterdir(), *EMULATION.iterdir(), Path(__file__)])
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in read if path.is_file())).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"libloraspan_cuda_emulated_{stamp}.so"
    if not place.exists():
        with tempfile.TemporaryDirectory() as made:
            objects = [
                str(compile_object(source, Path(made) / f"{source.stem}.o", "-O2"))
                for source in [*sources(), EMULATION / "emulate.cpp"]
            ]
            # moved when it is whole: another process may look for it
            subprocess.run([compiler(), "-shared", "-o", f"{made}/whole.so", *objects], check=True)
            shutil.copy(f"{made}/whole.so", place.with_suffix(".part"))
            place.with_suffix(".part").rename(place)
    return place


def opened(folder, order="forward"):
    """Give the emulated library with its threads in an order."""
    found = library.Library(build(folder))
    set_order(found, order)
    return found


def set_order(found, order):
    found._functions.loraspan_cuda_emulation_order(ORDERS.index(order))


def pytest_addoption(parser):
    group = parser.getgroup("loraspan")
    group.addoption("--emulate-cuda", action="store_true", help="run the CUDA kernels on the CPU, compiled by g++")
    group.addoption("--thread-order", choices=ORDERS, default="forward", help="of the threads of emulated kernels")


def pytest_configure(config):
    if config.getoption("--emulate-cuda"):
        found = opened(CACHE, config.getoption("--thread-order"))
        library.library = lambda: found
