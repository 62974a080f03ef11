"""Every Triton kernel, dtype and configuration compiled for every target, with no GPU: registers, spills, memory."""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process, and compiles nothing"
)

# by name: the target, the shared memory that one block may have there, the column of the configuration tables
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024, "any"),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024, "sm90"),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024, "sm90"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024, "hip"),
}
TENSOR_CORES = {"sm_80": r"\bmma\.sync", "sm_90": r"\bwgmma\.mma|\bmma\.sync", "sm_100": r"\btcgen05\.mma|\bmma\.sync"}
# a load of 16 bytes to registers, or straight to shared memory
VECTORS = r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg\.shared\.global [^;]*, 0x10"
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def all_builds():
    if os.environ.get("TRITON_INTERPRET") == "1":
        return []
    from loraspan.triton_ops.builds import builds

    return [
        pytest.param(build, target, id=f"{target}-{build.name}")
        for target, (_, _, architecture) in TARGETS.items()
        for build in builds(architecture)
    ]


def compiled(build, target):
    options = dict(build.options)
    asked = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    names = [parameter.name for parameter in build.kernel.params]
    types = {name: "constexpr" if name in options else build.types[name] for name in names}
    # what the launchers hand over: torch's memory begins at multiples of 16 bytes
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    constants = {(names.index(name),): value for name, value in options.items()}
    return triton.compile(ASTSource(build.kernel, types, constants, aligned), target=target, options=asked)


def resources(kernel, folder):
    """Registers and bytes of stack, as cuobjdump reads them in the binary."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [NVIDIA / "cuobjdump", "--dump-resource-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}


@pytest.mark.parametrize(("build", "target"), all_builds())
def test_fits_the_target(build, target, tmp_path):
    machine, shared, _ = TARGETS[target]
    kernel = compiled(build, machine)
    assert kernel.metadata.shared <= shared
    if machine.backend == "hip":
        code = kernel.asm["amdgcn"]
        counts = dict(re.findall(r"\.(vgpr_spill_count|vgpr_count|private_segment_fixed_size):\s*(\d+)", code))
        # scalars that do not fit go to lanes of a vector register, not to memory
        assert (counts["vgpr_spill_count"], counts["private_segment_fixed_size"]) == ("0", "0")
        assert 0 < int(counts["vgpr_count"]) <= 512
        # 64 lanes to a wavefront: 8 bytes each where a tile has no more
        assert not build.vectors or re.search(r"(global|buffer)_load_dwordx[24]", code)
        assert not build.tensor_cores or "v_mfma" in code
        return
    used = resources(kernel, tmp_path)
    # spills and arrays that the compiler could not keep in registers both lie on the stack
    assert used["STACK"] == 0
    assert 0 < used["REG"] <= 255
    assert kernel.metadata.num_warps * 32 * used["REG"] <= 65536
    code = kernel.asm["ptx"]
    assert not build.vectors or re.search(VECTORS, code)
    assert bool(re.search(TENSOR_CORES[target], code)) == build.tensor_cores
    # an atomic addition would make sums depend on the run
    assert not re.search(r"\b(atom|red)\.\S*add", code)


@pytest.mark.parametrize("architecture", sorted({column for _, _, column in TARGETS.values()}))
def test_every_configuration_is_compiled(architecture):
    from loraspan.triton_ops import products, reconstruct, shared_lora, transposed
    from loraspan.triton_ops.builds import builds

    made = list(builds(architecture))
    for kernel, tiles in (
        ("products_kernel", products.TILES),
        ("transposed_kernel", transposed.TILES),
        ("piece_kernel", reconstruct.TILES),
        ("shrink_kernel", shared_lora.TILES),
        ("expand_kernel", shared_lora.EXPANSIONS),
    ):
        rows = {key: tile for key, tile in tiles.items() if key[-1] in ("any", architecture, True, False)}
        replaced = {(*key[:-1], "any") for key in rows if key[-1] == architecture}
        wanted = {tile for key, tile in rows.items() if key not in replaced or architecture == "any"}
        fields = next(iter(wanted))._fields
        own = [build.options for build in made if build.kernel.__name__ == kernel]
        assert {tuple(options[field] for field in fields) for options in own} == wanted


def test_every_kernel_is_compiled():
    import loraspan.triton_ops
    from loraspan.triton_ops.builds import builds

    text = "".join(path.read_text() for path in Path(loraspan.triton_ops.__file__).parent.glob("*.py"))
    named = set(re.findall(r"^def (\w+_kernel)\(", text, flags=re.MULTILINE))
    assert named == {build.kernel.__name__ for build in builds("any")}
