"""Streams of whole numbers: what goes in comes out, near the entropy, and what is no stream is refused."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraspan.collection.coding import KINDS, MOST, ROW, decode, encode
from loraspan.errors import FormatError


@st.composite
def tables(draw):
    """Some tables of rows, each row with a range of its own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for _ in range(draw(st.integers(0, 3))):
        rows, length = draw(st.integers(0, 9)), draw(st.integers(0, 70))
        dtype = np.dtype(draw(st.sampled_from([np.int8, np.int16])))
        most = [0, 1, 2, 3, 7, 8, 126, 127, *([128, 254, 255, 3000, 32511, 32512] if dtype == np.int16 else [])]
        ranges = draw(st.lists(st.sampled_from(most), min_size=rows, max_size=rows))
        limits = np.array(ranges, dtype=np.int64).reshape(-1, 1)
        made.append(rng.integers(-limits, limits + 1, (rows, length)).astype(dtype))
    return made


@given(made=tables())
@settings(deadline=None, max_examples=150)
def test_what_goes_in_comes_out(made):
    stream = encode(made)
    for table, back in zip(made, decode(stream, [table.shape for table in made]), strict=True):
        assert back.dtype == table.dtype
        np.testing.assert_array_equal(back, table)
    assert sum(table.size + ROW * len(table) for table in made) <= MOST * len(stream)


@pytest.mark.parametrize("most", [32512, 32511, 255, 254, 128, 127, 126, 8, 7, 3, 2, 1, 0])
@pytest.mark.parametrize("others", [0, 1])
def test_the_largest_of_a_kind_are_kept(most, others):
    """Beside others that are small: one number decides how many low bits its row has."""
    row = [most, -most, *[others] * 50, most, -most, 0, most]
    table = np.array([row], dtype=np.int8 if most < 128 else np.int16)
    np.testing.assert_array_equal(decode(encode([table]), [table.shape])[0], table)


@pytest.mark.parametrize("deviation", [0.4, 1.0, 3.0, 20.0, 100.0, 5000.0])
def test_a_stream_is_near_the_entropy(deviation):
    """Within 4 per cent of the entropy of one row's distribution, marks included."""
    drawn = np.random.default_rng(0).normal(0, deviation, (200, 2000)).round()
    table = drawn.astype(np.int8 if deviation < 25 else np.int16)
    _, counts = np.unique(table, return_counts=True)
    shares = counts / counts.sum()
    entropy = -(shares * np.log2(shares)).sum() * table.size / 8
    assert entropy < len(encode([table])) < 1.04 * entropy


@given(made=tables(), data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_spoilt_stream_gives_no_other_numbers(made, data):
    """It is refused, or the byte stood for nothing; the bits of a table may be others that hold its numbers too."""
    stream = bytearray(encode(made))
    at = data.draw(st.integers(0, len(stream) - 1))
    cut = data.draw(st.booleans())
    stream = (
        stream[:at] if cut else stream[:at] + bytes([stream[at] ^ data.draw(st.integers(1, 255))]) + stream[at + 1 :]
    )
    try:
        found = decode(bytes(stream), [table.shape for table in made])
    except FormatError:
        return
    assert not cut
    for table, back in zip(made, found, strict=True):
        np.testing.assert_array_equal(back, table)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s + b"x", "end where its rows do"),
        (lambda s: s[:-3], "as long as its rows|end where"),
        (lambda s: b"\x08\xff" + s[1:], "zlib stream"),
        (lambda s: b"\x09" + s[1:], "8 or 16, the bits of numbers, for each of 1 tables"),
        (lambda _: b"\x08" + deflated(b"\0\0" + b"y" * 5), "end where its rows do"),
        (lambda _: b"\x08" + deflated(b"\0\0"), "as long as its rows"),
        (lambda _: b"\x08", "as long as its rows"),
        (lambda _: b"", "8 or 16"),
    ],
)
def test_what_is_no_stream_of_such_rows_is_refused(change, problem):
    table = np.ones((2, 10), dtype=np.int8)
    with pytest.raises(FormatError, match=problem):
        decode(change(encode([table])), [table.shape])


def test_a_stream_that_unpacks_to_much_is_not_unpacked():
    """Bytes that would be a hundred megabytes, for rows of a thousand numbers."""
    bomb = b"\x08" + deflated(bytes(100_000_000))
    tracemalloc.start()
    with pytest.raises(FormatError, match="end where its rows do"):
        decode(bomb, [(10, 100)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_short_rows_take_little_more_than_what_indexes_them():
    """200,000 rows of one number, of a stream that is none: 25 bytes each, not an object each."""
    tracemalloc.start()
    with pytest.raises(FormatError, match="zlib stream"):
        decode(b"\x08\xff\xff", [(200_000, 1)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000 * 32


def test_no_byte_stands_for_a_number_above_127():
    marks = bytes([3 * 64])
    assert decode(b"\x08" + deflated(marks + b"\xff"), [(1, 1)])[0].min() >= -127
    assert [(2 * most + 1) ** many <= 256 for most, many in KINDS] == [True] * 4


@pytest.mark.parametrize(
    ("bits", "place", "high", "low", "number"),
    [(8, 18, 63, 1, 127), (8, 18, 64, 0, None), (16, 63, 127, 0, 32512), (16, 63, 127, 1, None)],
)
def test_low_bits_make_no_number_above_what_a_table_holds(bits, place, high, low, number):
    stream = bytes([bits]) + deflated(bytes([3 * 64 + place, high + 127, low]))
    if number is None:
        with pytest.raises(FormatError, match="numbers up to 127, or 32512 in tables of 16 bits"):
            decode(stream, [(1, 1)])
    else:
        assert decode(stream, [(1, 1)])[0].item() == number


def deflated(data):
    stream = zlib.compressobj(9, zlib.DEFLATED)
    return stream.compress(data) + stream.flush()
