"""The CUDA kernels compiled by g++, and the option ``--emulate-cuda`` that lets them take CPU tensors in the tests.

    pytest --emulate-cuda tests/ops
    pytest --emulate-cuda --thread-order reverse tests/ops

``cuda/emulate.hpp`` says how; the kernels' own sources are not changed.
"""

import hashlib
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

from loraspan._cuda import library

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "cuda"
EMULATION = Path(__file__).parent / "cuda"
CACHE = ROOT / "build" / "emulation"
ORDERS = ("forward", "reverse", "random")
# -fno-gnu-unique: two libraries in one process, each with state of its own
FLAGS = ("-std=c++17", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# faults are many: compiled as fast as can be, and what they leave unused is not said
FAULTY = ("-O0", "-w", "-fsanitize=address")


def compiler():
    """g++, or what stands in its place; None where there is none."""
    return shutil.which("g++") or shutil.which("c++")


def sources():
    return sorted(path for path in KERNELS.glob("*.cu") if path.stem != "library")


def compile_object(source, *flags, headers=KERNELS):
    """Compile one source, CUDA's or the emulation's own, unless the same was compiled before with the same flags."""
    read = [source, *sorted(headers.glob("*.cuh")), *sorted(EMULATION.glob("*.hpp"))]
    stamp = hashlib.sha256(b"".join([path.read_bytes() for path in read] + [repr(flags).encode()])).hexdigest()[:16]
    place = CACHE / f"{source.stem}_{stamp}.o"
    if not place.exists():
        kind = ("-x", "c++", "-DLORASPAN_EMULATED", f"-I{headers}", f"-I{EMULATION}")
        with made_whole(place) as part:
            command = [compiler(), *FLAGS, *flags, *kind, "-c", str(source), "-o", str(part)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    return place


@contextmanager
def made_whole(place):
    """Give a name to write to, which becomes ``place`` at the end: another process may look for it meanwhile."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{os.getpid()}_{place.name}")
    yield part
    part.rename(place)


def link(read, place, *flags, headers=KERNELS):
    """Compile sources, one after the other, and make them one library."""
    objects = [str(compile_object(source, *flags, headers=headers)) for source in read]
    with made_whole(place) as part:
        subprocess.run([compiler(), "-shared", *flags, "-o", str(part), *objects], check=True)
    return place


def runtime_of(name):
    """Give the path of a library of the compiler's, or None."""
    asked = [compiler(), f"-print-file-name=lib{name}.so"]
    found = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    return str(found) if found.is_absolute() else None


def build():
    """Compile the emulated library, unless it is there already from the same sources."""
    objects = [compile_object(source, "-O2") for source in [*sources(), EMULATION / "emulate.cpp"]]
    stamp = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
    place = CACHE / f"libloraspan_cuda_emulated_{stamp}.so"
    return place if place.exists() else link([*sources(), EMULATION / "emulate.cpp"], place, "-O2")


def opened(order="forward"):
    """Give the emulated library with its threads in an order."""
    found = library.Library(build())
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
        found = opened(config.getoption("--thread-order"))
        library.library = lambda: found
