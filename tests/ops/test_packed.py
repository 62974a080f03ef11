"""pack and unpack: the bound of every entry, scales that are never worse, the same bits from everyone, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from loraspan.errors import ArgumentError, BackendError, NotFiniteError, ShapeError
from loraspan.ops import Packed, pack, unpack
from matrices import LAYOUTS, normal, packed, stored
from oracles import BF16, DTYPES, F16, F32, F64

BLOCK = 64
LEVELS = np.array([-116, -89, -69, -53, -38, -25, -12, 0, 10, 21, 32, 45, 59, 75, 95, 127], dtype=float)
LENGTHS = (1, 63, 64, 65, 129, 1031)
seeds = st.integers(0, 2**32 - 1)
bit_widths = pytest.mark.parametrize("bits", [8, 4])
# nothing here is a power of two: ordinary, below what a normal float16 scale can say, and near its largest
MAGNITUDES = (0.03, 3e-5, 3e-9, 1.3e4)


@pytest.fixture(scope="module", params=["cpu", "cpu:baseline", "cpu:avx2", "cpu:avx512", "cpu:avx512bf16", "reference"])
def any_backend(request):
    """Each backend of this operator; one that the processor lacks skips and says why."""
    try:
        pack(torch.ones(1, 1), 8, backend=request.param)
    except BackendError as refusal:
        pytest.skip(str(refusal))
    return request.param


def magnitudes(seed, rows, length, magnitude, dtype):
    return (normal(seed, rows, length) * magnitude).clamp(-6e4, 6e4).to(dtype)


def in_blocks(values):
    """``[rows, blocks, 64]``, zeros behind the last entry."""
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % BLOCK)))
    return values.reshape(len(values), values.shape[1] // BLOCK, BLOCK)


def read(packed):
    """What is packed, entry by entry, from what the class says of itself."""
    codes, scales = packed.codes.numpy(), oracles.to_numpy(packed.scales)
    out = np.empty(packed.shape)
    for row, i in np.ndindex(*packed.shape):
        if packed.bits > 4:
            level = float(codes[row].view(np.int8 if packed.bits == 8 else np.int16)[i])
        else:
            level = LEVELS[(codes[row, i // 2] >> (4 if i % 2 else 0)) & 15]
        out[row, i] = level * scales[row, i // BLOCK] / 128
    return out


def assert_within_bound(packed, rows):
    x, got = in_blocks(oracles.to_numpy(rows)), in_blocks(oracles.to_numpy(unpack(packed, dtype=F64)))
    scale = np.abs(oracles.to_numpy(packed.scales))[..., None]
    if packed.bits == 8:
        bound = np.maximum(scale / 256, 2.0**-25)
    else:
        bound = np.maximum(scale / 8, np.abs(x) - 116 * scale / 128)
    # float64 is rounded to float32 first; ratios or errors are rounded to float32 once
    slack = 2 * oracles.UNIT_ROUNDOFF[F32] * (np.abs(x) + bound)
    assert (np.abs(got - x) <= bound + slack).all()


def assert_same(a, b):
    assert torch.equal(a.codes, b.codes)
    assert oracles.same_bits(a.scales, b.scales)


@bit_widths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_entry_is_within_its_bound(any_backend, bits, dtype, magnitude, length):
    rows = magnitudes(length, 3, length, magnitude, dtype)
    packed = pack(rows, bits, backend=any_backend)
    assert packed.shape == (3, length)
    assert packed.nbytes == 3 * (-(-length * bits // 8) + 2 * -(-length // BLOCK))
    assert_within_bound(packed, rows)


@bit_widths
@pytest.mark.parametrize("length", LENGTHS)
def test_means_what_it_says(any_backend, bits, length):
    assert_reads(pack(magnitudes(1, 2, length, 0.3, F32), bits, backend=any_backend), any_backend)


@pytest.mark.parametrize("length", LENGTHS)
def test_sixteen_bits_mean_what_they_say(any_backend, length):
    """Entries are rounded to float32 first: numbers of 16 bits times scales of 11 are more than that holds."""
    assert_reads(packed(magnitudes(1, 3, length, 0.3, F32), 16), any_backend)


def assert_reads(packed, any_backend):
    exact = oracles.rounded(read(packed), F32).astype(np.float64)
    for dtype in DTYPES:
        found = unpack(packed, dtype=dtype, backend=any_backend)
        assert found.dtype == dtype
        np.testing.assert_array_equal(oracles.to_numpy(found), oracles.rounded(exact, dtype))


@bit_widths
@given(
    rows=st.integers(0, 4),
    length=st.integers(0, 200),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    magnitude=st.sampled_from(MAGNITUDES),
    seed=seeds,
)
def test_same_bits_from_everyone(compiled, on_threads, bits, rows, length, dtype, layout, magnitude, seed):
    """From every instruction set, any number of threads and any storage, as from the plain version."""
    plain = magnitudes(seed, rows, length, magnitude, dtype)
    # blocks of all kinds beside each other: of zeros, and with a single entry
    plain[:1] = 0
    plain[1:2, 1:] = 0
    x = stored(plain, layout)
    expected = pack(x, bits, backend="reference")
    for threads in (1, 3):
        found = on_threads(threads, lambda: pack(x, bits, backend=compiled))
        assert_same(found, expected)
        for out in DTYPES:
            ours = on_threads(threads, lambda out=out, found=found: unpack(found, dtype=out, backend=compiled))
            assert oracles.same_bits(ours, unpack(expected, dtype=out, backend="reference"))


@given(blocks=st.integers(1, 40), seed=seeds)
def test_many_blocks_in_a_row_on_many_threads(compiled, on_threads, blocks, seed):
    x = normal(seed, 2, blocks * 500, dtype=F32)
    expected = pack(x, 8, backend="reference")
    found = on_threads(3, lambda: pack(x, 8, backend=compiled))
    assert_same(found, expected)
    assert oracles.same_bits(on_threads(3, lambda: unpack(found, backend=compiled)), unpack(found, backend="reference"))


@given(rows=st.integers(1, 4), length=st.integers(1, 200), heavy=st.booleans(), seed=seeds)
def test_four_bits_are_no_worse_than_the_scale_of_the_largest_entry(any_backend, rows, length, heavy, seed):
    """Of either sign; and levels are the nearest to what will be unpacked."""
    values = normal(seed, rows, length)
    rows = (values**3 if heavy else values).to(F32)
    x = in_blocks(oracles.to_numpy(rows))
    packed = pack(rows, 4, backend=any_backend)
    error = ((in_blocks(oracles.to_numpy(unpack(packed, dtype=F64))) - x) ** 2).sum(2)
    whole = oracles.rounded(np.abs(x).max(axis=2) * 128 / 127, F16)
    # errors are rounded to float32 before they are compared
    slack = 1 + 4 * oracles.UNIT_ROUNDOFF[F32]
    for scale in (whole, -whole, oracles.to_numpy(packed.scales)):
        values = scale[..., None, None] * LEVELS / 128
        nearest = np.abs(x[..., None] - values).min(axis=3)
        assert (error <= slack * (nearest**2).sum(2)).all()


def test_four_bits_leave_as_little_as_their_search_finds(any_backend):
    """On what they are made for: the search with its signs and both steps, each of which would be missed."""
    x = oracles.to_numpy(normal(3, 100, 640, dtype=F32))
    errors = x - oracles.to_numpy(unpack(pack(torch.from_numpy(x), 4, backend=any_backend), dtype=F64))
    assert (errors**2).sum() / (x**2).sum() < 0.0811**2


@bit_widths
def test_zeros_stay_zeros(any_backend, bits):
    rows = torch.zeros(3, 130)
    rows[1, 70] = 2.0**-60
    rows[2, 129] = 5.0
    found = unpack(pack(rows, bits, backend=any_backend), backend=any_backend)
    assert (found[:2] == 0).all()
    assert (found[2, :129] == 0).all()
    assert abs(found[2, 129] - 5) < 0.01


@bit_widths
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_the_largest_entries(any_backend, bits, dtype):
    rows = torch.tensor([[64900.0, -64992.0, 0.0, 1.0]], dtype=dtype).clamp(-64992, 64992)
    if dtype == BF16:
        rows = torch.tensor([[64768.0, -64768.0, 0.0, 1.0]], dtype=dtype)
    packed = pack(rows, bits, backend=any_backend)
    assert torch.isfinite(packed.scales).all()
    assert_within_bound(packed, rows)


@bit_widths
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), NotFiniteError, "row 1, column 66 of rows is nan"),
        (float("-inf"), NotFiniteError, "row 1, column 66 of rows is -inf"),
        (65000.0, ArgumentError, "at most 64992 .* row 1, column 66 of rows is 65000.0: divide"),
        (-1e300, ArgumentError, "row 1, column 66 of rows is -1e[+]300"),
    ],
)
def test_what_no_scale_can_hold_is_refused(any_backend, bits, value, error, message):
    rows = normal(4, 3, 100)
    rows[1, 66], rows[2, 5] = value, float("nan")
    with pytest.raises(error, match=f"^pack: entries are .*{message}"):
        pack(rows, bits, backend=any_backend)


@pytest.mark.parametrize(
    ("rows", "bits", "message"),
    [
        (torch.ones(3), 8, r"rows are a matrix of float16, .* got torch.float32 \[3\]"),
        (torch.ones(3, 2).int(), 8, r"got torch.int32 \[3, 2\]"),
        ([[1.0]], 8, "got list"),
        (torch.ones(3, 2), 5, "bits are 8 or 4; got 5"),
    ],
)
def test_what_is_no_matrix_is_refused(rows, bits, message):
    with pytest.raises(ArgumentError, match=f"^pack: .*{message}"):
        pack(rows, bits)


def test_unpack_refuses_other_dtypes():
    with pytest.raises(ShapeError, match=r"^unpack: dtype is float16, .* got torch.int8"):
        unpack(pack(torch.ones(1, 1), 8), dtype=torch.int8)


@pytest.mark.parametrize(
    ("codes", "scales", "length", "bits", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 1).half(), 3, 8, "codes is contiguous torch.uint8"),
        (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 1).half(), 3, 8, r"\[2, 3\]; got .* \[2, 4\]"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 1).half(), 5, 4, None),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3, 1).half(), 5, 4, r"scales .* \[2, 1\]; got .* \[3, 1\]"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 1), 3, 8, "scales is contiguous torch.float16"),
        (torch.zeros(3, 2, dtype=torch.uint8).T, torch.zeros(2, 1).half(), 3, 8, "with strides"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 1).half(), 3, 2, "bits are 16, 8 or 4"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 1, device="meta").half(), 3, 8, "one device"),
    ],
)
def test_parts_that_do_not_fit_are_refused(codes, scales, length, bits, message):
    if message is None:
        assert Packed(codes, scales, length, bits).shape == (2, 5)
        return
    with pytest.raises(ShapeError, match=f"^Packed: .*{message}"):
        Packed(codes, scales, length, bits)


@bit_widths
def test_rows_are_a_view(bits):
    packed = pack(normal(5, 7, 129, dtype=F32), bits)
    part = packed.rows(2, 5)
    assert (part.shape, part.codes._base is not None) == ((3, 129), True)
    assert torch.equal(unpack(part), unpack(packed)[2:5])
    assert packed.to("cpu") is packed
    assert packed.to("meta").device.type == "meta"


@bit_widths
def test_scales_of_either_sign(any_backend, bits):
    """Whoever turns rows round turns their scales."""
    packed = pack(normal(6, 3, 130, dtype=F32), bits)
    turned = Packed(packed.codes, -packed.scales, packed.length, packed.bits)
    assert torch.equal(unpack(turned, backend=any_backend), -unpack(packed, backend=any_backend))


def test_refusals_of_backends():
    packed = pack(torch.ones(1, 1), 8)
    with pytest.raises(BackendError, match=r"^pack: no backend 'cuda'; it has 'cpu', .*'reference'"):
        pack(torch.ones(1, 1), 8, backend="cuda")
    with pytest.raises(BackendError, match=r"^unpack: .* reads CPU memory, and the tensor is on meta"):
        unpack(packed.to("meta"), backend="cpu")
