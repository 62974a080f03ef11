"""RowBlocks: checked once, read where it lies, never copied."""

import numpy as np
import pytest
import torch

from devices import combine, gram, power, reconstruct, sketch
from loraspan.errors import ShapeError
from loraspan.ops import RowBlocks
from matrices import LAYOUTS, blocks, normal
from oracles import F32, F64

# in the order of the core's dtypes
CODES = ("f16", "bf16", "f32", "f64")


def test_it_says_its_sizes():
    x = RowBlocks(blocks(1, [3, 0, 5], 7, "mixed"))
    assert x.shape == (8, 7)
    assert x.rows == [3, 0, 5]
    assert x.columns == 7
    assert x.device == torch.device("cpu")


@pytest.mark.parametrize("count", [0, 5])
def test_no_blocks_need_their_columns(count):
    x = RowBlocks([], columns=count)
    assert x.shape == (0, count)
    assert x.table.shape == (0, 5)
    assert x.device is None
    with pytest.raises(ShapeError, match="RowBlocks: an empty list of blocks needs columns="):
        RowBlocks([])


def test_one_matrix_a_list_and_itself():
    block = torch.ones(2, 3)
    x = RowBlocks.of(block)
    assert RowBlocks.of(x) is x
    assert RowBlocks.of([block, block]).shape == (4, 3)
    assert x.blocks[0] is block


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CODES)
def test_the_table_points_into_the_tensors(layout, kind):
    members = blocks(2, [3, 17], 11, kind, layout)
    table = RowBlocks(members).table
    assert table.dtype == np.int64
    for row, block in zip(table, members, strict=True):
        assert row.tolist() == [block.data_ptr(), len(block), *block.stride(), CODES.index(kind)]


def test_it_reads_the_memory_as_it_is_at_the_call(backend):
    """Nothing is copied when the blocks are wrapped: what changes afterwards is what an operator sees."""
    block = torch.zeros(2, 3)
    x = RowBlocks([block])
    assert not gram(x, backend=backend).any()
    block.fill_(2)
    assert torch.equal(gram(x, backend=backend), torch.full((2, 2), 12.0, dtype=F64))


def test_no_operator_writes_to_its_input(backend):
    x = blocks(3, [3, 5], 40, "mixed")
    w = normal(4, 8, 3)
    before = [t.clone() for t in (*x, w)]
    gram(x, backend=backend)
    combine(x, w, backend=backend)
    sketch(x, 3, backend=backend)
    power(x, w, backend=backend)
    assert all(map(torch.equal, (*x, w), before))


def test_parameters_are_read_as_any_tensor(backend):
    """What trains is read without a graph, the same by every backend."""
    x, w = torch.nn.Parameter(normal(5, 4, 9, dtype=F32)), torch.nn.Parameter(normal(6, 4, 3))
    calls = (
        lambda x, _: gram(x, backend=backend),
        lambda x, w: combine(x, w, backend=backend).v,
        lambda x, _: sketch(x, 3, backend=backend),
        lambda x, w: power(x, w, backend=backend),
    )
    for call in calls:
        out = call(x, w)
        assert not out.requires_grad
        assert torch.equal(out, call(x.detach(), w.detach()))
    # but this one, which has a gradient
    rebuilt = reconstruct(x.T, w, backend=backend)
    assert rebuilt.requires_grad
    assert torch.equal(rebuilt, reconstruct(x.T.detach(), w.detach(), backend=backend))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([torch.ones(3)], r"blocks are \[rows, 3\] matrices; block 0 is \[3\]"),
        ([torch.ones(())], r"blocks are \[rows, 0\] matrices; block 0 is \[\]"),
        ([torch.ones(2, 3), torch.ones(2, 3, 1)], r"blocks are \[rows, 3\] matrices; block 1 is \[2, 3, 1\]"),
        ([torch.ones(2, 3), torch.ones(3, 2)], r"blocks are \[rows, 3\] matrices; block 1 is \[3, 2\]"),
        ([torch.ones(2, 3), torch.ones(2, 3).int()], "float16, bfloat16, float32 or float64; block 1 is torch.int32"),
        ([np.ones((2, 3))], r"blocks are dense torch tensors; block 0 is ndarray: use torch.as_tensor"),
        ("ab", "blocks are dense torch tensors; block 0 is str"),
        ([torch.ones(2, 3), torch.eye(3).to_sparse()], "block 1 is a torch.sparse_coo tensor"),
        ([torch.ones(2, 3, dtype=torch.cfloat).conj().imag], r"block 0 is a torch.strided tensor: .*resolve_neg"),
        ([torch.ones(2, 3), torch.ones(2, 3, device="meta")], "block 0 is on cpu, block 1 on meta"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(members, message):
    with pytest.raises(ShapeError, match=message):
        RowBlocks(members)


def test_columns_must_be_those_of_the_blocks():
    with pytest.raises(ShapeError, match=r"blocks are \[rows, 4\] matrices; block 0 is \[2, 3\]"):
        RowBlocks([torch.ones(2, 3)], columns=4)


def test_a_number_of_columns_of_any_kind_becomes_an_int():
    for given in (np.int64(3), 3.0):
        x = RowBlocks([torch.ones(2, 3)], given)
        assert (x.columns, type(x.columns)) == (3, int)
