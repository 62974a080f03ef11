"""Matrices to feed the operators: every dtype, every storage, ragged blocks; from sizes and a seed alone."""

import torch

from loraspan.ops import Packed, pack
from oracles import BF16, F16, F32, F64

LAYOUTS = ("row-major", "column-major", "strided", "strided-columns", "odd-offset", "repeated-row")
# the dtypes of a matrix's blocks, in turn
KINDS = {"f16": (F16,), "bf16": (BF16,), "f32": (F32,), "f64": (F64,), "mixed": (BF16, F32, F16, F64, BF16)}


def normal(seed, *shape, dtype=F64):
    """Standard normal numbers, drawn in float64 and rounded to ``dtype``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def packed(rows, bits):
    """Rows in 16, 8 or 4 bits; in 16, which nobody packs, as whole numbers with scales of about their blocks."""
    if bits != 16:
        return pack(rows, bits)
    count, length = rows.shape
    scales = pack(rows, 8).scales / 64
    steps = scales.float().repeat_interleave(64, dim=1)[:, :length] / 128
    numbers = torch.where(steps > 0, rows.float() / steps.clamp(min=1e-30), 0).round().clamp(-32767, 32767)
    return Packed(numbers.to(torch.int16).view(torch.uint8).reshape(count, 2 * length), scales, length, 16)


def stored(values, layout):
    """Give the matrix ``values`` again in another storage, with what lies between its entries set to NaN."""
    rows, columns = values.shape
    if layout == "row-major":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "column-major":
        return values.T.clone(memory_format=torch.contiguous_format).T
    nan = float("nan")
    if layout == "strided":
        out = torch.full((3 * rows + 1, 2 * columns + 1), nan, dtype=values.dtype)[1::3, 1::2]
    elif layout == "strided-columns":
        out = torch.full((2 * columns + 1, 3 * rows + 1), nan, dtype=values.dtype).T[1::3, 1::2]
    elif layout == "odd-offset":
        size = values.element_size()
        memory = torch.zeros((rows * columns + 3) * size, dtype=torch.uint8)
        out = memory[3 * size :].view(values.dtype).view(rows, columns)
    else:
        assert layout == "repeated-row"
        return values[:1].expand(rows, columns) if rows else values
    out.copy_(values)
    return out


def blocks(seed, rows, columns, kind, layout="row-major"):
    """Row blocks of the heights ``rows``, their dtypes in turn those of ``kind``."""
    dtypes = KINDS[kind]
    return [
        stored(normal(seed + 1000 * i, r, columns, dtype=dtypes[i % len(dtypes)]), layout) for i, r in enumerate(rows)
    ]


def swallowing(columns, dtype):
    """Two rows ``1 t t t ..`` and ``1 1 1 1 ..``: added to 1 in float32, the small ``t`` are lost to the last one.

    So a float32 sum that runs on past its 128 columns is off by ``columns / 2`` units of roundoff.
    """
    x = torch.ones(2, columns, dtype=dtype)
    x[0, 1:] = 2.0**-25
    return x
