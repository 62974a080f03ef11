"""The result that every decomposition gives, and the signs of its vectors."""

import pytest
import torch

from loraspan.linalg import SVD
from loraspan.linalg.svd import column_signs, fix_signs
from oracles import F32, F64


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_signs_by_the_first_of_the_largest(dtype, turned):
    u = torch.tensor([[[1.0, -2.0, 0.0, -1.0], [-3.0, 2.0, 0.0, 0.5], [3.0, -2.0, 0.0, 1.0]]], dtype=dtype)
    u = u.mT.contiguous().mT if turned else u
    assert column_signs(u).tolist() == [[-1.0, -1.0, 1.0, -1.0]]
    v = torch.ones(1, 2, 4)
    fixed, other = fix_signs(u, v)
    assert torch.equal(fixed, u * column_signs(u)[:, None])
    assert other[0, 0].tolist() == [-1.0, -1.0, 1.0, -1.0]
    assert column_signs(u[:, :0]).tolist() == [[1.0] * 4]
    assert column_signs(u[:0]).shape == (0, 4)


def test_rank_counts_what_is_not_zero():
    s = torch.tensor([[3.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    batch = SVD(torch.zeros(3, 4, 2), s, torch.zeros(3, 2, 5), torch.zeros(3))
    assert batch.rank.tolist() == [2, 1, 0]
    one = SVD(*(x[1] for x in batch))
    assert one.rank == 1
    assert type(one.rank) is int
