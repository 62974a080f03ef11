"""``short_svd``: the bits of gram, eigh and combine one after the other, and their mathematics."""

import pytest
import torch

from loraspan.ops import combine, gram
from loraspan.ops.dense import eigh
from loraspan.ops.short_svd import short_svd
from matrices import normal, stored
from oracles import BF16, F16, F32, F64

SIZES = [(1, 1, 1, 1), (3, 5, 33, 2), (9, 17, 600, 17), (2, 100, 2500, 16), (20, 64, 130, 8)]


def one_by_one(member, k, dtype, backend):
    values, vectors = eigh(gram(member, backend=backend), backend=backend)
    w = vectors[:, :k]
    w = w * torch.where(w.gather(0, w.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    image = combine(member, w / values[:k].clamp(min=0).sqrt(), dtype=dtype, products=False, backend=backend)
    return values, w, image.v, image.vtv


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("count", "rows", "columns", "k"), SIZES)
def test_has_the_bits_of_its_parts(compiled, on_threads, count, rows, columns, k, dtype, turned):
    x = normal(31, count, columns, rows, dtype=dtype).mT if turned else normal(31, count, rows, columns, dtype=dtype)
    v = torch.empty(count, columns, k) if turned else torch.empty(count, k, columns).mT

    for threads in (1, 2, 5):
        found = on_threads(threads, lambda: short_svd(x, v.fill_(torch.nan), backend=compiled))

        for i, member in enumerate(x):
            values, w, image, vtv = one_by_one(member, k, F32, compiled)
            assert torch.equal(found.values[i], values)
            assert torch.equal(found.w[i], w)
            assert torch.equal(v[i], image)
            assert torch.equal(found.vtv[i], vtv)


@pytest.mark.parametrize("layout", ["row-major", "column-major", "strided", "strided-columns", "odd-offset"])
def test_decomposes(backend, layout):
    x = stored(normal(32, 6, 40), layout).to(F32).expand(3, 6, 40)
    v = torch.empty(3, 40, 4)

    found = short_svd(x, v, backend=backend)

    u, s, vh = torch.linalg.svd(x[0].double(), full_matrices=False)
    for i in range(3):
        torch.testing.assert_close(found.values[i], s.square(), rtol=1e-6, atol=1e-6 * float(s[0]) ** 2)
        torch.testing.assert_close(found.totals[i], s.square().sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            (found.w[i] * s[:4]) @ v[i].double().T, (u[:, :4] * s[:4]) @ vh[:4], rtol=0, atol=1e-4
        )
        torch.testing.assert_close(found.vtv[i], torch.eye(4, dtype=F64), rtol=0, atol=1e-5)
        assert (found.w[i].gather(0, found.w[i].abs().argmax(0, keepdim=True)) > 0).all()


def test_what_is_not_finite_shows_in_its_member_alone(compiled):
    x = normal(33, 3, 4, 50, dtype=F32)
    x[1, 2, 7] = float("inf")
    v = torch.empty(3, 50, 2)

    found = short_svd(x, v, backend=compiled)

    assert found.totals.isfinite().tolist() == [True, False, True]
    assert v.isfinite().all((1, 2)).tolist() == [True, False, True]
