"""Which backends must run on the machine at hand, so that not all can be skipped in silence; and who is chosen."""

import importlib
import platform
from pathlib import Path

import pytest
import torch

import oracles
from devices import interpreting
from loraspan import _core, _native
from loraspan._dispatch import Backend, choose
from loraspan.errors import BackendError
from loraspan.ops import combine, dense, gram, pack, power, reconstruct, sketch, sparse_sketch, squares, unpack
from loraspan.ops.joint_gram import joint_gram
from loraspan.ops.product import product
from loraspan.ops.short_svd import short_svd
from loraspan.ops.whiten import whiten_
from matrices import blocks, normal
from oracles import F64

SETS = ("baseline", "avx2", "avx512", "avx512bf16")
COMPILED = ("cpu", *(f"cpu:{name}" for name in SETS))
# what has kernels for a GPU as well
ON_A_GPU = {"gram", "combine", "sketch", "power", "reconstruct"}
# what each set asks of the processor beyond the set before it, as Linux names it
FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx512_bf16"},
}
X = torch.ones(3, 4)
Q = torch.ones(3, 1, dtype=F64)


def whitened(block, image, backend):
    assert whiten_(block, image, 1.0, backend=backend)
    return block


CALLS = {
    "gram": lambda backend: gram(X, backend=backend),
    "combine": lambda backend: combine(X, Q, backend=backend).v,
    "sketch": lambda backend: sketch(X, 2, backend=backend),
    "power": lambda backend: power(X, Q, backend=backend),
    "reconstruct": lambda backend: reconstruct(X, X.T, backend=backend),
    "squares": lambda backend: squares(X, backend=backend),
    "short_svd": lambda backend: short_svd(X.unsqueeze(0), torch.empty(1, 4, 1), backend=backend).values,
    "pack": lambda backend: unpack(pack(X, 4, backend=backend)),
    "unpack": lambda backend: unpack(pack(X, 4), backend=backend),
    "sparse_sketch": lambda backend: sparse_sketch(X, 4, backend=backend),
    "product": lambda backend: product(Q.T, Q, backend=backend),
    "joint_gram": lambda backend: joint_gram(Q.unsqueeze(0), Q.unsqueeze(0), Q[:1], backend=backend),
    "whiten": lambda backend: whitened(Q.clone(), Q, backend),
    "eigh": lambda backend: dense.eigh(Q @ Q.T, backend=backend).vectors,
    "svd": lambda backend: dense.svd(Q, backend=backend).u,
    "gram_root": lambda backend: dense.gram_root(Q.T @ Q, backend=backend).r,
}


# the tables that lie with another operator's, by module and name
TABLES = {
    "power": ("sketch", "POWER_BACKENDS"),
    "pack": ("packed", "PACK_BACKENDS"),
    "unpack": ("packed", "UNPACK_BACKENDS"),
    "eigh": ("dense", "EIGH_BACKENDS"),
    "svd": ("dense", "SVD_BACKENDS"),
    "gram_root": ("dense", "ROOT_BACKENDS"),
}


def must_run():
    """The instruction sets that this processor has, asked of the system and not of our own code."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ("baseline",)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("only Linux says in a file what an x86-64 processor can do")
    flags = set(next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split())
    found, needed = ["baseline"], set()
    for name in SETS[1:]:
        needed |= FLAGS[name]
        if needed <= flags:
            found.append(name)
    return tuple(found)


def table(operator):
    # loraspan.ops.gram is the function; its module has the table
    room, name = TABLES.get(operator, (operator, "BACKENDS"))
    return getattr(importlib.import_module(f"loraspan.ops.{room}"), name)


@pytest.mark.parametrize("operator", CALLS)
def test_every_operator_has_every_backend(operator):
    names = tuple(backend.name for backend in table(operator))
    assert (names[: len(COMPILED)], names[-1]) == (COMPILED, "reference")
    assert set(names[len(COMPILED) : -1]) == ({"cuda", "triton"} if operator in ON_A_GPU else set())


@pytest.mark.parametrize("operator", CALLS)
def test_what_the_processor_has_runs(operator):
    for name in ("cpu", *(f"cpu:{name}" for name in must_run()), "reference"):
        assert not CALLS[operator](name).isnan().any()


@pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=1 is not set: Triton's kernels do not run on the CPU")
@pytest.mark.parametrize("operator", sorted(ON_A_GPU))
def test_interpreted_kernels_run(operator):
    assert not CALLS[operator]("triton").isnan().any()


@pytest.mark.parametrize("operator", CALLS)
def test_what_it_has_not_is_refused_with_the_reason(operator):
    for name in set(SETS) - set(must_run()):
        with pytest.raises(BackendError, match=rf"^{operator}: backend 'cpu:{name}' refuses .* has no {name}$"):
            CALLS[operator](f"cpu:{name}")


def test_cpu_is_the_widest_set():
    assert must_run()[-1] == _native.BEST
    x, w = blocks(1, [5, 30], 300, "f32"), normal(2, 35, 9)
    named = f"cpu:{_native.BEST}"
    assert oracles.same_bits(gram(x, backend="cpu"), gram(x, backend=named))
    assert all(map(oracles.same_bits, combine(x, w, backend="cpu"), combine(x, w, backend=named)))
    assert oracles.same_bits(sketch(x, 9, backend="cpu"), sketch(x, 9, backend=named))
    assert oracles.same_bits(power(x, w, backend="cpu"), power(x, w, backend=named))
    assert oracles.same_bits(reconstruct(w, w.T, backend="cpu"), reconstruct(w, w.T, backend=named))


@pytest.mark.parametrize("operator", CALLS)
def test_none_takes_the_first(operator):
    assert torch.equal(CALLS[operator](None), CALLS[operator]("cpu"))


@pytest.mark.parametrize("operator", CALLS)
def test_an_unknown_backend_is_refused_with_those_there_are(operator):
    with pytest.raises(BackendError, match=f"^{operator}: no backend 'tpu'; it has 'cpu', .*'reference'$"):
        CALLS[operator]("tpu")


def test_the_core_knows_no_other_set():
    assert tuple(name for name, _, _ in _core.instruction_sets()) == SETS
    blocks_, jobs = _native.table([], 5), _native.table([], 4)
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        _core.gram(blocks_, jobs, _core.Precision.f32, 1, "sse9")


def test_the_first_that_does_not_refuse_is_chosen():
    found = (Backend("shy", int, lambda *_: "not today"), Backend("able", int, lambda *_: None))
    assert choose("op", found, None).name == "able"
    assert choose("op", found, "able").name == "able"
    with pytest.raises(BackendError, match=r"^op: backend 'shy' refuses this call: not today$"):
        choose("op", found, "shy")


@pytest.mark.parametrize("name", COMPILED[:2])
def test_compiled_kernels_refuse_what_is_not_in_cpu_memory(name):
    x = X.to("meta")
    calls = [
        lambda: gram(x, backend=name),
        lambda: combine(x, Q, backend=name),
        lambda: sketch(x, 2, backend=name),
        lambda: power(x, Q, backend=name),
        lambda: reconstruct(x, x.T, backend=name),
    ]
    for call in calls:
        with pytest.raises(BackendError, match=r"CPU memory, and .* on meta"):
            call()
