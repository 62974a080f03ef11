"""shared_lora with packed bases and ends: the bits of unpacking first, gradients of rows, refusals."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from loraspan.errors import ArgumentError, BackendError, ShapeError
from loraspan.ops import Cores, Packed, pack, shared_lora, shared_lora_, unpack
from matrices import normal, packed
from oracles import BF16, DTYPES, F16, F32, F64
from task_cores import batch, expected, planted, random_tasks

SCALE = 0.3
# columns of each form (ss, sp, ps, pp) of six tasks: shared, none, ragged, each form alone, all of them
COUNTS = [(5, 0, 0, 0), (0, 0, 0, 0), (2, 1, 3, 2), (0, 4, 0, 0), (1, 0, 2, 0), (0, 0, 0, 3)]
NAMES = ("left", "left_private", "right", "right_private")
seeds = st.integers(0, 2**32 - 1)
# rows, n, d, k_out, k_in: one row, below, at and past a tile, longer than a slab, odd, one basis missing, nothing
# bits of what stands beside rows of so many
OTHERS = {16: 8, 8: 4, 4: 16}
SIZES = [
    pytest.param(1, 1, 1, 1, 1, id="scalars"),
    pytest.param(1, 300, 700, 64, 64, id="one-row"),
    pytest.param(8, 96, 512, 16, 32, id="a-tile"),
    pytest.param(65, 97, 1033, 33, 49, id="past-a-tile"),
    pytest.param(6, 40, 50, 0, 4, id="no-output-basis"),
    pytest.param(6, 40, 50, 4, 0, id="no-input-basis"),
    pytest.param(6, 40, 0, 4, 4, id="no-inputs"),
    pytest.param(6, 0, 40, 4, 4, id="no-outputs"),
    pytest.param(0, 9, 9, 3, 3, id="no-rows"),
]


@pytest.fixture(scope="module", params=["cpu", "cpu:baseline", "cpu:avx2", "cpu:avx512", "cpu:avx512bf16", "reference"])
def any_backend(request):
    """Each backend that reads packed rows; one that the processor lacks skips and says why."""
    try:
        pack(torch.ones(1, 1), 8, backend=request.param)
    except BackendError as refusal:
        pytest.skip(str(refusal))
    return request.param


def rebuilt(cores, ends):
    """The same tasks with other tables of ends, of which packed ones are held as such."""
    held = [t.codes if isinstance(t, Packed) else t for t in ends]
    packed = tuple(t if isinstance(t, Packed) else None for t in ends)
    weights = cores.weights.to(F64 if F64 in [t.dtype for t in held] else F32)
    return dataclasses.replace(cores, weights=weights, packed=packed, **dict(zip(NAMES, held, strict=True)))


def quantized(cores, bits):
    """Tables of ends in so many bits each, 0 for as they are; and the same tables unpacked."""
    tables = [getattr(cores, name) for name in NAMES]
    ends = [packed(t, b) if b else t for t, b in zip(tables, bits, strict=True)]
    plain = [unpack(t) if isinstance(t, Packed) else t for t in ends]
    return rebuilt(cores, ends), rebuilt(cores, [t.to(F64 if F64 in [p.dtype for p in plain] else F32) for t in plain])


def full(basis):
    return unpack(basis).T if isinstance(basis, Packed) else basis


def assert_as_unpacked(y, x, bases, both, tasks, **options):
    cores, plain = both
    found = shared_lora(y, x, *bases, cores, tasks, scale=SCALE, **options)
    wanted = shared_lora(y, x, *map(full, bases), plain, tasks, scale=SCALE, **options)
    assert oracles.same_bits(found, wanted)
    return found


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("rows", "n", "d", "k_out", "k_in"), SIZES)
def test_all_packed(any_backend, rows, n, d, k_out, k_in, bits, dtype):
    cores = planted(1, COUNTS, n, d, k_out, k_in, dense=[4] if k_in else [])
    y, x, v, u = batch(2, rows, n, d, k_out, k_in, dtype)
    bases = packed(v.T, bits), packed(u.T, OTHERS[bits])
    both = quantized(cores, (bits, OTHERS[bits], OTHERS[bits], bits))
    assert_as_unpacked(y, x, bases, both, random_tasks(3, rows, 1, 6)[:, 0], backend=any_backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", range(6), ids=["v", "u", *NAMES])
def test_any_one_of_them(any_backend, which, dtype):
    """Beside tables of any dtype; and within the bound of what is packed, by the oracle."""
    cores = planted(4, COUNTS, 37, 650, 9, 5, dtype=dtype, dense=[0, 4])
    y, x, v, u = batch(5, 21, 37, 650, 9, 5, dtype)
    bases = [pack(b.T, 4) if which == i else b for i, b in enumerate((v, u))]
    both = quantized(cores, [8 if which == i else 0 for i in range(2, 6)])
    tasks, shares = random_tasks(6, 21, 3, 6), normal(7, 21, 3, dtype=F32)
    found = assert_as_unpacked(y, x, bases, both, tasks, shares=shares, backend=any_backend)
    wanted, bound = expected(y, x, full(bases[0]), full(bases[1]), both[1], tasks, shares, SCALE)
    oracles.assert_within(found, wanted, bound)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_task_with_many_rows(any_backend, bits):
    """So many that its own factors are rebuilt."""
    cores = planted(8, [(3, 2, 2, 2), (20, 0, 0, 0), (0, 2, 0, 2)], 700, 900, 16, 20, dense=[1])
    y, x, v, u = batch(9, 600, 700, 900, 16, 20)
    tasks = torch.tensor([0] * 200 + [1] * 200 + [2] * 198 + [-1, 0])
    bases = packed(v.T, bits), packed(u.T, bits)
    assert_as_unpacked(y, x, bases, quantized(cores, (bits,) * 4), tasks, backend=any_backend)


@given(
    counts=st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=1, max_size=5),
    sizes=st.tuples(st.integers(1, 40), st.integers(0, 150), st.integers(0, 700), *[st.integers(0, 20)] * 2),
    bits=st.tuples(*[st.sampled_from([16, 8, 4])] * 2, *[st.sampled_from([0, 16, 8, 4])] * 4),
    seed=seeds,
)
def test_threads_change_no_bit(compiled, on_threads, counts, sizes, bits, seed):
    rows, n, d, k_out, k_in = sizes
    cores = planted(seed, counts, n, d, k_out, k_in)
    y, x, v, u = batch(seed, *sizes, BF16)
    both, tasks = quantized(cores, bits[2:]), random_tasks(seed, rows, 2, len(counts))
    call = y, x, (packed(v.T, bits[0]), packed(u.T, bits[1])), both, tasks
    one = assert_as_unpacked(*call, backend=compiled)
    assert oracles.same_bits(one, on_threads(3, lambda: assert_as_unpacked(*call, backend=compiled)))


def test_again_and_in_place():
    """What is remembered of a call holds for the next one alone that has the same scales and bases."""
    cores = planted(10, COUNTS, 37, 130, 9, 5)
    y, x, v, u = batch(11, 21, 37, 130, 9, 5)
    both, tasks = quantized(cores, (8, 8, 4, 4)), random_tasks(12, 21, 1, 6)[:, 0]
    for basis in (pack(v.T, 8), pack(2 * v.T, 8)):
        bases = (basis, pack(u.T, 4))
        for _ in range(2):
            out = assert_as_unpacked(y, x, bases, both, tasks)
        again = y.clone()
        assert shared_lora_(again, x, *bases, both[0], tasks, scale=SCALE) is again
        assert oracles.same_bits(again, out)


@pytest.mark.parametrize("packed", ["bases", "ends", "both"])
@pytest.mark.parametrize("form", [0, 3], ids=["one-task", "mixture"])
def test_gradient_of_the_rows(any_backend, packed, form):
    cores = planted(13, COUNTS, 37, 130, 9, 5, dense=[4])
    y, x, v, u = batch(14, 21, 37, 130, 9, 5)
    bases = (pack(v.T, 8), pack(u.T, 4)) if packed != "ends" else (v, u)
    both = quantized(cores, (4, 8, 8, 4)) if packed != "bases" else (cores, cores)
    tasks = random_tasks(15, 21, form, 6) if form else random_tasks(15, 21, 1, 6)[:, 0]
    shares = normal(16, 21, form, dtype=F32) if form else None
    gradients = []
    for v_, u_, cores_ in ((*bases, both[0]), (*map(full, bases), both[1])):
        rows, base = x.clone().requires_grad_(), y.clone().requires_grad_()
        options = {"shares": shares, "scale": SCALE, "backend": any_backend}
        out = shared_lora(base, rows, v_, u_, cores_, tasks, **options)
        assert oracles.same_bits(out, shared_lora(y, x, v_, u_, cores_, tasks, **options))
        (out * normal(17, 21, 37, dtype=F32)).sum().backward()
        gradients.append((rows.grad, base.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert oracles.same_bits(ours, theirs)
    assert gradients[0][0].abs().max() > 0


def small():
    cores = planted(18, COUNTS, 8, 6, 4, 3)
    y, x, v, u = batch(19, 5, 8, 6, 4, 3)
    return y, x, pack(v.T, 8), pack(u.T, 8), quantized(cores, (8, 8, 4, 4))[0], torch.tensor([0, 2, 3, -1, 5])


def test_gradients_of_columns_are_refused_by_name():
    y, x, v, u, cores, tasks = small()
    trained = dataclasses.replace(cores, weights=cores.weights.clone().requires_grad_())
    with pytest.raises(ArgumentError, match=r"gradients of y and x alone; cores\.weights requires one"):
        shared_lora(y, x, v, u, trained, tasks)
    shares = torch.ones(5, requires_grad=True)
    with pytest.raises(ArgumentError, match="gradients of y and x alone; shares requires one"):
        shared_lora(y, x, v, u, cores, tasks, shares=shares)
    with pytest.raises(ArgumentError, match="bases v and u are frozen"):
        shared_lora(y, x, v, unpack(u).T.clone().requires_grad_(), cores, tasks)
    with pytest.raises(ArgumentError, match=r"^shared_lora_: the form in place has no gradient"):
        shared_lora_(y, x.requires_grad_(), v, u, cores, tasks)


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("which", range(3))
def test_kernels_for_a_gpu_refuse_packed_rows(name, which):
    y, x, v, u, cores, tasks = small()
    plain = planted(18, COUNTS, 8, 6, 4, 3)
    call = [(v, full(u), plain), (full(v), u, plain), (full(v), full(u), cores)][which]
    with pytest.raises(BackendError, match=rf"^shared_lora: backend '{name}' .* it reads no packed rows$"):
        shared_lora(y, x, *call, tasks, backend=name)


def test_compiled_code_runs_it_as_it_stands_or_says_why_not():
    y, x, v, u, cores, tasks = small()

    def call(rows):
        return shared_lora(y, rows, v, u, cores, tasks)

    assert oracles.same_bits(torch.compile(call, backend="eager")(x), call(x))
    torch.compiler.reset()
    with pytest.raises(Exception, match="packed bases and ends are not for compiled graphs"):
        torch.compile(call, backend="eager", fullgraph=True)(x)


def test_what_does_not_fit_is_refused():
    y, x, v, u, cores, tasks = small()
    with pytest.raises(ShapeError, match=r"have to fit; got \[5, 8\], \[5, 6\], \[8, 4\], \[6, 3\]"):
        shared_lora(y, x, u, v, cores, tasks)
    with pytest.raises(ShapeError, match=r"cores.left has 4 columns and needs 2, for v \[6, 3\] and u \[8, 2\]"):
        shared_lora(y, x, v, u.rows(0, 2), cores, tasks)
    with pytest.raises(ShapeError, match=r"on one device; v is torch.float32 on meta"):
        shared_lora(y, x, v.to("meta"), u, cores, tasks)
    with pytest.raises(ArgumentError, match=r"tasks are -1 for none .* row 1 has \[6\]"):
        shared_lora(y, x, v, u, cores, torch.tensor([0, 6, 0, 0, 0]))


def test_cores_of_packed_ends():
    none, two = pack(torch.empty(0, 5), 8), pack(torch.ones(2, 3), 4)
    cores = Cores.of([[1, 0, 0, 0]] * 2, torch.ones(2), two, none, two, none)
    assert cores.is_packed
    assert cores.packed == (two, none, two, none) == cores.ends
    assert cores.weights.dtype == F32
    mixed = Cores.of([[1, 0, 0, 0]] * 2, torch.ones(2), two, torch.empty(0, 5).double(), two, none)
    assert (mixed.packed[1], mixed.weights.dtype) == (None, F64)
    with pytest.raises(ShapeError, match=r"by counts, left is \[3, .\], on the device of left, cpu; got packed rows"):
        Cores.of([[1, 0, 0, 0]] * 3, torch.ones(3), two, none, two, none)
    with pytest.raises(ShapeError, match=r"one dtype .* right_private is torch.float16 on cpu, left packed on cpu"):
        Cores.of([[1, 0, 0, 0]] * 2, torch.ones(2), two, torch.empty(0, 5), two, torch.empty(0, 5).half())
