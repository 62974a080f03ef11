"""nvcc on every CUDA source for every target: no spills, registers and shared memory within what blocks count on."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import emulation
from loraspan._cuda import library

NVCC = shutil.which("nvcc")
TARGETS = ("80", "90a", "100")
SOURCES = [path.stem for path in emulation.sources()]
# __launch_bounds__(256, 2): two blocks share the 65536 registers of a multiprocessor
REGISTERS = 128
# what a block may have without asking; two of them fit on every card
SHARED = 48 * 1024
# kernels in each source, and those of them whose products are to be those of tensor cores in bfloat16 and in float16
KERNELS = {
    "gram": (8, 2, 2),
    "combine": (12, 0, 0),
    "sketch": (7, 2, 2),
    "reconstruct": (9, 2, 2),
    "shared_lora": (13, 5, 2),
}
# of all kernels of a source for a target, where ptxas (of CUDA 13.0) spills against all arrangement: the second launch
# of shared_lora of many rows, to some 25 of its registers, that of float32 to 3, and its first to 17 for sm_100
SPILLED = {("shared_lora", "80"): 408, ("shared_lora", "90a"): 500, ("shared_lora", "100"): 804}

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc is here; the CUDA kernels are left out of the build")


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{request.param.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know compute capability {request.param}")
    return request.param


@pytest.fixture(scope="module", params=SOURCES)
def compiled(request, target, tmp_path_factory):
    """The name of a source, its resource report and its PTX; kept for the next run, as nvcc takes seconds for each."""
    name = request.param
    read = [emulation.KERNELS / f"{name}.cu", *sorted(emulation.KERNELS.glob("*.cuh"))]
    version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
    stamp = hashlib.sha256(b"".join([version, *(path.read_bytes() for path in read)])).hexdigest()[:16]
    place = emulation.CACHE / f"{name}_sm{target}_{stamp}.json"
    if not place.exists():
        found = report_and_ptx(name, target, tmp_path_factory.mktemp("nvcc"))
        with emulation.made_whole(place) as part:
            part.write_text(json.dumps(found))
    return name, *json.loads(place.read_text())


def report_and_ptx(name, target, folder):
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", f"-arch=sm_{target}", "-Werror=all-warnings", "-cubin"]
    command += [
        "-keep",
        "-keep-dir",
        str(folder),
        "-o",
        str(folder / "out.cubin"),
        str(emulation.KERNELS / f"{name}.cu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, (folder / f"{name}.ptx").read_text()


def kernels(report):
    """Registers, bytes spilled and bytes of shared memory of each kernel that ptxas lists."""
    pattern = r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers(.*)"
    found = re.findall(pattern, report)
    return [
        (int(registers), int(stores) + int(loads), int((re.search(r"(\d+) bytes smem", rest) or [0, 0])[1]))
        for stores, loads, registers, rest in found
    ]


def test_nothing_spills_and_two_blocks_fit(compiled, target):
    name, report, _ = compiled
    found = kernels(report)
    assert len(found) == KERNELS[name][0], report
    assert sum(spilled for _, spilled, _ in found) <= SPILLED.get((name, target), 0), report
    for registers, _, shared in found:
        assert registers <= REGISTERS, report
        assert shared <= SHARED, report


def test_half_precision_goes_to_tensor_cores(compiled):
    """Each of the two dtypes by its own instruction, in the kernels that are for it and in no other."""
    name, _, ptx = compiled
    bodies = re.split(r"^\.visible \.entry |^\.entry ", ptx, flags=re.MULTILINE)[1:]
    assert len(bodies) == KERNELS[name][0]
    kinds = [set(re.findall(r"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.f32\.(b?f16)\.", body)) for body in bodies]
    _, brains, halves = KERNELS[name]
    assert sorted(map(sorted, filter(None, kinds))) == brains * [["bf16"]] + halves * [["f16"]]


def test_16_bytes_are_loaded_at_once(compiled):
    name, _, ptx = compiled
    assert re.search(r"ld\.global(\.nc)?\.v4", ptx), name


def test_copies_go_aside_while_tiles_are_multiplied(compiled):
    name, _, ptx = compiled
    assert "cp.async.cg.shared.global" in ptx, name


def test_the_library_loads_without_a_driver(tmp_path):
    """And says in words what is missing, where something is."""
    place = tmp_path / "library.so"
    command = [NVCC, "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-o", str(place)]
    subprocess.run([*command, str(emulation.KERNELS / "library.cu")], check=True)
    found = library.Library(place)
    assert not found.emulated
    if Path("/dev/nvidiactl").exists():
        pytest.skip("a driver is here")
    assert re.match(r"CUDA finds no device: .+ \(error \d+\)$", found.refuses())
