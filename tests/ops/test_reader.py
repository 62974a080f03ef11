"""What the core reads of tensors through torch's table of C functions is what their attributes say."""

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan import _core, _native
from loraspan.errors import ShapeError
from loraspan.ops import Piece, RowBlocks, pack, reconstruct_many
from loraspan.ops.reconstruct import _Checked

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no table of C functions"
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_a_torch_that_has_the_table_is_read_through_it():
    assert isinstance(_native.READER, _core.TensorReader)


SIZES = st.integers(0, 4)


@st.composite
def matrices(draw, rows=SIZES, columns=SIZES):
    r, c = draw(rows), draw(columns)
    down, right = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    whole = torch.ones(r * down + 1, c * right + 1, dtype=draw(st.sampled_from(DTYPES)))
    made = whole[1 : 1 + r * down : down, 1 : 1 + c * right : right]
    kind = draw(st.sampled_from(["plain", "turned", "parameter", "with gradient", "repeated"]))
    if kind == "turned":
        return whole.T.contiguous().T[1 : 1 + r * down : down, 1 : 1 + c * right : right]
    if kind == "parameter":
        return torch.nn.Parameter(made)
    if kind == "with gradient":
        return made.clone().requires_grad_() * 2
    return made[:1].expand(r, c) if kind == "repeated" and r else made


@given(st.data())
def test_blocks_are_read_as_they_are_asked(data):
    columns = data.draw(SIZES)
    blocks = data.draw(st.lists(matrices(columns=st.just(columns)), min_size=1, max_size=4))
    read = RowBlocks(blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "READER", None)
        asked = RowBlocks(blocks)
    assert (read.shape, read.rows, read.dtypes, read.device, read.plain) == (
        (asked.shape, asked.rows, asked.dtypes, asked.device, asked.plain)
    )
    there = [i for i, rows in enumerate(read.rows) if rows and columns]
    assert (read.table[there] == asked.table[there]).all()
    assert (read.table[:, 1:] == asked.table[:, 1:]).all()


@given(st.data())
def test_pieces_are_read_as_they_are_asked(data):
    shared = data.draw(matrices())
    pieces = []
    for _ in range(data.draw(st.integers(0, 4))):
        basis = shared if data.draw(st.booleans()) else data.draw(matrices())
        inner = st.just(basis.shape[1])
        loadings = data.draw(st.none() | matrices(rows=inner))
        width = st.just((basis if loadings is None else loadings).shape[1])
        out = data.draw(matrices(rows=st.just(basis.shape[0]), columns=width))
        scale = data.draw(st.floats(allow_nan=False) | st.integers(-3, 3))
        pieces.append(Piece(basis, loadings, out, scale))
    read = _Checked(pieces)
    assert _native.READER.pieces(list(pieces)) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "READER", None)
        asked = _Checked(pieces)
    assert read.scales.tolist() == asked.scales.tolist()
    assert read.device is asked.device is None
    # where there is nothing to read, any address will do that is not none
    places = [0, 4, 8]
    for piece, one, other in zip(pieces, read.jobs, asked.jobs, strict=True):
        for part, place in zip(piece[:3], places, strict=True):
            if part is not None and not part.numel():
                assert one[place] > 0
                assert other[place] > 0
                one[place] = other[place]
    assert (read.jobs == asked.jobs).all()


def odd():
    """Tensors that memory does not say all about, and what no tensor is."""
    plain = torch.ones(2, 3)

    class Mine(torch.Tensor):
        pass

    return {
        "a subclass": plain.as_subclass(Mine),
        "lazily negated": torch._neg_view(plain),
        "sparse": plain.to_sparse(),
        "elsewhere": plain.to("meta"),
        "a vector": torch.ones(3),
        "of integers": torch.ones(2, 3, dtype=torch.int32),
        "complex": torch.ones(2, 3, dtype=torch.complex64),
        "of another width": torch.ones(2, 4),
        "a number": 3.0,
        "a packed matrix": pack(torch.ones(2, 3), 4),
    }


@pytest.mark.parametrize("kind", odd())
def test_what_is_out_of_the_ordinary_is_left_to_python(kind):
    plain, strange = torch.ones(2, 3), odd()[kind]
    assert _native.READER.blocks([plain, strange], 3) is None
    assert _native.READER.blocks([plain, plain], 3) is not None
    for piece in [(strange, None, plain, 1.0), (plain, strange, torch.ones(2, 2), 1.0), (plain, None, strange, 1.0)]:
        assert _native.READER.pieces([(plain, None, plain, 1.0), piece]) is None


def test_a_piece_that_is_none_is_left_to_python():
    plain = torch.ones(2, 3)
    for piece in [(plain, None, plain), (plain, None, plain, "1"), [plain, None, plain, 1.0], None]:
        assert _native.READER.pieces([piece]) is None


def test_a_subclass_is_computed_with():
    class Mine(torch.Tensor):
        pass

    out = torch.zeros(2, 3)
    reconstruct_many([Piece(torch.ones(2, 3).as_subclass(Mine), None, out, 2.0)])
    assert torch.equal(out, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("kind", ["lazily negated", "sparse"])
def test_what_has_no_such_memory_is_refused(kind):
    plain, strange = torch.ones(2, 3), odd()[kind]
    with pytest.raises(ShapeError, match=r"^reconstruct: tensors are dense and not lazily negated; got one of .* use "):
        reconstruct_many([Piece(strange, None, plain)])


@pytest.mark.parametrize(("major", "name"), [(2, "dlpack_exchange_api"), (1, "dltensor")])
def test_a_table_that_is_not_known_is_refused(major, name):
    table = (ctypes.c_uint32 * 64)(major)
    label = name.encode()
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    with pytest.raises(ValueError, match=r"version of DLPack|PyCapsule_GetPointer"):
        _core.TensorReader(make(ctypes.addressof(table), label, None), [torch.Tensor])
