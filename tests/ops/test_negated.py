"""Torch may negate lazily (the imaginary part of a conjugate): memory then does not say the values.

Such a tensor gives what its copy gives, or is refused by name; never the negative of a result.
"""

import pytest
import torch

from loraspan.errors import ShapeError
from loraspan.ops import (
    Piece,
    combine,
    dense,
    gram,
    pack,
    power,
    reconstruct,
    reconstruct_many,
    sketch,
    sparse_sketch,
    squares,
    unpack,
)
from loraspan.ops.product import product
from loraspan.ops.short_svd import short_svd

F64 = torch.float64


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def negated(t):
    """The same values, of which memory says the negative."""
    lazy = torch._neg_view(t.neg())
    assert lazy.is_neg()
    assert torch.equal(lazy, t)
    return lazy


SQUARE = values(4, 4, dtype=F64) @ values(4, 4, dtype=F64).T + 4 * torch.eye(4, dtype=F64)
CALLS = {
    "gram": (lambda x: gram(x), values(3, 5)),
    "combine, x": (lambda x: combine(x, values(3, 2, dtype=F64)).xv, values(3, 5)),
    "combine, w": (lambda w: combine(values(3, 5), w).v, values(3, 2, dtype=F64)),
    "sketch": (lambda x: sketch(x, 2), values(3, 5)),
    "power": (lambda q: power(values(3, 5), q), values(3, 2, dtype=F64)),
    "reconstruct, basis": (lambda b: reconstruct(b, values(2, 4)), values(5, 2)),
    "reconstruct, loadings": (lambda c: reconstruct(values(5, 2), c), values(2, 4)),
    "squares": (lambda x: squares(x), values(3, 5)),
    "sparse_sketch": (lambda x: sparse_sketch(x, 4), values(3, 5)),
    "short_svd": (lambda x: short_svd(x, torch.empty(1, 5, 2)).values, values(1, 3, 5)),
    "pack": (lambda x: unpack(pack(x, 4)), values(3, 64)),
    "product, a": (lambda a: product(a, values(3, 2, dtype=F64)), values(4, 3, dtype=F64)),
    "product, b": (lambda b: product(values(4, 3, dtype=F64), b), values(3, 2, dtype=F64)),
    "eigh": (lambda a: dense.eigh(a).values, SQUARE),
    "svd": (lambda a: dense.svd(a).u, values(5, 2, dtype=F64)),
    "gram_root": (lambda a: dense.gram_root(a).r, SQUARE),
}


# what reads factors and bases where they lie says so; small matrices are copied
REFUSED = {
    "gram",
    "combine, x",
    "sketch",
    "reconstruct, basis",
    "reconstruct, loadings",
    "squares",
    "sparse_sketch",
    "short_svd",
}


@pytest.mark.parametrize("call", sorted(REFUSED))
def test_a_negated_tensor_is_refused(call):
    run, given = CALLS[call]
    with pytest.raises(ShapeError, match=r"resolve_neg\(\)"):
        run(negated(given))


@pytest.mark.parametrize("call", sorted(CALLS.keys() - REFUSED))
def test_a_negated_tensor_gives_what_its_copy_gives(call):
    run, given = CALLS[call]
    assert torch.equal(run(negated(given)), run(given))


def test_a_negated_place():
    out = negated(values(5, 4))
    before = out.clone()
    with pytest.raises(ShapeError, match=r"^reconstruct: .*resolve_neg\(\)"):
        reconstruct_many([Piece(values(5, 2), values(2, 4), out)])
    assert torch.equal(out, before)
