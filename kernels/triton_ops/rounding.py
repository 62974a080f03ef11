"""Round sums to what is stored, in one step."""

import triton
import triton.language as tl


@triton.jit
def narrow(values, TYPE: tl.constexpr):
    """Round float32 or float64 once to TYPE, to nearest, ties to even: loraspan.ops.rounding on the device."""
    if values.dtype == tl.float64 and (tl.float16 == TYPE or tl.bfloat16 == TYPE):
        # to float32 rounded to odd, so that the second rounding does what one would have done
        nearest = values.to(tl.float32)
        wide = nearest.to(tl.float64)
        bits = nearest.to(tl.int32, bitcast=True)
        # where the nearest float32 is even and not exact, its neighbour on the other side of the value is odd
        moves = (wide != values) & (wide == wide) & (bits & 1 == 0)
        step = tl.where(tl.abs(wide) > tl.abs(values), -1, 1)
        values = tl.where(moves, bits + step, bits).to(tl.float32, bitcast=True)
    return _bfloat16(values) if tl.bfloat16 == TYPE else values.to(TYPE)


@triton.jit
def _bfloat16(values):
    # in integers, since Triton's interpreter cuts the lower half off where a device rounds
    bits = values.to(tl.int32, bitcast=True)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # NaN keeps its upper half, made quiet: rounding could carry it to an infinity
    upper = tl.where(values != values, (bits >> 16) | 0x40, upper)
    return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
