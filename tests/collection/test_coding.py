"""Streams of whole numbers: what goes in comes out, near the entropy, and what is no stream is refused."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import plain_coding
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraspan import _native
from loraspan.collection.coding import LARGEST, MOST, ROUNDED, Known, decode, encode, trellis
from loraspan.errors import FormatError

ISAS = [name for name, built, supported in _native.INSTRUCTION_SETS if built and supported]


@st.composite
def tables(draw):
    """Some tables of rows, each row with a range of its own; some are paths through the trellis."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for _ in range(draw(st.integers(0, 3))):
        rows, length = draw(st.integers(0, 9)), draw(st.integers(0, 70))
        dtype = np.dtype(draw(st.sampled_from([np.int8, np.int16])))
        most = [0, 1, 2, 3, 7, 8, 126, 127, *([128, 254, 255, 3000, 32511, 32512] if dtype == np.int16 else [])]
        ranges = draw(st.lists(st.sampled_from(most), min_size=rows, max_size=rows))
        limits = np.array(ranges, dtype=np.int64).reshape(-1, 1)
        table = rng.integers(-limits, limits + 1, (rows, length)).astype(dtype)
        paths = rng.random(rows) < draw(st.sampled_from([0, 0.5, 1]))
        most = ROUNDED[8 * dtype.itemsize]
        signs = rng.choice([-1, 1], (rows, 1))[paths]
        table[paths] = signs * rounded(table[paths].clip(-most, most) * rng.random((rows, 1))[paths])
        # places that differ from row to row as they do in no other
        table[:, rng.random(length) < draw(st.sampled_from([0, 0, 0.9]))] //= 50
        made.append(table)
    return made


@st.composite
def known_of(draw, made):
    """Weights that tell the lengths of rows, or nothing; tasks have some rows each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if not draw(st.booleans()):
        return []
    noise, steps = draw(st.sampled_from([0, 0.1, 80])), rng.lognormal(0, 2, 10)
    found = []
    for table in made:
        tasks = np.sort(rng.integers(0, 10, len(table))).astype(np.int32)
        lengths = np.linalg.norm(table.astype(float), axis=1) * steps[tasks] * rng.lognormal(0, noise, len(table))
        found.append(Known(lengths.clip(0, 1e38).astype(np.float32), tasks))
    return found


def rounded(rows, **isa):
    return trellis(torch.from_numpy(rows), **isa).numpy()


@given(data=st.data(), made=tables())
@settings(deadline=None, max_examples=150)
def test_what_goes_in_comes_out(data, made):
    known = data.draw(known_of(made))
    stream = encode(made, known)
    for table, back in zip(made, decode(stream, [table.shape for table in made], known), strict=True):
        assert back.dtype == table.dtype
        np.testing.assert_array_equal(back, table)
    assert sum(len(table) * max(table.shape[1], 1) for table in made) <= MOST * len(stream)


@given(data=st.data(), made=tables())
@settings(deadline=None, max_examples=60)
def test_a_stream_is_what_it_is_said_to_be(data, made):
    """Of the same bytes as one that is written a number at a time, from every instruction set; both read both."""
    known = data.draw(known_of(made))
    said = [(weights.tolist(), tasks.tolist()) for weights, tasks in known]
    plain = plain_coding.encode([table.tolist() for table in made], said)
    shapes = [table.shape for table in made]
    assert plain_coding.decode(plain, shapes, said) == [table.tolist() for table in made]
    for isa in ISAS:
        stream = encode(made, known, isa)
        assert stream[len(made) : -4] == plain
        for table, back in zip(made, decode(stream, shapes, known, isa), strict=True):
            np.testing.assert_array_equal(back, table)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_trellis_finds_the_cheapest_path(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.sampled_from([0.1, 0.5, 1, 3, 30, ROUNDED[8], ROUNDED[16]]))
    rows = rng.uniform(-size, size, (3, data.draw(st.integers(0, 40)))).astype(np.float32)
    rows[:, ::5] = data.draw(st.sampled_from([0, 1, -0.5, size, -size]))
    for isa in ISAS:
        assert rounded(rows, isa=isa).tolist() == [plain_coding.trellis(row.tolist()) for row in rows]


def test_a_long_row_is_a_path_too():
    """Costs are brought back before they leave 32 bits: no part of the row is rounded worse."""
    rows = np.random.default_rng(0).normal(0, 3, (1, 100_000)).astype(np.float32)
    made = rounded(rows)
    assert plain_coding.is_path(made[0].tolist())
    off = np.abs(made - rows).reshape(20, -1)
    assert (off.mean(1) < 1.1 * off.mean()).all()


@pytest.mark.parametrize("deviation", [1.0, 3.0, 8.0])
def test_a_trellis_takes_fewer_bits_at_the_same_error(deviation):
    """0.18 bits and more, against the entropy of normal entries rounded by themselves at any step."""
    rows = np.random.default_rng(0).normal(0, deviation, (100, 2000)).astype(np.float32)
    made = rounded(rows)
    weight = (made * rows).sum() / np.square(made, dtype=np.float32).sum()
    error = np.square(weight * made - rows).mean() / deviation**2
    rate = 8 * len(encode([made])) / made.size
    steps = np.linspace(0.9, 2.5, 161)
    alone = [np.round(rows / step) for step in steps]
    errors = [1 - (x * rows).sum() ** 2 / np.square(x).sum() / np.square(rows).sum() for x in alone]
    entropies = [entropy(x) / x.size for x in alone]
    assert rate < np.interp(error, errors, entropies) - 0.18


def entropy(numbers):
    _, counts = np.unique(numbers, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@pytest.mark.parametrize("most", [32512, 32511, 255, 254, 128, 127, 126, 8, 7, 3, 2, 1, 0])
@pytest.mark.parametrize("others", [0, 1])
def test_the_largest_are_kept(most, others):
    """Beside others that are small."""
    row = [most, -most, *[others] * 50, most, -most, 0, most]
    table = np.array([row], dtype=np.int8 if most < 128 else np.int16)
    np.testing.assert_array_equal(decode(encode([table]), [table.shape])[0], table)


@pytest.mark.parametrize("deviation", [0.3, 0.4, 1.0, 3.0, 20.0, 100.0, 5000.0])
def test_a_stream_is_near_the_entropy(deviation):
    """Within 1.5 per cent of the entropy of one row's distribution, sizes of rows included."""
    drawn = np.random.default_rng(0).normal(0, deviation, (200, 2000)).round()
    table = drawn.astype(np.int8 if deviation < 25 else np.int16)
    assert 0.99 * entropy(table) < 8 * len(encode([table])) < 1.015 * entropy(table)


def test_no_stream_takes_too_little():
    """Zeros are the cheapest numbers, and no number is free."""
    table = np.zeros((100, 1000), dtype=np.int8)
    assert 0.9 * MOST < table.size / len(encode([table])) < MOST


@given(made=tables(), data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_spoilt_stream_is_refused(made, data):
    stream = bytearray(encode(made))
    at = data.draw(st.integers(0, len(stream) - 1))
    if data.draw(st.booleans()):
        del stream[at:]
    else:
        stream[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError):
        decode(bytes(stream), [table.shape for table in made])


@given(made=tables(), data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_stream_of_other_hands_is_numbers_or_refused(made, data):
    """With the right checksum: nothing is read or written where it should not be, whatever the bytes are."""
    known = data.draw(known_of(made))
    stream = bytearray(encode(made, known))[:-4]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(len(made), max(len(stream) - 1, len(made))))
        stream[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    for isa in ISAS:
        try:
            found = decode(signed(bytes(stream)), [table.shape for table in made], known, isa)
        except FormatError:
            continue
        assert all((np.abs(each.astype(int)) <= LARGEST[8 * each.itemsize]).all() for each in found)


def signed(stream):
    return stream + zlib.crc32(stream).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s + b"x", "checksum of its bytes"),
        (lambda s: s[:-3], "checksum of its bytes"),
        (lambda s: signed(s[:-4] + b"x"), "end where its rows do"),
        (lambda s: signed(s[:-5]), "end where its rows do"),
        (lambda s: b"\x09" + s[1:], "8 or 16, the bits of numbers, for each of 1 tables"),
        (lambda _: signed(b"\x08" + bytes(20)), "end where its rows do"),
        (lambda _: b"\x08" + bytes(20), "checksum of its bytes"),
        (lambda _: b"\x08", "a byte for 90 numbers"),
        (lambda _: b"", "8 or 16"),
    ],
)
def test_what_is_no_stream_of_such_rows_is_refused(change, problem):
    table = np.random.default_rng(0).normal(0, 3, (5, 200)).round().astype(np.int8)
    with pytest.raises(FormatError, match=problem):
        decode(change(encode([table])), [table.shape])


def test_no_memory_is_taken_for_more_than_a_stream_can_hold():
    tracemalloc.start()
    for shape in ((10**6, 10**6), (10**9, 0)):
        with pytest.raises(FormatError, match="a byte for 90 numbers"):
            decode(signed(b"\x08" + bytes(1000)), [shape])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (16, 32512)])
def test_no_number_is_above_what_a_table_holds(bits, largest):
    """A stream that says so is right but for that."""
    row = [1, -largest, largest]
    assert decode(signed(bytes([bits]) + plain_coding.encode([[row]])), [(1, 3)])[0].tolist() == [row]
    for number in (largest + 1, -largest - 1):
        with pytest.raises(FormatError, match="numbers up to 127, or 32512 in tables of 16 bits"):
            decode(signed(bytes([bits]) + plain_coding.encode([[[1, number, 2]]])), [(1, 3)])
