"""One thread adds the sums of slabs as it goes, several when all are there: the same bits, however many fit a cache.

And however the groups of slabs that are added first are cut: two threads take whole groups of four, three take slabs.
"""

import pytest
import torch

from loraspan.ops import combine, gram, power, power_many


def rows_of(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# rows, columns and width: one group at a time, several at a time with some over, all at once; slabs of many chunks
SHAPES = [(700, 2600, 48), (300, 9100, 20), (90, 5000, 7), (40, 40_000, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
# float64 sums of float32 ones are often exact, in any order
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_sums_of_many_slabs(compiled, on_threads, shape, turned, precision):
    rows, columns, width = shape
    x = rows_of(columns, rows, 1).T if turned else rows_of(rows, columns, 1)
    w = rows_of(rows, width, 2).double()
    alone, *together = (
        on_threads(n, lambda: (*combine([x], w, precision=precision, backend=compiled),)) for n in (1, 2, 3)
    )
    for found in together:
        for one, other in zip(alone, found, strict=True):
            assert torch.equal(one, other)
    alone, *together = (on_threads(n, lambda: power([x], w, precision=precision, backend=compiled)) for n in (1, 2, 3))
    assert all(torch.equal(alone, found) for found in together)


@pytest.mark.parametrize("rows", [128, 16])
def test_a_gram_of_many_slabs(compiled, on_threads, rows):
    x = rows_of(rows, 140_000, 3)
    alone, together = (on_threads(n, lambda: gram([x], backend=compiled)) for n in (1, 3))
    assert torch.equal(alone, together)
    exact = x.double() @ x.double().T
    lengths = exact.diagonal().sqrt()
    assert ((alone - exact).abs() <= 3e-7 * lengths[:, None] * lengths).all()


def test_jobs_after_each_other_do_not_mix(compiled, on_threads):
    """A job of many slabs between jobs of one, in one batch."""
    sizes = [(5, 300), (500, 6000), (7, 200), (450, 3000)]
    jobs = [([rows_of(n, d, n)], rows_of(n, 24, n + 1).double()) for n, d in sizes]
    batch = on_threads(1, lambda: power_many(jobs, backend=compiled))
    for (x, w), found in zip(jobs, batch, strict=True):
        assert torch.equal(found, on_threads(3, lambda x=x, w=w: power(x, w, backend=compiled)))
