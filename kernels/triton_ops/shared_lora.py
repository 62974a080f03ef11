"""shared_lora: ``y[t] += scale * sum_m shares[t, m] dW(tasks[t, m]) x[t]``, rows of one tile with different tasks.

Two launches. The first makes, of a slab of the d columns each, ``z = x V`` and the products of x with private right
ends. Grid: (row tiles and slabs, tiles of k_in and then one per private right end of a task). The second adds the slabs
in their order and, per row, meets the columns of its tasks: ``h_c = weight_c share scale (right_c . z)`` and
``g = sum_c h_c left_c`` over shared left ends; then it adds ``g U^T`` and the private left ends to its tile of y. Grid:
row tiles times tiles of n. No copy to or from the host, one workspace, sums in float32 (float64 where a tensor is), in
a fixed order: a CUDA graph may capture it. Rows whose tasks are all -1 are not stored to; a task out of range makes its
row NaN.

Count. Reads x, V, U, y once and writes y; per row and task ``p (k_in + k_out)`` loadings, again for every tile of n
from the L2 cache; the workspace is ``slabs T (k_in + private)`` sums, written once and read per tile of n.
``2 T (d k_in + n k_out)`` operations on the bases. At T up to about 100 the floor is ``d k_in + n k_out`` entries of the
bases over the bandwidth, a few microseconds, and two launches take about as long. Expected, not measured: within twice
the floor and launches there; for T in the thousands, 60 % of x and y over the bandwidth, as ``g U^T`` takes six
products of bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraspan.ops.cores import Cores
from loraspan.triton_ops import launch
from loraspan.triton_ops.launch import INTERPRETING, KINDS, architecture_of, compute_type, on
from loraspan.triton_ops.reconstruct import bits
from loraspan.triton_ops.rounding import narrow
from loraspan.triton_ops.rows import element
from loraspan.triton_ops.strided import entries, form_of, put


class Tile(NamedTuple):
    """A configuration: rows, columns of d, k_in and n per program, warps and stages of both launches."""

    BLOCK_T: int
    BLOCK_D: int
    BLOCK_K: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# by (type of x V, rows up to 64); at last what is read singly, or bases of more than 64 columns
TILES = {
    ("half", True): Tile(16, 128, 32, 64, 4, 3),
    ("half", False): Tile(32, 64, 64, 64, 4, 3),
    ("fp32", True): Tile(16, 64, 32, 64, 8, 2),
    ("fp32", False): Tile(32, 32, 32, 32, 4, 2),
    ("fp64", True): Tile(16, 16, 16, 32, 4, 1),
    ("fp64", False): Tile(32, 16, 16, 32, 8, 1),
    ("careful", True): Tile(16, 32, 32, 32, 8, 2),
}
# z and g of a tile of rows lie in registers
_WIDEST = 1024
_LEAST_SLAB = 512
_MOST_SLABS = 16


class Variant(NamedTuple):
    """What both kernels are compiled for."""

    KIND_Y: str
    FORM_Y: str
    KIND_X: str
    FORM_X: str
    KIND_V: str
    FORM_V: str
    KIND_U: str
    FORM_U: str
    KIND_E: str
    FORM_E: str
    TYPE: tl.dtype
    WIDTH_IN: int
    WIDTH_OUT: int
    SHARES: bool
    tile: Tile


def run(
    y: Tensor, x: Tensor, v: Tensor, u: Tensor, cores: Cores, tasks: Tensor, shares: Tensor | None, scale: float
) -> None:
    """Add to ``y`` in place; waits for nothing."""
    if not y.numel() or not tasks.numel():
        return
    variant = variant_of(y, x, v, u, cores, shares, x.shape[0])
    (rows, n), d, mixture = y.shape, x.shape[1], tasks.shape[1]
    ends = (cores.left, cores.left_private, cores.right, cores.right_private)
    slabs = max(min(d // _LEAST_SLAB, _MOST_SLABS if rows <= 64 else 2), 1)
    slab = -(-max(d, 1) // (slabs * 128)) * 128
    slabs = -(-max(d, 1) // slab)
    tile, private = variant.tile, cores.most[1] + cores.most[3]
    width = v.shape[1] + mixture * private
    sums = torch.empty(slabs * rows * width, dtype=_sum_dtype(variant), device=y.device)
    sizes = (rows, n, d, v.shape[1], u.shape[1], mixture, cores.index.shape[0], private, slab, slabs)
    with on(y.device):
        down = triton.cdiv(rows, tile.BLOCK_T)
        if width:
            across = triton.cdiv(v.shape[1], tile.BLOCK_K) + mixture * private
            shrink_kernel[(down * slabs, across)](
                x, v, cores.index, cores.right_private, tasks, sums, *sizes, cores.right_private.shape[0],
                *x.stride(), *v.stride(), *cores.index.stride(), *tasks.stride(), **shrink_options(variant),
            )  # fmt: skip
        expand_kernel[(down * triton.cdiv(n, tile.BLOCK_N),)](
            y, u, cores.index, cores.weights, *ends, tasks, tasks if shares is None else shares, sums, bits(scale),
            *sizes, *(table.shape[0] for table in ends), *y.stride(), *u.stride(), *cores.index.stride(),
            *tasks.stride(), *(tasks if shares is None else shares).stride(), **expand_options(variant, architecture_of(y.device)),
        )  # fmt: skip


def variant_of(y: Tensor, x: Tensor, v: Tensor, u: Tensor, cores: Cores, shares: Tensor | None, rows: int) -> Variant:
    """Choose the kernels for a call."""
    wide = torch.float64 in (y.dtype, x.dtype, v.dtype, u.dtype, cores.left.dtype)
    compute = compute_type([KINDS[x.dtype], KINDS[v.dtype]], wide)
    tables = (cores.left, cores.left_private, cores.right, cores.right_private)
    ends = "rows" if all(form_of(table) == "rows" for table in tables if table.numel()) else "any"
    layouts = [field for tensor in (y, x, v, u) for field in (KINDS[tensor.dtype], form_of(tensor))]
    widths = [max(triton.next_power_of_2(basis.shape[1]), 16) for basis in (v, u)]
    kinds = (*layouts, KINDS[cores.left.dtype], ends)
    tile = tile_of(compute, rows, "any" in kinds or max(widths) > 64)
    return Variant(*kinds, compute, *widths, shares is not None, tile)


def tile_of(compute: tl.dtype, rows: int, careful: bool) -> Tile:
    """Look a configuration up."""
    if careful:
        return TILES["careful", True]
    return TILES[compute.name if compute in (tl.float32, tl.float64) else "half", rows <= 64]


def _sum_dtype(variant: Variant) -> torch.dtype:
    return torch.float64 if variant.TYPE == tl.float64 else torch.float32


def shrink_options(variant: Variant) -> dict[str, object]:
    """Give what ``shrink_kernel`` is compiled for, and how."""
    names = ("KIND_X", "FORM_X", "KIND_V", "FORM_V", "KIND_E", "FORM_E", "TYPE")
    tile = variant.tile._asdict()
    del tile["BLOCK_N"]
    return {**{name: getattr(variant, name) for name in names}, **tile}


def expand_options(variant: Variant, architecture: str) -> dict[str, object]:
    """Give what ``expand_kernel`` is compiled for, and how."""
    names = ("KIND_Y", "FORM_Y", "KIND_U", "FORM_U", "KIND_E", "FORM_E", "WIDTH_IN", "WIDTH_OUT", "SHARES")
    tile = variant.tile._asdict()
    del tile["BLOCK_D"], tile["BLOCK_K"]
    wide = tl.float64 if variant.TYPE == tl.float64 else tl.float32
    return {
        **{name: getattr(variant, name) for name in names},
        "SUM": wide,
        "PRECISION": _precision(variant, architecture),
        **tile,
        "num_stages": 1,
    }


def _precision(variant: Variant, architecture: str) -> str:
    # each side of float32 in three parts of 8 bits, whose products the tensor cores make: what is left out is below
    # 2^-25 of a product. TF32 would drop g to 11 bits and break the bound.
    # AMD's matrix cores have float32 of their own.
    return "ieee" if INTERPRETING or architecture == "hip" or variant.TYPE == tl.float64 else "bf16x6"


def refuses(
    y: Tensor, x: Tensor, v: Tensor, u: Tensor, cores: Cores, tasks: Tensor, shares: Tensor | None, scale: float
) -> str | None:
    """Say why this call cannot be run, if it cannot."""
    if max(v.shape[1], u.shape[1]) > _WIDEST:
        return f"bases have {v.shape[1]} and {u.shape[1]} columns, and it takes at most {_WIDEST}"
    return launch.refuses([y.device])


SIZES = ["rows", "n", "d", "k_in", "k_out", "mixture", "count", "private", "slab", "slabs"]
SHRINK_NUMBERS = [
    *SIZES, "right_private_rows", "x_stride_t", "x_stride_d", "v_stride_d", "v_stride_k", "index_stride_r",
    "index_stride_f", "tasks_stride_t", "tasks_stride_m",
]  # fmt: skip
EXPAND_NUMBERS = [
    "scale", *SIZES, "left_rows", "left_private_rows", "right_rows", "right_private_rows", "y_stride_t", "y_stride_n",
    "u_stride_n", "u_stride_k", "index_stride_r", "index_stride_f", "tasks_stride_t", "tasks_stride_m",
    "shares_stride_t", "shares_stride_m",
]  # fmt: skip


@triton.jit(do_not_specialize=SHRINK_NUMBERS)
def shrink_kernel(
    x, v, index, right_private, tasks, sums,
    rows, n, d, k_in, k_out, mixture, count, private, slab, slabs, right_private_rows,
    x_stride_t, x_stride_d, v_stride_d, v_stride_k, index_stride_r, index_stride_f, tasks_stride_t, tasks_stride_m,
    KIND_X: tl.constexpr, FORM_X: tl.constexpr, KIND_V: tl.constexpr, FORM_V: tl.constexpr,
    KIND_E: tl.constexpr, FORM_E: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply one slab of a tile of x with a tile of V, or with one private right end of each row's task."""
    SUM: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    split = tl.program_id(0) % slabs
    t = (tl.program_id(0) // slabs).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    # of 128 columns, which tells the compiler how addresses are aligned
    start = split.to(tl.int64) * (slab.to(tl.int64) // 128 * 128)
    end = tl.minimum(start + slab, d.to(tl.int64))
    width = k_in + mixture * private
    own = sums + split.to(tl.int64) * rows * width + t * width
    part = tl.program_id(1)
    whole = tl.cdiv(k_in, BLOCK_K)
    if part < whole:
        k = part * BLOCK_K + tl.arange(0, BLOCK_K)
        j = start + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_T, BLOCK_K), SUM)
        a = entries(x, x_stride_t.to(tl.int64), x_stride_d.to(tl.int64), t, rows, j, end, KIND_X, FORM_X).to(TYPE)
        b = entries(v, v_stride_d.to(tl.int64), v_stride_k.to(tl.int64), j, end, k, k_in, KIND_V, FORM_V).to(TYPE)
        # carried into the turn that multiplies them, as in products_kernel
        for chunk in range(start, end, BLOCK_D):
            acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=SUM)
            j = chunk + BLOCK_D + tl.arange(0, BLOCK_D)
            a = entries(x, x_stride_t.to(tl.int64), x_stride_d.to(tl.int64), t, rows, j, end, KIND_X, FORM_X).to(TYPE)
            b = entries(v, v_stride_d.to(tl.int64), v_stride_k.to(tl.int64), j, end, k, k_in, KIND_V, FORM_V).to(TYPE)
        tl.store(own[:, None] + k[None, :], acc, mask=(t < rows)[:, None] & (k < k_in)[None, :])
    else:
        slot = part - whole
        q, e = slot // private, slot % private
        task = tl.load(tasks + t * tasks_stride_t + q * tasks_stride_m, mask=t < rows, other=-1)
        known = (task >= 0) & (task < count)
        fields = index + task * index_stride_r
        first = tl.load(fields + 4 * index_stride_f, mask=known, other=0)
        has = tl.load(fields + 6 * index_stride_f, mask=known, other=0)
        has += tl.load(fields + 8 * index_stride_f, mask=known, other=0)
        row = tl.where(known & (e < has), first + e, right_private_rows)
        # nothing is read where no row of the tile has so many
        end = tl.where(tl.max(has, 0) > e, end, start)
        total = tl.zeros((BLOCK_T,), SUM)
        for chunk in range(start, end, BLOCK_D):
            j = chunk + tl.arange(0, BLOCK_D)
            a = entries(x, x_stride_t.to(tl.int64), x_stride_d.to(tl.int64), t, rows, j, end, KIND_X, FORM_X).to(SUM)
            b = entries(right_private, d.to(tl.int64), 1, row, right_private_rows, j, end, KIND_E, FORM_E).to(SUM)
            total += tl.sum(a * b, 1)
        tl.store(own + k_in + slot, total, mask=t < rows)


@triton.jit(do_not_specialize=EXPAND_NUMBERS)
def expand_kernel(
    y, u, index, weights, left, left_private, right, right_private, tasks, shares, sums, scale,
    rows, n, d, k_in, k_out, mixture, count, private, slab, slabs,
    left_rows, left_private_rows, right_rows, right_private_rows,
    y_stride_t, y_stride_n, u_stride_n, u_stride_k, index_stride_r, index_stride_f, tasks_stride_t, tasks_stride_m,
    shares_stride_t, shares_stride_m,
    KIND_Y: tl.constexpr, FORM_Y: tl.constexpr, KIND_U: tl.constexpr, FORM_U: tl.constexpr,
    KIND_E: tl.constexpr, FORM_E: tl.constexpr, WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr,
    SHARES: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Meet each row's columns and add them to one tile of y."""
    across = tl.cdiv(n, BLOCK_N)
    t = (tl.program_id(0) // across).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = (tl.program_id(0) % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, o = tl.arange(0, WIDTH_IN), tl.arange(0, WIDTH_OUT)
    width = k_in + mixture * private
    step = rows.to(tl.int64) * width
    own = sums + t * width
    factor = scale.to(tl.int64).to(tl.float64, bitcast=True).to(SUM)
    z = tl.zeros((BLOCK_T, WIDTH_IN), SUM)
    for split in range(slabs):
        z += tl.load(
            own[:, None] + split * step + k[None, :], mask=(t < rows)[:, None] & (k < k_in)[None, :], other=0.0
        )

    # [BLOCK_T, k_out] and [BLOCK_T, BLOCK_N]
    g = tl.zeros((BLOCK_T, WIDTH_OUT), SUM)
    added = tl.zeros((BLOCK_T, BLOCK_N), SUM)
    some, wrong = tl.zeros((BLOCK_T,), tl.int32), tl.zeros((BLOCK_T,), tl.int32)
    for q in range(mixture):
        task = tl.load(tasks + t * tasks_stride_t + q * tasks_stride_m, mask=t < rows, other=-1)
        known = (task >= 0) & (task < count)
        some += (task != -1).to(tl.int32)
        wrong += ((task < -1) | (task >= count)).to(tl.int32)
        share = tl.zeros((BLOCK_T,), SUM) + factor
        if SHARES:
            share *= tl.load(shares + t * shares_stride_t + q * shares_stride_m, mask=known, other=0.0).to(SUM)
        at = index + task * index_stride_r
        ss, sp = _field(at, 5, index_stride_f, known), _field(at, 6, index_stride_f, known)
        ps, pp = _field(at, 7, index_stride_f, known), _field(at, 8, index_stride_f, known)
        dense = _field(at, 9, index_stride_f, known) != 0
        weight = weights + _field(at, 0, index_stride_f, known)
        first = _field(at, 3, index_stride_f, known)
        drawn = own + k_in + q * private
        # columns whose left end is shared: ss, then sp
        left_at = _field(at, 1, index_stride_f, known)
        for c in range(tl.max(ss + sp, 0)):
            row = tl.where((c < ss) & (dense == 0), first + c, right_rows)
            h = tl.sum(z * entries(right, k_in, 1, row, right_rows, k, k_in, KIND_E, FORM_E).to(SUM), 1)
            h = tl.where(dense, tl.sum(tl.where((k == c)[None, :], z, 0.0), 1), h)
            h = tl.where(c < ss, h, _drawn(drawn + c - ss, step, slabs, (c >= ss) & (c < ss + sp), SUM, BLOCK_T))
            h *= share * tl.load(weight + c, mask=c < ss + sp, other=0.0).to(SUM)
            row = tl.where(c < ss + sp, left_at + c, left_rows)
            ends = entries(left, k_out, 1, row, left_rows, o, k_out, KIND_E, FORM_E).to(SUM)
            g += tl.where(c < ss + sp, h, 0.0)[:, None] * ends
        # columns whose left end is private: ps, then pp
        left_at, weight = _field(at, 2, index_stride_f, known), weight + ss + sp
        first += tl.where(dense, 0, ss)
        for c in range(tl.max(ps + pp, 0)):
            row = tl.where(c < ps, first + c, right_rows)
            h = tl.sum(z * entries(right, k_in, 1, row, right_rows, k, k_in, KIND_E, FORM_E).to(SUM), 1)
            own_end = (c >= ps) & (c < ps + pp)
            h = tl.where(c < ps, h, _drawn(drawn + sp + c - ps, step, slabs, own_end, SUM, BLOCK_T))
            h *= share * tl.load(weight + c, mask=c < ps + pp, other=0.0).to(SUM)
            row = tl.where(c < ps + pp, left_at + c, left_private_rows)
            ends = entries(left_private, n, 1, row, left_private_rows, j, n, KIND_E, FORM_E).to(SUM)
            added += tl.where(c < ps + pp, h, 0.0)[:, None] * ends

    on_u = entries(u, u_stride_n.to(tl.int64), u_stride_k.to(tl.int64), j, n, o, k_out, KIND_U, FORM_U).to(SUM)
    added = tl.dot(g, tl.trans(on_u), added, input_precision=PRECISION, out_dtype=SUM)
    before = entries(y, y_stride_t.to(tl.int64), y_stride_n.to(tl.int64), t, rows, j, n, KIND_Y, FORM_Y).to(SUM)
    after = tl.where((wrong > 0)[:, None], float("nan"), before + added)
    # rows without a task are not stored to: their place in the table of rows is past its end
    t = tl.where(some > 0, t, rows)
    put(
        y,
        y_stride_t.to(tl.int64),
        y_stride_n.to(tl.int64),
        t,
        rows,
        j,
        n,
        narrow(after, element(KIND_Y)),
        KIND_Y,
        FORM_Y,
    )


@triton.jit
def _field(at, field, stride, known):
    return tl.load(at + field * stride, mask=known, other=0)


@triton.jit
def _drawn(at, step, slabs, active, SUM: tl.constexpr, BLOCK_T: tl.constexpr):
    """Add the slabs of one private product per row, in order."""
    total = tl.zeros((BLOCK_T,), SUM)
    for split in range(slabs):
        total += tl.load(at + split * step, mask=active, other=0.0)
    return total
