"""What the operators ought to give, in float64 NumPy, and how far off they may be.

Nothing here imports loraspan: an oracle that shares code with what it judges proves nothing. Every bound holds for the
difference to the oracle, so it also has room for what the oracle itself rounds in float64.
"""

import math

import numpy as np
import torch

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (F16, BF16, F32, F64)
# unit roundoff: half the gap between 1 and the next number
UNIT_ROUNDOFF = {F64: 2.0**-53, F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
U_SUM = {"f32": UNIT_ROUNDOFF[F32], "f64": UNIT_ROUNDOFF[F64]}
# the most columns that float32 sums run over before they are added in float64
CHUNK = 128
# what a float32 product may lose by underflow, subnormals flushed or not
TINY = float(torch.finfo(F32).tiny)


def to_numpy(tensor):
    return tensor.detach().to(F64).cpu().numpy()


def stack(blocks):
    """``X [R, d]`` in float64."""
    return np.concatenate([to_numpy(b) for b in blocks])


def gamma(steps, u):
    """The relative error of ``steps`` roundings: Higham, section 3.1."""
    return steps * u / (1 - steps * u)


def rounded(values, dtype):
    """Round float64 to the nearest number of ``dtype``, ties to even, in one step (subnormals and overflow too)."""
    info = torch.finfo(dtype)
    digits = 1 - math.log2(info.eps)
    _, exponent = np.frexp(values)
    exponent = np.maximum(exponent, math.log2(info.tiny) + 1)
    # in two factors, since 2**1074 is no float64
    unit = np.ldexp(1.0, (exponent - digits).astype(int))
    with np.errstate(invalid="ignore"):
        nearest = np.rint(values / unit) * unit
    return np.where(
        np.abs(nearest) > info.max, np.copysign(np.inf, values), np.where(np.isfinite(values), nearest, values)
    )


def rounding_bound(exact, before, dtype):
    """What one rounding to ``dtype`` adds to an error of at most ``before``, subnormals included."""
    u = UNIT_ROUNDOFF[dtype]
    return before + u * (np.abs(exact) + before) + u * float(torch.finfo(dtype).tiny)


def _dot_bound(size, length, precision, roundings):
    """The error of sums of ``length`` products, ``size`` the same sums of absolute values.

    float32 sums run over ``CHUNK`` products, each made of numbers rounded ``roundings`` times, and are added in
    float64; the oracle's own sum is in float64 as well.
    """
    u32, u64 = U_SUM["f32"], U_SUM["f64"]
    if precision == "f64":
        return (gamma(length + 1, u64) + gamma(length + 1, u64)) * size
    chunks = -(-length // CHUNK)
    return (gamma(CHUNK + roundings, u32) + gamma(chunks + 1, u64) + gamma(length + 1, u64)) * size + length * TINY


def gram(x):
    return x @ x.T


def gram_bound(x, precision):
    size = np.abs(x)
    return _dot_bound(size @ size.T, x.shape[1], precision, roundings=2)


def combine_v(x, w):
    return x.T @ w


def combine_v_bound(x, w, dtype, precision):
    rows = x.shape[0]
    size = np.abs(x).T @ np.abs(w)
    before = (gamma(rows + 2, U_SUM[precision]) + gamma(rows + 1, U_SUM["f64"])) * size + (rows + 1) * TINY
    return rounding_bound(combine_v(x, w), before, dtype)


def product_bound(a, b, precision):
    """Of ``a @ b``, a long sum with both sides rounded at most once."""
    return _dot_bound(np.abs(a) @ np.abs(b), a.shape[1], precision, roundings=2)


def power(x, q):
    return x @ (x.T @ q)


def power_bound(x, q, precision):
    rows, columns = x.shape
    size = np.abs(x)
    size = size @ (size.T @ np.abs(q))
    u64 = U_SUM["f64"]
    own = gamma(rows + columns + 4, u64) * size
    if precision == "f64":
        return 2 * own
    chunks = -(-columns // CHUNK)
    underflow = TINY * (columns + rows * np.abs(x).sum(axis=1, keepdims=True))
    return (gamma(rows + CHUNK + 4, U_SUM["f32"]) + gamma(chunks + 1, u64)) * size + own + underflow


def reconstruct(basis, loadings, scale):
    """``[..., m, p]``; ``loadings`` None stands for the identity."""
    return scale * (basis if loadings is None else basis @ loadings)


def reconstruct_bound(basis, loadings, scale, out, wide):
    """Of an answer of dtype ``out`` summed in ``wide``."""
    steps = 0 if loadings is None else basis.shape[-1]
    size = abs(scale) * (np.abs(basis) if loadings is None else np.abs(basis) @ np.abs(loadings))
    # 2 for the scale: itself rounded, and its product
    before = (gamma(steps + 2, UNIT_ROUNDOFF[wide]) + gamma(steps + 1, U_SUM["f64"])) * size + (steps + 1) * TINY
    return rounding_bound(reconstruct(basis, loadings, scale), before, out)


def philox4x32(counter, key):
    """Ten rounds of Philox4x32 in Python integers: Salmon, Moraes, Dror, Shaw 2011, section 3.3."""
    for turn in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        k0, k1 = ((key[0] + turn * 0x9E3779B9) % 2**32, (key[1] + turn * 0xBB67AE85) % 2**32)
        counter = (high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0)
    return counter


def omega(rows, width, seed):
    """``Omega [rows, width]``: bit ``c % 128`` of the block with counter (j low, j high, c / 128, 0), set is -1."""
    key = (seed % 2**32, seed >> 32)
    out = np.empty((rows, width))
    for j in range(rows):
        for group in range(0, width, 128):
            words = philox4x32((j % 2**32, j >> 32, group // 128, 0), key)
            number = sum(word << (32 * i) for i, word in enumerate(words))
            for c in range(group, min(group + 128, width)):
                out[j, c] = -1.0 if number >> (c - group) & 1 else 1.0
    return out


def sparse_omega(rows, width, seed):
    """``Omega [rows, width]`` with a sign in each quarter of a row, as :func:`loraspan.ops.sparse_sketch` says."""
    key = (seed % 2**32, seed >> 32)
    m = width // 4
    out = np.zeros((rows, width))
    for j in range(rows):
        own, first = (philox4x32((i % 2**32, i >> 32, 0, 1), key) for i in (j, j - j % m))
        for q in range(4):
            shift = (first[q] >> 1) * m >> 31
            out[j, q * m + (j + shift) % m] = -1.0 if own[q] & 1 else 1.0
    return out


def sparse_sketch_bound(x, signs):
    """Of float32 sums over 128 terms, added in float64 and rounded once; ``signs [d, width]``."""
    size = np.abs(x) @ np.abs(signs)
    return _dot_bound(size, x.shape[1], "f32", roundings=2) + UNIT_ROUNDOFF[F32] * size


def sketch_bound(x, width, precision):
    size = np.repeat(np.abs(x).sum(axis=1, keepdims=True), width, axis=1)
    return _dot_bound(size, x.shape[1], precision, roundings=2)


def assert_within(actual, expected, bound):
    """Fail with the worst entry and how many times its bound it is off."""
    actual = to_numpy(actual)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if not actual.size:
        return
    assert np.isfinite(actual).all(), f"{(~np.isfinite(actual)).sum()} entries are a NaN or an infinity"
    error = np.abs(actual - expected)
    excess = np.divide(
        error, bound, out=np.where(error == 0, 0.0, np.inf), where=np.broadcast_to(bound > 0, error.shape)
    )
    worst = tuple(map(int, np.unravel_index(excess.argmax(), excess.shape)))
    assert excess[worst] <= 1, (
        f"{excess[worst]:.3g} times the bound at {worst}: {float(actual[worst])!r}, expected {float(expected[worst])!r}"
    )


def assert_same_special(actual, expected):
    """Fail unless NaN and the infinities are where they ought to be, with their signs."""
    actual = to_numpy(actual)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_array_equal(np.where(np.isinf(actual), actual, 0), np.where(np.isinf(expected), expected, 0))


def same_bits(a, b):
    """Tell whether two tensors are equal to the last bit, the sign of zero and of NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
