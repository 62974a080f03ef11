"""Matrices sent in chunks: sums within the bounds of the operators, two chunks at a time, waits where they are needed.

On a machine with a GPU the GPU is used; elsewhere shadows stand in for it (tests/shadow.py), with streams that are as
late as they may be (tests/lazy_cuda.py).
"""

import contextlib
import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lazy_cuda
import oracles
from lazy_cuda import REAL
from loraspan.ops import RowBlocks, combine_many, gram_many, places, power_many, sketch_many, stream
from loraspan.ops.packing import Packing, groups
from loraspan.ops.slots import CudaSlots, ahead
from loraspan.ops.stream import in_chunks
from matrices import KINDS, blocks, normal
from oracles import F16, F32, F64

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    with lazy_cuda.cuda(monkeypatch) as found:
        yield found


@pytest.fixture
def small(monkeypatch):
    """Chunks of a few hundred columns at most."""
    monkeypatch.setattr(stream, "DEVICE_BYTES", 2 * 17 * 128 * 4)


def batch():
    sizes = [([3, 9, 0, 5], 700), ([1], 5), ([40], 129), ([2, 2], 0), ([0], 9), ([16], 128), ([7], 1031)]
    kinds = [*KINDS] * 2
    return [blocks(i, rows, d, kind) for i, ((rows, d), kind) in enumerate(zip(sizes, kinds, strict=False))]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_sums_over_chunks_are_within_the_bounds_of_the_operators(cuda, precision):
    matrices = batch()
    sent = [RowBlocks(x).on(cuda.place) for x in matrices]
    stacked = [oracles.stack(x) for x in matrices]
    for exact, g in zip(stacked, gram_many(sent, precision=precision), strict=True):
        assert g.device == CPU
        assert torch.equal(g, g.T)
        oracles.assert_within(g, oracles.gram(exact), oracles.gram_bound(exact, precision))
    for exact, y in zip(stacked, sketch_many([(x, 130) for x in sent], seed=7, precision=precision), strict=True):
        omega = oracles.omega(exact.shape[1], 130, 7)
        oracles.assert_within(y, exact @ omega, oracles.sketch_bound(exact, 130, precision))
    weights = [normal(50 + i, len(exact), 4) for i, exact in enumerate(stacked)]
    found = power_many(list(zip(sent, weights, strict=True)), precision=precision)
    for exact, q, y in zip(stacked, map(oracles.to_numpy, weights), found, strict=True):
        oracles.assert_within(y, oracles.power(exact, q), oracles.power_bound(exact, q, precision))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
def test_rows_of_a_basis_come_chunk_by_chunk(cuda, dtype, products):
    matrices = batch()
    stacked = [oracles.stack(x) for x in matrices]
    weights = [normal(60 + i, len(exact), 5) for i, exact in enumerate(stacked)]
    pairs = [(RowBlocks(x).on(cuda.place), w) for x, w in zip(matrices, weights, strict=True)]
    places = [torch.zeros(5, x.columns, dtype=dtype).T if i % 2 else None for i, (x, _) in enumerate(pairs)]
    found = combine_many(pairs, dtype=dtype, products=products, out=places)
    for exact, w, place, (v, xv, vtv) in zip(stacked, map(oracles.to_numpy, weights), places, found, strict=True):
        assert place is None or v is place
        assert (v.device, v.dtype) == (CPU, dtype)
        oracles.assert_within(v, oracles.combine_v(exact, w), oracles.combine_v_bound(exact, w, dtype, "f32"))
        rounded = oracles.to_numpy(v)
        if products:
            oracles.assert_within(xv, exact @ rounded, oracles.product_bound(exact, rounded, "f32"))
        oracles.assert_within(vtv, oracles.gram(rounded.T), oracles.gram_bound(rounded.T, "f32"))
        assert torch.equal(vtv, vtv.T)


@given(
    sizes=st.lists(st.tuples(st.lists(st.integers(0, 19), min_size=1, max_size=3), st.integers(0, 900)), max_size=4),
    limit=st.integers(1, 1 << 15),
)
def test_every_column_goes_once_and_no_group_is_too_large(sizes, limit):
    matrices = [RowBlocks([torch.zeros(r, d, dtype=F16) for r in rows]) for rows, d in sizes]
    seen = [[] for _ in matrices]
    for group in groups(list(enumerate(matrices)), limit):
        held = 0
        for member, start, stop in group:
            seen[member].append((start, stop))
            held += (stop - start) * 2 * matrices[member].shape[0]
            assert start % 128 == 0 or stop - start < 128
        assert held <= limit or (len(group) == 1 and group[0].stop - group[0].start == 1)
    for x, spans in zip(matrices, seen, strict=True):
        assert spans[0][0] == 0
        assert spans[-1][1] == x.columns
        assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))


@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    kind=st.sampled_from([*KINDS]),
    layout=st.sampled_from(["row-major", "column-major", "strided", "repeated-row"]),
)
def test_what_is_packed_comes_out_again(rows, kind, layout):
    """In its order, its dtypes and, for kernels that load 16 bytes, at addresses that allow it."""
    x, y = RowBlocks(blocks(1, rows, 300, kind, layout)), RowBlocks(blocks(2, [4], 37, "bf16"))
    [spans] = groups([(0, x), (1, y)], 1 << 30)
    packing = Packing([(span, (x, y)[span.member]) for span in spans], CPU)
    memory = packing.pack(torch.empty(packing.size + 5, dtype=torch.uint8))
    chunks = packing.unpack({dtype: memory[at].view(dtype) for dtype, at in packing.regions.items()})
    for chunk, given_ in zip(chunks, (x, y), strict=True):
        assert [b.dtype for b in chunk.x.blocks] == [b.dtype for b in given_.blocks]
        for got, want in zip(chunk.x.blocks, given_.blocks, strict=True):
            assert torch.equal(got, want)
            assert (got.data_ptr() - memory.data_ptr()) % 256 == 0 or not got.numel()
    entries = sum(b.numel() * b.element_size() + 256 for m in (x, y) for b in m.blocks)
    assert packing.size <= entries


@pytest.mark.usefixtures("small")
def test_a_chunk_knows_where_it_begins(cuda):
    x = RowBlocks([normal(1, 9, 1000, dtype=F32)]).on(cuda.place)
    firsts = [chunk.x.first for chunks in in_chunks([x], wide=False) for chunk in chunks]
    assert firsts == sorted(set(firsts))
    assert len(firsts) > 2
    assert x.first == 0


@pytest.mark.skipif(REAL, reason="on a GPU the streams are its own")
@pytest.mark.usefixtures("small")
def test_copies_wait_for_work_and_work_for_copies(cuda):
    x = normal(2, 17, 5000, dtype=F32)
    matrix, start = RowBlocks([x]).on(cuda.place), 0
    for [chunk] in in_chunks([matrix], wide=False):
        # done once something waits for it, long after the next chunk was packed
        width = chunk.x.columns
        cuda.compare(chunk.x.blocks[0], x[:, start : start + width])
        start += width
    cuda.finish()
    assert start == 5000
    assert cuda.copies == -(-5000 // 128)
    assert cuda.current.done > cuda.copies
    assert cuda.wrong == 0


@pytest.mark.skipif(REAL, reason="on a GPU the streams are its own")
def test_two_buffers_of_the_stated_size(cuda, monkeypatch):
    monkeypatch.setattr(stream, "DEVICE_BYTES", 1 << 16)
    made = []
    monkeypatch.setattr(stream, "CudaSlots", lambda *of: made.append(CudaSlots(*of)) or made[0])
    for _ in in_chunks([RowBlocks([normal(3, 16, 5000, dtype=F32)]).on(cuda.place)], wide=False):
        pass
    assert sum(memory.numel() for memory in made[0].there) == 1 << 16
    assert all(memory.device == cuda.place for memory in made[0].there)


class Places:
    """Two places on the device, which note what is done with them."""

    def __init__(self):
        self.log = []
        self.sending = [threading.Event() for _ in range(5)]

    def send(self, slot, item):
        self.log.append(("send", slot, item))
        self.sending[item].set()
        if item == 3:
            raise OSError("the file is gone")

    def take(self, slot, item):
        return (slot, item)

    def done(self, slot):
        self.log.append(("done", slot))


def test_the_next_is_sent_while_one_is_in_use():
    places = Places()
    for slot, item in ahead([0, 1, 2], places):
        assert slot == item % 2
        assert item == 2 or places.sending[item + 1].wait(timeout=30), "nobody sends the next one meanwhile"
        assert not places.sending[item + 2].is_set(), "its place is still in use"
    assert places.log.index(("done", 0)) < places.log.index(("send", 0, 2))


def test_an_error_of_sending_comes_through():
    chunks = ahead([0, 1, 2, 3, 4], Places())
    with pytest.raises(OSError, match="the file is gone"):
        list(chunks)
    assert list(chunks) == []


def test_no_thread_but_that_of_the_caller_is_used():
    """Copies of another thread would have a team of cores of their own, in the way of the caller's."""
    before = threading.active_count()
    for _ in ahead([0, 1, 2], Places()):
        assert threading.active_count() == before


@pytest.mark.skipif(REAL, reason="on a GPU nobody counts copies")
def test_what_is_held_goes_there_once(cuda, monkeypatch):
    xs = [normal(70 + i, 9, 600, dtype=F32) for i in range(2)]
    sent = [RowBlocks([x]).on(cuda.place) for x in xs]
    apart = gram_many(sent), sketch_many([(x, 5) for x in sent], seed=3)
    copies = cuda.copies
    with stream.held(sent), stream.held(sent[:1]):
        together = gram_many(sent), sketch_many([(x, 5) for x in sent], seed=3)
        v = combine_many([(x, normal(80, 9, 4)) for x in sent], products=False)[1].v
        assert v.device == CPU
    assert cuda.copies == copies + 1
    assert all(x.held is None for x in sent)
    for ones, others in zip(apart, together, strict=True):
        assert all(map(torch.equal, ones, others))
    monkeypatch.setattr(stream, "DEVICE_BYTES", 2 * 2 * 9 * 600 * 4 - 2)
    with stream.held(sent):
        assert all(x.held is None for x in sent)


@pytest.mark.usefixtures("cuda")
def test_nothing_stays_held_after_an_error(cuda):
    sent = RowBlocks([normal(71, 9, 600, dtype=F32)]).on(cuda.place)
    leave = contextlib.ExitStack()
    leave.enter_context(stream.held([sent]))
    assert sent.held is not None
    assert not leave.__exit__(OSError, OSError("gone"), None)
    assert sent.held is None


@pytest.mark.parametrize("shape", [(3,), (300, 5), (5, 300), (2, 7, 11)])
def test_what_comes_back_through_small_buffers_is_the_same(cuda, monkeypatch, shape):
    monkeypatch.setattr(places, "_PLAIN_BYTES", 0)
    monkeypatch.setattr(places, "_STAGE_BYTES", 24 * 16)
    x = normal(72, *shape)
    for given_ in (x, x.mT if x.ndim > 1 else x):
        found = places.fetched(cuda.put(given_))
        assert torch.equal(found, given_)
        assert found.device == CPU
