"""``V = X^T W`` for a batch: rows of X through the table, V to its place in its dtype, rounded once.

What combine and power share. Grid: one axis of units, a row of the table each: (job, tile of columns of X, tile of
columns of W). A program passes down all rows of X for its columns, sums in float32 (or float64) and stores its tile of
V. Products are IEEE float32 (or float64): W is not of half precision.

Count. Reads ``R d`` entries of X and writes ``d k`` of V once (X again for every 64 columns of W, from the L2 cache),
and makes ``2 R d k`` float32 operations. The floor is the larger of the bytes over the bandwidth and the operations
over the rate of float32: from k of about 20 per byte of an entry of X on, the rate. What it
reaches is part of the figures of combine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from loraspan.triton_ops.launch import KINDS, compute_type, on, upload
from loraspan.triton_ops.rounding import narrow
from loraspan.triton_ops.rows import Rows, Table, element, row_ends, row_tile, vector
from loraspan.triton_ops.strided import form_of, put


class Job(NamedTuple):
    """``out [d, k] = x^T @ w``, ``w [R, k]`` float64 on any device, ``out`` of any strides."""

    x: Rows
    w: Tensor
    out: Tensor


class Tile(NamedTuple):
    """A configuration: the tile of V, rows per dot, warps and stages."""

    BLOCK_D: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


# by (type of the products, entries read singly, columns of W up to 16)
TILES = {
    ("fp32", False, True): Tile(64, 16, 32, 4, 2),
    ("fp32", False, False): Tile(64, 32, 16, 4, 3),
    ("fp32", True, True): Tile(32, 16, 16, 2, 1),
    ("fp32", True, False): Tile(32, 32, 16, 4, 1),
    ("fp64", False, True): Tile(32, 16, 16, 4, 2),
    ("fp64", False, False): Tile(32, 32, 16, 4, 2),
    ("fp64", True, True): Tile(32, 16, 16, 4, 1),
    ("fp64", True, False): Tile(32, 32, 16, 4, 1),
}


def run(table: Table, jobs: Sequence[Job], wide: bool, device: torch.device) -> None:
    """Write every ``out``; waits for nothing but the copies to the device."""
    jobs = [job for job in jobs if job.out.numel()]
    if not jobs:
        return
    flat = torch.float64 if wide else torch.float32
    weights = torch.cat([job.w.detach().reshape(-1).to(flat) for job in jobs]).to(device)
    starts = np.cumsum([0, *(job.w.numel() for job in jobs)])
    fields = [
        (job.x.first, job.x.count, job.x.columns, job.w.shape[1], at, job.out.data_ptr(), *job.out.stride())
        for job, at in zip(jobs, starts, strict=False)
    ]
    groups: dict[tuple[str, str, str, str, tl.dtype, Tile], list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(_variant(job, wide), []).append(i)
    units = [np.concatenate([_units(i, jobs[i], variant[5]) for i in members]) for variant, members in groups.items()]
    job_table, *units_there = upload([np.asarray(fields, dtype=np.int64), *units], device)
    rows = table.on(device)
    with on(device):
        for variant, own, there in zip(groups, units, units_there, strict=True):
            transposed_kernel[(len(own),)](there, job_table, rows, table.total, weights, **options(variant))


def options(variant: tuple[str, str, str, str, tl.dtype, Tile]) -> dict[str, object]:
    """Give what ``transposed_kernel`` is compiled for, and how."""
    return {**dict(zip(("KIND", "FORM", "KIND_V", "FORM_V", "TYPE"), variant, strict=False)), **variant[5]._asdict()}


def tile_of(compute: tl.dtype, singly: bool, columns: int) -> Tile:
    """Look a configuration up."""
    return TILES[compute.name, singly, columns <= 16]


def _variant(job: Job, wide: bool) -> tuple[str, str, str, str, tl.dtype, Tile]:
    """What the kernel is compiled for, by the job alone: a batch must give the bits of its members."""
    compute = compute_type([job.x.kind, "f32"], wide)
    tile = tile_of(compute, job.x.form == "any", job.w.shape[1])
    return job.x.kind, job.x.form, KINDS[job.out.dtype], form_of(job.out), compute, tile


def _units(i: int, job: Job, tile: Tile) -> NDArray[np.int64]:
    across, down = -(-job.w.shape[1] // tile.BLOCK_K), -(-job.x.columns // tile.BLOCK_D)
    units = np.arange(down * across)
    return np.stack([np.full_like(units, i), units // across, units % across], axis=1)


@triton.jit(do_not_specialize=["total"])
def transposed_kernel(
    units, jobs, rows, total, weights,
    KIND: tl.constexpr, FORM: tl.constexpr, KIND_V: tl.constexpr, FORM_V: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Make one tile of V; see the module."""
    unit = units + tl.program_id(0).to(tl.int64) * 3
    job = jobs + tl.load(unit) * 8
    columns = tl.load(unit + 1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.load(unit + 2) * BLOCK_K + tl.arange(0, BLOCK_K)
    first, count, d, k = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
    weights += tl.load(job + 4)
    out, down, across = tl.load(job + 5), tl.load(job + 6), tl.load(job + 7)
    if FORM == "rows":
        d = tl.multiple_of(d, vector(KIND))
    if FORM == "columns":
        count = tl.multiple_of(count, vector(KIND))

    acc = tl.zeros((BLOCK_D, BLOCK_K), TYPE)
    x, w = _operands(rows, total, first, 0, count, columns, d, weights, c, k, KIND, FORM, TYPE, BLOCK_R)
    # carried into the turn that multiplies it, as in products_kernel
    for start in range(0, count, BLOCK_R):
        # "ieee": TF32 would drop float32 rows to 11 bits and break the bound
        acc = tl.dot(tl.trans(x), w, acc, input_precision="ieee", out_dtype=TYPE)
        x, w = _operands(
            rows, total, first, start + BLOCK_R, count, columns, d, weights, c, k, KIND, FORM, TYPE, BLOCK_R
        )
    out = out.to(tl.pointer_type(element(KIND_V)))
    put(out, down, across, columns, d, c, k, narrow(acc, element(KIND_V)), KIND_V, FORM_V)


@triton.jit
def _operands(
    rows, total, first, start, count, columns, d, weights, c, k,
    KIND: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Give X ``[BLOCK_R, BLOCK_D]`` and W ``[BLOCK_R, BLOCK_K]`` from row ``start`` on."""
    r = start + tl.arange(0, BLOCK_R).to(tl.int64)
    address, stride, code = row_ends(rows, total, first, r, count, KIND, FORM)
    x = row_tile(address, stride, code, columns, (r < count)[:, None] & (columns < d)[None, :], KIND, FORM, TYPE)
    w = tl.load(weights + r[:, None] * k + c[None, :], mask=(r < count)[:, None] & (c < k)[None, :], other=0.0)
    return x, w
