"""What the CUDA backend says where it cannot run, and how rows are told that may be read by 16 bytes."""

import pytest
import torch

from loraspan import _native
from loraspan._cuda import library, rows
from loraspan.errors import BackendError
from loraspan.ops import RowBlocks, combine_many, gram, gram_many, power, reconstruct, sketch


class Emulated:
    """A library that runs here; no call gets as far as to a kernel."""

    emulated = True

    def refuses(self):
        return None


def test_a_build_without_kernels_says_so(monkeypatch):
    monkeypatch.setattr(library, "library", lambda: None)
    with pytest.raises(BackendError, match=r"^gram: .* this build has no CUDA kernels, since nvcc was not found"):
        gram(torch.ones(2, 2), backend="cuda")


def test_tensors_elsewhere_are_refused(monkeypatch):
    monkeypatch.setattr(library, "library", Emulated)
    basis = torch.ones(2, 2, device="meta")
    with pytest.raises(BackendError, match=r"^reconstruct: .* it reads CPU memory, and a tensor is on meta$"):
        reconstruct(basis, basis, backend="cuda")


class Recorded:
    """A library for a GPU that is not there: it notes what it is asked to launch, and launches nothing."""

    emulated = False

    def __init__(self):
        self.launched = []

    def refuses(self):
        return None

    def call(self, operator, *_):
        self.launched.append(operator)


def test_matrices_without_blocks_launch_nothing(monkeypatch):
    """They lie on no device: a kernel would be given addresses of the CPU."""
    found = Recorded()
    monkeypatch.setattr(library, "library", lambda: found)
    x, w, cuda = RowBlocks([], columns=5), torch.empty(0, 3, dtype=torch.float64), {"backend": "cuda"}
    assert [g.shape for g in gram_many([x, x], **cuda)] == [(0, 0)] * 2
    assert sketch(x, 4, **cuda).shape == (0, 4)
    assert power(x, w, **cuda).shape == (0, 3)
    place = torch.full((5, 3), float("nan"))
    for out in (None, place):
        for products in (True, False):
            [one] = combine_many([(x, w)], products=products, out=[out], **cuda)
            assert out is None or one.v is out
            assert torch.equal(one.v, torch.zeros(5, 3))
            assert one.xv.shape == (0, 3)
            assert torch.equal(one.vtv, torch.zeros(3, 3, dtype=torch.float64))
    assert found.launched == []


# blocks of float16: shape, as stored, and how they are to be read
BLOCKS = [
    (lambda: torch.zeros(5, 16), rows.EIGHTS),
    (lambda: torch.zeros(5, 24)[:, 8:], rows.EIGHTS),
    (lambda: torch.zeros(5, 24)[:, 1:17], rows.ALONG_COLUMNS),
    (lambda: torch.zeros(5, 20)[:, :16], rows.ALONG_COLUMNS),
    (lambda: torch.zeros(5, 15), rows.ALONG_COLUMNS),
    (lambda: torch.zeros(1, 40)[:, 8:24], rows.EIGHTS),
    (lambda: torch.zeros(15, 8).T, rows.EIGHTS_ACROSS),
    (lambda: torch.zeros(15, 24)[:, 8:24].T, rows.EIGHTS_ACROSS),
    (lambda: torch.zeros(15, 24)[:, 1:17].T, rows.ALONG_ROWS),
    (lambda: torch.zeros(15, 12)[:, :8].T, rows.ALONG_ROWS),
    (lambda: torch.zeros(15, 7).T, rows.ALONG_ROWS),
    (lambda: torch.zeros(30, 16)[::2, ::2], rows.ALONG_COLUMNS),
]


@pytest.mark.parametrize(("block", "how"), BLOCKS)
def test_rows_are_read_by_16_bytes_only_where_all_are_aligned(block, how):
    x = RowBlocks([as_half(block())])
    assert rows.reading(x.table, x.columns) == how
    [(address, height, stride, step, _)] = x.table.tolist()
    assert rows.reading_of_one(address, height, stride, step, 2, x.columns) == how


def as_half(block):
    """The same storage, of half precision."""
    memory = torch.zeros(block.untyped_storage().nbytes() // 4, dtype=torch.float16)
    return memory.as_strided(block.shape, block.stride(), block.storage_offset())


def test_one_block_that_is_not_aligned_decides_for_all():
    even, odd = torch.zeros(3, 16).half(), torch.zeros(49).half()[1:].view(3, 16)
    assert rows.reading(RowBlocks([even, odd]).table, 16) == rows.ALONG_COLUMNS
    assert rows.reading(RowBlocks([even, even]).table, 16) == rows.EIGHTS


def test_a_table_has_every_row_of_every_block():
    blocks = [torch.zeros(3, 5), torch.zeros(0, 5), torch.zeros(5, 2).double().T]
    x = RowBlocks(blocks)
    wanted = [
        (
            block.data_ptr() + i * block.stride(0) * block.element_size(),
            block.stride(1),
            _native.DTYPE_CODES[block.dtype],
        )
        for block in blocks
        for i in range(len(block))
    ]
    assert rows.of_blocks(x.table).tolist() == [list(row) for row in wanted]
