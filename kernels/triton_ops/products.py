"""Inner products of long rows, for a batch of pairs of matrices: ``left [L, d] . right [R, d]^T`` in float64.

What gram, the products of combine, sketch and power share: few rows, many columns, an answer that is small.

Grid: one axis of units, a row of the table each: (job, tile of left rows, tile of right rows, slab of columns). A
program sums its slab in float32 over 128 columns at a time (on tensor cores where both sides have the same
half-precision dtype, with IEEE float32 products else, in float64 throughout where that is asked for), adds those sums
in float64 registers and writes its tile to the workspace. A second launch adds the slabs of every entry in their
order. Slabs depend on the job's sizes alone and nothing is added atomically: neither run nor company changes a bit.

Count. The first launch reads ``(L n_R + R n_L) d`` entries for ``n_L, n_R`` tiles a side, from memory once and from
the L2 cache otherwise, and makes ``2 L R d`` operations (half of it for a symmetric answer). The floor is the larger
of ``(L + R) d`` entries over the card's bandwidth and the operations over its rate. On an H100 a Gram matrix of 1600
rows reaches 0.2 of it in half precision (every 128 columns the sums are converted to float64 at a sixteenth of
float32's rate), 0.13 in float32, 0.38 in float64. Form ``"any"`` loads single entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from loraspan.ops.places import fetched
from loraspan.triton_ops.launch import INTERPRETING, architecture_of, compute_type, on, upload
from loraspan.triton_ops.philox import signs
from loraspan.triton_ops.rows import Rows, Table, row_ends, row_tile, vector

# columns per float32 sum: the bound of the operators
_CHUNK = tl.constexpr(128)
# of the second launch, by whether there are many slabs: entries, and slabs that are loaded together
ADD_TILES = {
    True: {"BLOCK_L": 64 if INTERPRETING else 4, "BLOCK_R": 64, "SLABS": 8},
    False: {"BLOCK_L": 64 if INTERPRETING else 16, "BLOCK_R": 64, "SLABS": 1},
}
_MANY = 4
# programs that a job makes, at the least, where its columns allow it: twice the multiprocessors of a large card
_WANTED, _LEAST_SLAB = 264, 512


class Job(NamedTuple):
    """``left . right^T``; without ``right`` it is symmetric, or, where ``width`` is given, ``left @ Omega``."""

    left: Rows
    right: Rows | None = None
    width: int | None = None

    @property
    def symmetric(self) -> bool:
        """Whether it is ``left . left^T``."""
        return self.right is None and self.width is None


class Tile(NamedTuple):
    """A configuration: the tile, columns per dot (UNROLL of them in a row), warps and stages."""

    BLOCK_L: int
    BLOCK_R: int
    BLOCK_D: int
    UNROLL: int
    num_warps: int
    num_stages: int


# by (type of the products, entries read singly, rows of the larger side up to 32, first architecture it is for). Small
# jobs are bound by memory and take the tile that wastes least; large ones the largest that fits the registers, beside
# the float64 sums, and 64 KB of shared memory, or what an H100 has.
TILES = {
    ("half", False, True, "any"): Tile(32, 32, 128, 1, 2, 2),
    ("half", False, False, "any"): Tile(64, 64, 64, 2, 8, 2),
    ("half", False, False, "sm90"): Tile(128, 64, 64, 2, 8, 3),
    ("fp32", False, True, "any"): Tile(32, 32, 32, 1, 4, 2),
    ("fp32", False, False, "any"): Tile(64, 32, 16, 1, 4, 3),
    ("fp64", False, True, "any"): Tile(32, 32, 16, 1, 4, 1),
    ("fp64", False, False, "any"): Tile(32, 32, 16, 1, 4, 1),
    ("half", True, True, "any"): Tile(16, 16, 32, 1, 2, 1),
    ("half", True, False, "any"): Tile(32, 32, 32, 1, 4, 1),
    ("fp32", True, True, "any"): Tile(16, 16, 32, 1, 2, 1),
    ("fp32", True, False, "any"): Tile(16, 32, 16, 1, 4, 1),
    ("fp64", True, True, "any"): Tile(16, 16, 16, 1, 2, 1),
    ("fp64", True, False, "any"): Tile(32, 32, 16, 1, 4, 1),
}


def tile_of(compute: tl.dtype, singly: bool, rows: int, architecture: str) -> Tile:
    """Look a configuration up."""
    key = compute.name if compute in (tl.float32, tl.float64) else "half", singly, rows <= 32
    tile = TILES.get((*key, architecture)) or TILES[(*key, "any")]
    # the interpreter's time is in the turns of the loop, not in the entries
    return tile._replace(BLOCK_D=max(tile.BLOCK_D, 64), UNROLL=min(tile.UNROLL, 2)) if INTERPRETING else tile


class Plan(NamedTuple):
    """How one job is done, by itself and its device alone: a batch must give the bits of its members."""

    variant: tuple[str, str, str, str, tl.dtype, Tile]
    # tiles of left rows, tiles of right rows, slabs of columns
    counts: tuple[int, int, int]
    slab: int
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Entries of the answer."""
        return self.shape[0] * self.shape[1]


def plan(job: Job, wide: bool, architecture: str) -> Plan:
    """Choose the kernel's variant, and slabs (of a multiple of 128 columns) that give the device enough programs."""
    left, right = job.left, job.right or job.left
    drawn = job.width is not None
    rows = job.width if job.width is not None else right.count
    compute = compute_type([left.kind] if drawn else [left.kind, right.kind], wide)
    singly = left.form == "any" or (right.form == "any" and not drawn)
    tile = tile_of(compute, singly, max(left.count, rows), architecture)
    kind, form = ("signs", "signs") if drawn else (right.kind, right.form)
    down, across = -(-left.count // tile.BLOCK_L), -(-rows // tile.BLOCK_R)
    tiles = max(down * across // (2 if job.symmetric else 1), 1)
    splits = max(min(-(-_WANTED // tiles), left.columns // _LEAST_SLAB), 1)
    slab = -(-max(left.columns, 1) // (splits * 128)) * 128
    variant = (left.kind, left.form, kind, form, compute, tile)
    return Plan(variant, (down, across, -(-left.columns // slab)), slab, (left.count, rows))


def run(table: Table, jobs: Sequence[Job], wide: bool, device: torch.device, seed: int = 0) -> list[torch.Tensor]:
    """Give the answer of every job, float64 ``[L, R]`` on the CPU; waits for the device once."""
    plans = [plan(job, wide, architecture_of(device)) for job in jobs]
    out = torch.empty(sum(one.size for one in plans), dtype=torch.float64, device=device)
    if out.numel():
        _launch(table, jobs, plans, out, seed)
    parts = torch.split(fetched(out), [one.size for one in plans])
    return [flat.view(one.shape) for flat, one in zip(parts, plans, strict=True)]


def _launch(table: Table, jobs: Sequence[Job], plans: Sequence[Plan], out: torch.Tensor, seed: int) -> None:
    groups: dict[tuple[str, str, str, str, tl.dtype, Tile], list[int]] = {}
    for i, one in enumerate(plans):
        if one.size and one.counts[2]:
            groups.setdefault(one.variant, []).append(i)
    direct = [one.counts[2] == 1 and not job.symmetric for job, one in zip(jobs, plans, strict=True)]
    spaces = [0 if own else one.size * one.counts[2] for own, one in zip(direct, plans, strict=True)]
    starts = np.cumsum([0, *spaces])
    partial = torch.empty(int(starts[-1]), dtype=torch.float64, device=out.device)
    places = [out.data_ptr() + 8 * int(at) for at in np.cumsum([0, *(one.size for one in plans)])]
    sums = [
        to if own else partial.data_ptr() + 8 * int(at) for own, at, to in zip(direct, starts, places, strict=False)
    ]
    fields = [
        (*_ends(job, one), one.slab, own, to, one.counts[2], job.symmetric)
        for job, one, own, to in zip(jobs, plans, sums, places, strict=False)
    ]
    units = [np.concatenate([_units(i, jobs[i], plans[i]) for i in members]) for members in groups.values()]
    adds = {many: [_add_units(i, plans[i], many) for i in _added(plans, direct, many)] for many in ADD_TILES}
    last = [np.concatenate([np.empty((0, 3), dtype=np.int64), *own]) for own in adds.values()]
    job_table, *units_there = upload([np.asarray(fields, dtype=np.int64), *units, *last], out.device)
    rows = table.on(out.device)
    with on(out.device):
        for variant, own, there in zip(groups, units, units_there, strict=False):
            products_kernel[(len(own),)](
                there, job_table, rows, table.total, seed & 0xFFFFFFFF, seed >> 32, **options(variant)
            )
        for many, own, there in zip(adds, last, units_there[len(units) :], strict=True):
            if len(own):
                add_kernel[(len(own),)](there, job_table, **ADD_TILES[many])


def options(variant: tuple[str, str, str, str, tl.dtype, Tile]) -> dict[str, object]:
    """Give what ``products_kernel`` is compiled for, and how."""
    names = ("KIND_L", "FORM_L", "KIND_R", "FORM_R", "TYPE")
    return {**dict(zip(names, variant, strict=False)), **variant[5]._asdict()}


def _ends(job: Job, one: Plan) -> tuple[int, int, int, int, int]:
    return job.left.first, one.shape[0], (job.right or job.left).first, one.shape[1], job.left.columns


def _units(i: int, job: Job, one: Plan) -> NDArray[np.int64]:
    units = _pattern(*one.counts, one.variant[5] if job.symmetric else None).copy()
    units[:, 0] = i
    return units


@lru_cache(maxsize=1024)
def _pattern(left: int, right: int, splits: int, lower: Tile | None) -> NDArray[np.int64]:
    """Units ``[., 4]`` of one job; of a symmetric one, tiles that reach the diagonal or lie below it."""
    s, i, j = (axis.ravel() for axis in np.meshgrid(*map(np.arange, (splits, left, right)), indexing="ij"))
    keep = np.ones(len(s), dtype=bool) if lower is None else (i + 1) * lower.BLOCK_L > j * lower.BLOCK_R
    return np.stack([np.zeros_like(s), i, j, s], axis=1)[keep]


def _added(plans: Sequence[Plan], direct: Sequence[bool], many: bool) -> list[int]:
    """Say which answers the second launch makes: of many slabs, or of few."""
    return [i for i, one in enumerate(plans) if not direct[i] and (one.counts[2] >= _MANY) == many]


def _add_units(i: int, one: Plan, many: bool) -> NDArray[np.int64]:
    tile = ADD_TILES[many]
    units = _pattern(-(-one.shape[0] // tile["BLOCK_L"]), -(-one.shape[1] // tile["BLOCK_R"]), 1, None)[:, :3].copy()
    units[:, 0] = i
    return units


@triton.jit(do_not_specialize=["total", "seed_low", "seed_high"])
def products_kernel(
    units, jobs, rows, total, seed_low, seed_high,
    KIND_L: tl.constexpr, FORM_L: tl.constexpr, KIND_R: tl.constexpr, FORM_R: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sum one slab of columns of one tile of one job; see the module."""
    unit = units + tl.program_id(0).to(tl.int64) * 4
    job = jobs + tl.load(unit) * 10
    i = tl.load(unit + 1) * BLOCK_L + tl.arange(0, BLOCK_L)
    j = tl.load(unit + 2) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.load(unit + 3)
    left, right, d = tl.load(job + 1), tl.load(job + 3), tl.load(job + 4)
    slab = tl.multiple_of(tl.load(job + 5), 128)
    if FORM_L == "columns":
        left = tl.multiple_of(left, vector(KIND_L))
    if FORM_R == "columns":
        right = tl.multiple_of(right, vector(KIND_R))
    start = split * slab
    end = tl.minimum(start + slab, d)
    if FORM_L == "rows":
        end = tl.multiple_of(end, vector(KIND_L))
    elif FORM_R == "rows":
        end = tl.multiple_of(end, vector(KIND_R))
    address_l, stride_l, code_l = row_ends(rows, total, tl.load(job), i, left, KIND_L, FORM_L)
    if FORM_R != "signs":
        address_r, stride_r, code_r = row_ends(rows, total, tl.load(job + 2), j, right, KIND_R, FORM_R)

    lower_l, lower_r = (i < left)[:, None], (j < right)[:, None]
    acc = tl.zeros((BLOCK_L, BLOCK_R), tl.float64)
    if tl.float64 == TYPE:
        # A tile is carried into the turn that multiplies it: Triton gives a float64 dot whose operand it sees come
        # from a narrower load a layout that its own lowering then rejects.
        columns = start + tl.arange(0, BLOCK_D)
        inside = (columns < end)[None, :]
        x = row_tile(address_l, stride_l, code_l, columns, lower_l & inside, KIND_L, FORM_L, TYPE)
        if FORM_R == "signs":
            y = signs(columns, j.to(tl.int32), seed_low, seed_high).to(TYPE)
        else:
            y = row_tile(address_r, stride_r, code_r, columns, lower_r & inside, KIND_R, FORM_R, TYPE)
        for chunk in range(start, end, BLOCK_D):
            acc = tl.dot(x, tl.trans(y), acc, input_precision="ieee", out_dtype=tl.float64)
            columns = chunk + BLOCK_D + tl.arange(0, BLOCK_D)
            inside = (columns < end)[None, :]
            x = row_tile(address_l, stride_l, code_l, columns, lower_l & inside, KIND_L, FORM_L, TYPE)
            if FORM_R == "signs":
                y = signs(columns, j.to(tl.int32), seed_low, seed_high).to(TYPE)
            else:
                y = row_tile(address_r, stride_r, code_r, columns, lower_r & inside, KIND_R, FORM_R, TYPE)
    else:
        for chunk in range(start, end, _CHUNK):
            part = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
            for step in range(0, _CHUNK, BLOCK_D * UNROLL):
                for turn in tl.static_range(UNROLL):
                    columns = chunk + step + turn * BLOCK_D + tl.arange(0, BLOCK_D)
                    inside = (columns < end)[None, :]
                    # [BLOCK_L, BLOCK_D] and [BLOCK_R, BLOCK_D]
                    x = row_tile(address_l, stride_l, code_l, columns, lower_l & inside, KIND_L, FORM_L, TYPE)
                    if FORM_R == "signs":
                        y = signs(columns, j.to(tl.int32), seed_low, seed_high).to(TYPE)
                    else:
                        y = row_tile(address_r, stride_r, code_r, columns, lower_r & inside, KIND_R, FORM_R, TYPE)
                    # "ieee": TF32 would drop float32 rows to 11 bits and break the bound
                    part = tl.dot(x, tl.trans(y), part, input_precision="ieee")
            acc += part.to(tl.float64)

    base = tl.load(job + 6).to(tl.pointer_type(tl.float64))
    inside = (i < left)[:, None] & (j < right)[None, :]
    # of a symmetric answer the lower half
    beyond = tl.where(tl.load(job + 9) == 0, right, 0)
    at = base + (split * left + i[:, None]) * right + j[None, :]
    tl.store(at, acc, mask=inside & (i[:, None] + beyond >= j[None, :]))


@triton.jit
def add_kernel(units, jobs, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, SLABS: tl.constexpr):
    """Add the slabs of a tile of a job in a fixed order; the upper half of a symmetric answer is the lower one."""
    unit = units + tl.program_id(0).to(tl.int64) * 3
    job = jobs + tl.load(unit) * 10
    i = (tl.load(unit + 1) * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]
    j = (tl.load(unit + 2) * BLOCK_R + tl.arange(0, BLOCK_R))[None, :]
    left, right, splits = tl.load(job + 1), tl.load(job + 3), tl.load(job + 8)
    inside = (i < left) & (j < right)
    upper = i + tl.where(tl.load(job + 9) == 0, right, 0) < j
    source = tl.load(job + 6).to(tl.pointer_type(tl.float64)) + tl.where(upper, j * right + i, i * right + j)
    acc = tl.zeros((BLOCK_L, BLOCK_R), tl.float64)
    # [SLABS, BLOCK_L, BLOCK_R] at once: a load at a time would wait for memory once a slab
    turn = tl.arange(0, SLABS)[:, None, None]
    for split in range(0, splits, SLABS):
        at = source[None, :, :] + (split + turn) * (left * right)
        acc += tl.sum(tl.load(at, mask=inside[None, :, :] & (split + turn < splits), other=0.0), axis=0)
    tl.store(tl.load(job + 7).to(tl.pointer_type(tl.float64)) + i * right + j, acc, mask=inside)
