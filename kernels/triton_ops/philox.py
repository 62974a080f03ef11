"""Random signs in registers: the Philox stream that every backend draws (loraspan.ops.sketch)."""

import triton
import triton.language as tl

# Salmon, Moraes, Dror, Shaw 2011, section 3.3 and table 2
_ROUND_A = tl.constexpr(0xD2511F53)
_ROUND_B = tl.constexpr(0xCD9E8D57)
_KEY_A = tl.constexpr(0x9E3779B9)
_KEY_B = tl.constexpr(0xBB67AE85)


@triton.jit
def signs(j, c, seed_low, seed_high):
    """Give entries ``Omega[j, c]``, +-1 in float32, ``[len(c), len(j)]``; all of ``c`` within one group of 128.

    Args:
        j: ``[.]`` int64, rows of Omega.
        c: ``[.]`` int32, columns of Omega; bit ``c % 128`` of the block with counter (j low, j high, c / 128, 0) is
            drawn, and set is -1.
        seed_low: the key, as two 32-bit words.
        seed_high: see ``seed_low``.
    """
    c0, c1 = j.to(tl.uint32), (j >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + (tl.min(c, 0) // 128).to(tl.uint32)
    c3 = tl.zeros_like(c0)
    k0, k1 = tl.zeros_like(c0) + seed_low.to(tl.uint32), tl.zeros_like(c0) + seed_high.to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0, c2
        c0 = tl.umulhi(b, tl.full(b.shape, _ROUND_B, tl.uint32)) ^ c1 ^ k0
        c2 = tl.umulhi(a, tl.full(a.shape, _ROUND_A, tl.uint32)) ^ c3 ^ k1
        c1 = tl.mul(b, tl.full(b.shape, _ROUND_B, tl.uint32), sanitize_overflow=False)
        c3 = tl.mul(a, tl.full(a.shape, _ROUND_A, tl.uint32), sanitize_overflow=False)
        k0 = tl.add(k0, tl.full(k0.shape, _KEY_A, tl.uint32), sanitize_overflow=False)
        k1 = tl.add(k1, tl.full(k1.shape, _KEY_B, tl.uint32), sanitize_overflow=False)
    word, bit = (c % 128 // 32)[:, None], (c % 32)[:, None].to(tl.uint32)
    # [len(c), len(j)]
    lower, upper = tl.where(word == 0, c0[None, :], c1[None, :]), tl.where(word == 2, c2[None, :], c3[None, :])
    drawn = tl.where(word < 2, lower, upper)
    return 1.0 - 2.0 * ((drawn >> bit) & 1).to(tl.float32)
