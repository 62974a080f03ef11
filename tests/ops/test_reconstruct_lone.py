"""reconstruct of a product that shares its basis with no other, or writes over it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from devices import Piece, reconstruct, reconstruct_many
from matrices import LAYOUTS, normal, stored
from oracles import DTYPES, F32

SCALE = 0.3
dtypes = st.sampled_from(DTYPES)


@given(
    m=st.integers(0, 150),
    k=st.integers(0, 40),
    n=st.integers(1, 40),
    dtype=dtypes,
    out=dtypes,
    layouts=st.tuples(*[st.sampled_from(LAYOUTS[:5])] * 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_sharing_a_basis_changes_no_bit(compiled, m, k, n, dtype, out, layouts, seed):
    """What is alone with its basis is summed in a way of its own."""
    basis = stored(normal(seed, m, k, dtype=dtype), layouts[0])
    loadings = [normal(seed + i, k, n, dtype=F32) for i in (1, 2)]

    def made():
        places = [stored(torch.full((m, n), float("nan"), dtype=out), layouts[1]) for _ in loadings]
        return [Piece(basis, weights, place, SCALE) for weights, place in zip(loadings, places, strict=True)]

    together, alone = made(), made()
    reconstruct_many(together, backend=compiled)
    for one, other in zip(together, alone, strict=True):
        reconstruct_many([other], backend=compiled)
        assert oracles.same_bits(one.out, other.out)


@pytest.mark.parametrize("n", [5, 16, 31])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_written_over(compiled, dtype, n):
    basis, loadings = normal(1, 1031, n, dtype=dtype), normal(2, n, n, dtype=dtype)
    apart = reconstruct(basis, loadings, scale=SCALE, backend=compiled)
    reconstruct_many([Piece(basis, loadings, basis, SCALE)], backend=compiled)
    assert oracles.same_bits(basis, apart)
