"""The CUDA kernels under g++, fibers and sanitizers: right in three orders of threads, and wrong where a fault is put.

``pytest --emulate-cuda tests/ops`` runs all tests of the operators on them; this is the part that every run affords.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import emulation

OPERATORS = {
    "gram": ("gram",),
    "combine": ("combine", "gram"),
    "sketch": ("sketch",),
    "power": ("combine", "gram"),
    "reconstruct": ("reconstruct",),
    "shared_lora": ("shared_lora",),
    "many_rows": ("shared_lora",),
}
WAIT = "    wait_for_copies<kAhead - 1>();\n"
BARRIER = ("rows.cuh", f"{WAIT}    __syncthreads();", WAIT)
# per operator, faults by name: the file, what is there, and what is put in its place, in a copy
FAULTS = {
    "gram": {
        "no barrier between steps": BARRIER,
        "copies are not waited for": ("rows.cuh", WAIT, ""),
        "the pair in use is filled": ("rows.cuh", "fill(pairs.pair[last]", "fill(pairs.pair[now]"),
        "no mask on what is written": ("dots.cuh", "row >= job.left_rows || col >= job.right_rows || ", ""),
        "no mask on the rows that are read": ("rows.cuh", "if (r < high && c < wide) {", "if (c < wide) {"),
        "no mask on the columns that are read": ("rows.cuh", "if (r < high && c < wide) {", "if (r < high) {"),
        "the stride of a row is left out": ("rows.cuh", "(column + c) * row.stride", "(column + c)"),
        "a wrong stride between slabs": ("dots.cuh", "[slab * size + i]", "[slab * (size - 1) + i]"),
        "no barrier before sides are written over": (
            "dots.cuh",
            "first += kAtOnce) {\n    __syncthreads();",
            "first += kAtOnce) {",
        ),
        "no mask on rows that are copied aside": ("rows.cuh", "if (r < high && c < wide)\n", "if (c < wide)\n"),
        "float32 sums run on over all columns": ("dots.cuh", "summed == Policy::kFlush ||", ""),
    },
    "combine": {
        "no barrier between steps": BARRIER,
        "no mask on the vectors that are written": ("combine.cu", " && side + x + 16 * j < job.rank)", ")"),
        "a wrong stride between rows of W": ("combine.cu", "job.rank * std", "(job.rank + 1) * std"),
    },
    "sketch": {
        "no barrier after the draw": ("sketch.cu", "[threadIdx.x]);\n      __syncthreads();", "[threadIdx.x]);"),
        "no mask on the columns that are read": ("rows.cuh", "if (r < high && c < wide) {", "if (r < high) {"),
        "a wrong stride between draws": ("sketch.cu", "words.word[offset + k + i]", "words.word[k + i]"),
        "half of a Philox block is drawn twice": ("sketch.cu", "c % 128 != 0", "false"),
    },
    "reconstruct": {
        "no barrier between steps": BARRIER,
        "no mask on what is written": ("reconstruct.cu", "if (top + r < piece.rows && side + c < piece.columns)", ""),
        "a wrong stride between members": ("rows.cuh", "member * matrix.apart", "member"),
        "no mask on the rows of a group": ("reconstruct.cu", "if (row >= group.rows || col", "if (col"),
        "the first member's loadings serve all": (
            "reconstruct.cu",
            "member[group.first + (group.batch ? 0 : member)].loadings",
            "member[group.first].loadings",
        ),
        "the last columns are left out": ("reconstruct.cu", "static_cast<int>(rest)", "static_cast<int>(rest - 8)"),
    },
    "shared_lora": {
        "no barrier before warps' sums are read": (
            "shared_lora_shrink.cuh",
            "  __syncthreads();\n  for (int unit",
            "  for (int unit",
        ),
        "no barrier before g is read": (
            "shared_lora_expand.cuh",
            "  __syncthreads();\n  return wishes;",
            "  return wishes;",
        ),
        "no barrier within a warp": (
            "shared_lora_rows.cuh",
            "  __syncwarp();\n  for (std::int64_t k",
            "  for (std::int64_t k",
        ),
        "no mask on the outputs": ("shared_lora.cu", "if (output + i < call.outputs) put(", "put("),
        "no mask on the columns of V": ("shared_lora_shrink.cuh", "column + j >= call.rank_in || ", ""),
        "rows without a task are written": ("shared_lora.cu", " || wishes[r] == kLeave", ""),
        "a wrong stride between slabs": ("shared_lora_shrink.cuh", "(slab * call.rows + top + r)", "(slab + top + r)"),
        "half of a task's columns are left out": ("shared_lora_rows.cuh", "g[e] += other_lane(g[e], 8);", ""),
        "float32 is cut to 11 bits": ("fragments.cuh", "for (int order = 2; order", "for (int order = 0; order"),
    },
    "many_rows": {
        "no barrier between steps": (
            "shared_lora_many.cuh",
            "wait_for_copies<kStages - 2>();\n    __syncthreads();",
            "wait_for_copies<kStages - 2>();",
        ),
        "copies are not waited for": ("shared_lora_many.cuh", "wait_for_copies<kStages - 2>();", ""),
        "no mask on the rows of x": ("shared_lora_many.cuh", "line + i * kApart < rows && k + c", "k + c"),
        "no mask on the columns of x": ("shared_lora_many.cuh", " && k + c % 4 * 8 < call.inputs)", ")"),
        "no mask on the columns of V": ("shared_lora_many.cuh", "8 * c < columns && row + line", "row + line"),
        "turns of a slab are taken in another order": ("shared_lora_many.cuh", "if (turns > 1) {", "if (false) {"),
        "a slab's sums run on into the next": ("shared_lora_many.cuh", "        slab[j][e] = 0;\n", ""),
        "a row of V is read where another lies": ("shared_lora_many.cuh", "8 + 2 * i + lane % 2", "8 + 2 * i"),
        "bfloat16 keeps two parts of three": ("shared_lora_expand.cuh", "int p = 2; p >= 0", "int p = 1; p >= 0"),
        "rows of the upper half meet g of the lower": ("shared_lora_expand.cuh", "own_g + 16 * h * room.size", "own_g"),
    },
}

pytestmark = [
    pytest.mark.skipif(emulation.compiler() is None, reason="no g++ is here to compile the emulation"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers are preloaded as on Linux"),
]


def sources_of(operator, headers=emulation.KERNELS):
    return [*(headers / f"{name}.cu" for name in OPERATORS[operator]), emulation.EMULATION / "emulate.cpp"]


@pytest.fixture(scope="module")
def ask():
    """A process with the sanitizers beneath Python, which runs cases on the libraries that it is told."""
    preload = [emulation.runtime_of(name) for name in ("asan", "ubsan", "stdc++")]
    if None in preload:
        pytest.skip("the sanitizers' libraries are not beside the compiler")
    options = {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "cuda_cases.py"
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, **options},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(path, operator, order):
            process.stdin.write(f"{path} {operator} {order}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """All kernels with both sanitizers."""
    read = [*emulation.sources(), emulation.EMULATION / "emulate.cpp"]
    return emulation.link(read, tmp_path_factory.mktemp("cuda") / "sanitized.so", *emulation.SANITIZED)


@pytest.mark.parametrize("order", emulation.ORDERS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_order_of_threads_matters(ask, sanitized, operator, order):
    assert ask(sanitized, operator, order) == "ok"


@pytest.mark.parametrize(("operator", "name"), [(operator, name) for operator in FAULTS for name in FAULTS[operator]])
def test_a_fault_is_seen(ask, tmp_path, operator, name):
    file, there, instead = FAULTS[operator][name]
    for path in emulation.KERNELS.glob("*.cu*"):
        text = path.read_text()
        if path.name == file:
            assert there in text, f"{file} has changed: {there!r} is not in it"
            text = text.replace(there, instead)
        (tmp_path / path.name).write_text(text)
    read = sources_of(operator, tmp_path)
    library = emulation.link(read, tmp_path / "faulty.so", *emulation.FAULTY, headers=tmp_path)
    # the first order in which it is seen
    answers = (ask(library, operator, order) for order in emulation.ORDERS)
    seen = next((answer for answer in answers if answer != "ok"), None)
    assert seen is not None, f"nobody saw that {name}"
    assert seen, "the process that runs the cases is gone"
