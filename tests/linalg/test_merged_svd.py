"""merged_svd: the SVD of a weighted sum of products, as one product of concatenated factors; what PEFT does densely."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loraspan.errors import ArgumentError, NotFiniteError, ShapeError
from loraspan.linalg import factored_svd, merged_svd
from matrices import LAYOUTS, normal, stored
from oracles import BF16, F16, F32, F64, UNIT_ROUNDOFF
from triplets import judge, same_triplets

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 30)
lora_ranks = st.lists(st.integers(0, 9), min_size=1, max_size=4)
DTYPES = (F32, F16, BF16, F32)


def family(seed, n, ranks, d, dtypes=DTYPES):
    """Factors of one product a rank, and weights of both signs."""
    bs = [normal(seed + 2 * i, n, r, dtype=dtypes[i % len(dtypes)]) for i, r in enumerate(ranks)]
    as_ = [normal(seed + 2 * i + 1, r, d, dtype=dtypes[(i + 1) % len(dtypes)]) for i, r in enumerate(ranks)]
    return bs, as_, [0.3 * (i + 1) * (-1) ** i for i in range(len(ranks))]


@given(n=sizes, ranks=lora_ranks, d=sizes, seed=seeds, kinds=st.sampled_from([DTYPES, (F64,), (F16, F64)]))
def test_is_the_svd_of_the_sum(n, ranks, d, seed, kinds):
    """The sum of the ranks below, at and above the sides."""
    bs, as_, weights = family(seed, n, ranks, d, kinds)
    judge(merged_svd(bs, as_, weights), bs, as_, weights)
    judge(merged_svd(bs, as_, weights, 3), bs, as_, weights, 3)


@pytest.mark.parametrize("dims", [(40, 60), (60, 9), (9, 60), (1, 1)], ids=str)
def test_every_backend(backend, dims):
    bs, as_, weights = family(3, dims[0], [5, 3, 8], dims[1])
    judge(merged_svd(bs, as_, weights, backend=backend), bs, as_, weights)


@given(n=sizes, ranks=lora_ranks, d=sizes, seed=seeds, order=st.randoms(use_true_random=False))
def test_the_order_does_not_matter(n, ranks, d, seed, order):
    bs, as_, weights = family(seed, n, ranks, d)
    found = merged_svd(bs, as_, weights)
    shuffled = list(zip(bs, as_, weights, strict=True))
    order.shuffle(shuffled)
    other = merged_svd(*map(list, zip(*shuffled, strict=True)))
    assert found.rank == other.rank
    size = float(found.s[0]) if found.rank else 0.0
    slack = 8 * max(1, sum(ranks)) * UNIT_ROUNDOFF[F32] * size
    assert (
        torch.linalg.matrix_norm(((found.u * found.s) @ found.vh) - ((other.u * other.s) @ other.vh)) <= 4 * slack * n
    )
    assert float((found.s - other.s).norm()) <= slack


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_one_is_a_factored_svd(dtype):
    b, a = normal(1, 20, 4, dtype=dtype), normal(2, 4, 30, dtype=dtype)
    assert same_triplets(merged_svd([b], [a], [0.3]), factored_svd(b, a, scale=0.3))
    assert same_triplets(merged_svd([b], [a]), factored_svd(b, a))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_adapters_of_one_frozen_a(dtype):
    """Their rows repeat exactly, or up to a little training: the rank is that of one, or the little is kept."""
    bs, (a,) = [normal(i, 50, 6, dtype=dtype) for i in range(3)], [normal(9, 6, 40, dtype=dtype)]
    weights = [0.5, 0.3, 0.7]
    found = merged_svd(bs, [a, a, a], weights)
    assert found.rank == 6
    judge(found, bs, [a, a, a], weights)
    for little in (1e-4, 1e-6, 1e-9):
        trained = [a + little * normal(20 + i, 6, 40, dtype=dtype) for i in range(3)]
        found = merged_svd(bs, trained, weights)
        # float32 rounds the least of them away in nearly all entries
        assert found.rank == 18 or (dtype == F32 and little < 1e-7 and found.rank >= 6)
        judge(found, bs, trained, weights)


@given(n=sizes, ranks=lora_ranks, d=sizes, seed=seeds, power=st.floats(-12, 0), dtype=st.sampled_from([F32, F64]))
def test_nearly_equal_adapters_of_all_sizes(n, ranks, d, seed, power, dtype):
    """Rows that nearly repeat lose no digits, on whichever side and however long they are."""
    shared = normal(seed, 9, d)
    bs = [normal(seed + i, n, r) * 10.0 ** (i - 1) for i, r in enumerate(ranks)]
    as_ = [shared[:r] + 10**power * normal(seed + 9 + i, r, d) for i, r in enumerate(ranks)]
    bs, as_ = [b.to(dtype) for b in bs], [a.to(dtype) for a in as_]
    weights = [0.3 * (i + 1) for i in range(len(ranks))]
    judge(merged_svd(bs, as_, weights), bs, as_, weights)
    judge(merged_svd([a.T for a in as_], [b.T for b in bs], weights), [a.T for a in as_], [b.T for b in bs], weights)


@pytest.mark.parametrize("rows", [20, 5])
def test_what_cancels_is_gone(rows):
    b, a = normal(1, rows, 4, dtype=F16), normal(2, 4, 30, dtype=F16)
    assert merged_svd([b, b], [a, a], [0.3, -0.3]).rank == 0
    # 5e-17 is left of these weights
    assert merged_svd([b, b, b], [a, a, a], [0.1, 0.2, -0.3]).rank == 0
    assert merged_svd([b, b], [a, a], [0.0, 0.0]).rank == 0
    assert merged_svd([b[:, :0]], [a[:0]]).vh.shape == (0, 30)


@pytest.mark.parametrize("dims", [(25, 35), (6, 35)], ids=str)
def test_a_batch_is_its_members(dims):
    bs, as_, weights = family(5, dims[0], [4, 4, 3], dims[1])
    bs = [torch.stack([b, 0 * b, b.flip(0), b]) for b in bs]
    as_ = [torch.stack([a, a, a, a.flip(1)]) for a in as_]
    together = merged_svd(
        [b.view(2, 2, *b.shape[1:]) for b in bs], [a.view(2, 2, *a.shape[1:]) for a in as_], weights, 5
    )
    assert together.rank.tolist() == [[5, 0], [5, 5]]
    for i in range(4):
        alone = merged_svd([b[i] for b in bs], [a[i] for a in as_], weights, 5)
        k = alone.rank
        u, s, vh, discarded = (x[i // 2, i % 2] for x in together)
        assert same_triplets(alone, (u[:, :k], s[:k], vh[:k], discarded))
    assert merged_svd([b[:0] for b in bs], [a[:0] for a in as_], weights).s.shape == (0, min(11, *dims))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_storage_and_any_number_of_threads(layout, on_threads):
    bs, as_, weights = family(8, 700, [4, 7], 900)
    found = on_threads(1, lambda: merged_svd(bs, as_, weights))
    if layout != "repeated-row":
        again = on_threads(3, lambda: merged_svd(*([stored(x, layout) for x in side] for side in (bs, as_)), weights))
        assert same_triplets(found, again)
    judge(merged_svd([stored(b, layout) for b in bs], as_, weights), [stored(b, layout) for b in bs], as_, weights)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(24, 20, bias=False)

    def forward(self, x):
        return self.proj(x)


def test_is_what_peft_merges_densely():
    """``add_weighted_adapter`` forms every dW, adds them and decomposes the sum."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    configs = {"one": (3, 6), "two": (5, 4), "three": (2, 3)}
    names, weights = list(configs), [0.7, -0.4, 0.5]
    for rank, alpha in configs.values():
        assert alpha / rank not in (1.0, 0.5)
    first, *others = (
        peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["proj"], init_lora_weights=False)
        for r, alpha in configs.values()
    )
    model = peft.get_peft_model(Tiny(), first, adapter_name="one")
    for name, config in zip(names[1:], others, strict=True):
        model.add_adapter(name, config)
    model.add_weighted_adapter(names, weights, "merged", combination_type="svd", svd_rank=4)
    layer = model.base_model.model.proj
    theirs = layer.get_delta_weight("merged").detach()

    bs = [layer.lora_B[name].weight for name in names]
    as_ = [layer.lora_A[name].weight for name in names]
    shares = [w * layer.scaling[name] for w, name in zip(weights, names, strict=True)]
    u, s, vh, discarded = merged_svd(bs, as_, shares, rank=4)

    assert s.shape == (4,)
    assert float(discarded) > 0
    # both cut the same sum at the same rank; theirs is summed and decomposed in float32
    slack = 8 * max(theirs.shape) * UNIT_ROUNDOFF[F32] * float(s[0])
    assert float(torch.linalg.matrix_norm((u * s) @ vh - theirs)) <= slack


@pytest.mark.parametrize(
    ("bs", "as_", "options", "error", "message"),
    [
        ([], [], {}, ArgumentError, "at least one matrix each"),
        ([torch.ones(3, 2)], [], {}, ArgumentError, "as many matrices; got 1 and 0"),
        (torch.ones(3, 2), [torch.ones(2, 4)], {}, ArgumentError, "b and a are lists of tensors; b is Tensor"),
        ([torch.ones(3, 2), torch.ones(4, 2)], [torch.ones(2, 4)] * 2, {}, ShapeError, r"one shape .*b\[1\] \[4, 2\]"),
        ([torch.ones(3, 2)] * 2, [torch.ones(2, 4), torch.ones(2, 5)], {}, ShapeError, r"one shape .*a\[1\] \[2, 5\]"),
        ([torch.ones(3, 2)] * 2, [torch.ones(2, 4), torch.ones(3, 4)], {}, ShapeError, r"b\[1\] .* a\[1\] .* one r"),
        ([torch.ones(3, 2)], [torch.ones(2, 4)], {"weights": [1.0, 2.0]}, ArgumentError, "weights is one number"),
        ([torch.ones(3, 2)], [torch.ones(2, 4)], {"weights": [float("inf")]}, ArgumentError, "weights is a finite"),
        ([torch.ones(3, 2)], [torch.ones(2, 4)], {"rank": -1}, ArgumentError, "rank is a whole number"),
        ([torch.ones(3, 2)], [torch.full((2, 4), float("nan"))], {}, NotFiniteError, r"a\[0\] holds a NaN"),
    ],
)
def test_what_does_not_fit_is_refused(bs, as_, options, error, message):
    with pytest.raises(error, match=f"merged_svd: .*{message}"):
        merged_svd(bs, as_, **options)
