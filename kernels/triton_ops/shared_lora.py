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
``2 T (d k_in + n k_out)`` operations on the bases. At T up to about 100 the floor is ``d k_in + n k_out`` entries of
the bases over the bandwidth, a few microseconds, and two launches take about as long. A program of the second meets the
columns of its 16 rows, some columns at once, and then takes as many tiles of n as leave programs for the whole card.
On an H100, 64 rows of 64 tasks, d = n = 4096, k = 64, r = 16: 17 us in half precision and 21 us in float32 in a CUDA
graph, where the plain product of rank k takes 14 us and 18 us; 1024 rows 65 us against 24 us.
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
from loraspan.triton_ops.shared_lora_kernels import expand_kernel, shrink_kernel
from loraspan.triton_ops.strided import form_of


class Tile(NamedTuple):
    """A configuration of the first launch: rows, columns of d and of k_in per program, warps and stages."""

    BLOCK_T: int
    BLOCK_D: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Expansion(NamedTuple):
    """A configuration of the second launch: rows, columns of y, of a task and slabs per turn, warps and stages."""

    BLOCK_T: int
    BLOCK_N: int
    BLOCK_C: int
    BLOCK_S: int
    num_warps: int
    num_stages: int


# by (type of x V, rows up to 64); at last what is read singly
TILES = {
    ("half", True): Tile(16, 128, 32, 4, 3),
    ("half", False): Tile(64, 64, 64, 8, 3),
    ("fp32", True): Tile(16, 64, 32, 8, 2),
    ("fp32", False): Tile(32, 32, 32, 4, 2),
    ("fp64", True): Tile(16, 16, 16, 4, 1),
    ("fp64", False): Tile(32, 16, 16, 8, 1),
    ("any", True): Tile(16, 32, 32, 8, 2),
}
# 16 rows, since z, g and the loadings of some columns of each row lie in registers; by (type of the ends, those where V
# has more than 64 columns or is read singly apart, architecture)
EXPANSIONS = {
    ("half", "any"): Expansion(16, 64, 4, 4, 8, 1),
    ("half", "sm90"): Expansion(16, 128, 8, 4, 8, 1),
    ("fp32", "any"): Expansion(16, 64, 4, 4, 8, 1),
    ("fp64", "any"): Expansion(16, 32, 1, 1, 4, 1),
    ("large", "any"): Expansion(16, 32, 1, 1, 8, 1),
    ("large fp64", "any"): Expansion(16, 16, 1, 1, 8, 1),
}
# columns of V: those of z
_WIDEST = 512
_LEAST_SLAB = 256
_MOST_SLABS = 16
# programs that fill a large card
_PROGRAMS = 128


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
    ONCE: bool
    SHARES: bool
    tile: Tile
    expansion: Expansion


def run(
    y: Tensor, x: Tensor, v: Tensor, u: Tensor, cores: Cores, tasks: Tensor, shares: Tensor | None, scale: float
) -> None:
    """Add to ``y`` in place; waits for nothing."""
    if not y.numel() or not tasks.numel():
        return
    (rows, n), d, mixture = y.shape, x.shape[1], tasks.shape[1]
    variant = variant_of(y, x, v, u, cores, shares, rows)
    tile, expansion, private = variant.tile, variant.expansion, cores.most[1] + cores.most[3]
    tiles = triton.cdiv(rows, tile.BLOCK_T) * triton.cdiv(v.shape[1], tile.BLOCK_K)
    slabs = max(min(d // _LEAST_SLAB, _MOST_SLABS, triton.cdiv(_PROGRAMS, max(tiles, 1))), 1)
    slab = -(-max(d, 1) // (slabs * 128)) * 128
    slabs = -(-max(d, 1) // slab)
    width = v.shape[1] + mixture * private
    wide = torch.float64 if tl.float64 == variant.TYPE else torch.float32
    sums = torch.empty(slabs * rows * width, dtype=wide, device=y.device)
    sizes = (mixture, cores.index.shape[0], private, slabs)
    ends = (cores.left, cores.left_private, cores.right)
    high, turns = triton.cdiv(rows, expansion.BLOCK_T), triton.cdiv(n, expansion.BLOCK_N)
    # what is made of a row's columns serves all turns of a program
    wide = triton.cdiv(turns, max(_PROGRAMS // high, 1)) * expansion.BLOCK_N
    places = (*cores.index.stride(), *tasks.stride())
    with on(y.device):
        if width:
            across = triton.cdiv(v.shape[1], tile.BLOCK_K) + mixture * private
            shrink_kernel[(triton.cdiv(rows, tile.BLOCK_T) * slabs, across)](
                x, v, cores.index, cores.right_private, tasks, sums, rows, d, v.shape[1], *sizes, slab,
                cores.right_private.shape[0], *x.stride(), *v.stride(), *places, **shrink_options(variant),
            )  # fmt: skip
        weighted = tasks if shares is None else shares
        expand_kernel[(high * triton.cdiv(n, wide),)](
            y, u, cores.index, cores.weights, *ends, tasks, weighted, sums, bits(scale), rows, n, v.shape[1],
            u.shape[1], *sizes, wide, *(table.shape[0] for table in ends[1:]), *y.stride(), *u.stride(), *places,
            *weighted.stride(), **expand_options(variant, architecture_of(y.device)),
        )  # fmt: skip


def variant_of(y: Tensor, x: Tensor, v: Tensor, u: Tensor, cores: Cores, shares: Tensor | None, rows: int) -> Variant:
    """Choose the kernels for a call."""
    wide = torch.float64 in (y.dtype, x.dtype, v.dtype, u.dtype, cores.left.dtype)
    compute = compute_type([KINDS[x.dtype], KINDS[v.dtype]], wide)
    tables = (cores.left, cores.left_private, cores.right, cores.right_private)
    ends = "rows" if all(form_of(table) == "rows" for table in tables if table.numel()) else "any"
    layouts = [field for tensor in (y, x, v, u) for field in (KINDS[tensor.dtype], form_of(tensor))]
    width_in, width_out = (max(triton.next_power_of_2(basis.shape[1]), 16) for basis in (v, u))
    kinds = (*layouts, KINDS[cores.left.dtype], ends)
    singly = "any" in kinds
    expansion = expansion_of(wide, singly or width_in > 64, KINDS[cores.left.dtype], architecture_of(y.device))
    tile = tile_of(compute, rows, singly)
    if INTERPRETING:
        # the interpreter's time is in programs and turns of loops, not in entries
        tile, expansion = (
            tile._replace(BLOCK_D=128),
            expansion._replace(BLOCK_T=32, BLOCK_N=128, BLOCK_C=16, BLOCK_S=16),
        )
    return Variant(*kinds, compute, width_in, min(width_out, 64), width_out <= 64, shares is not None, tile, expansion)


def tile_of(compute: tl.dtype, rows: int, singly: bool) -> Tile:
    """Look a configuration up."""
    if singly:
        return TILES["any", True]
    return TILES[compute.name if compute in (tl.float32, tl.float64) else "half", rows <= 64]


def expansion_of(wide: bool, large: bool, ends: str, architecture: str) -> Expansion:
    """Look a configuration of the second launch up."""
    if large:
        name = "large fp64" if wide else "large"
    else:
        name = "fp64" if wide else "half" if ends in ("f16", "bf16") else "fp32"
    return EXPANSIONS.get((name, architecture), EXPANSIONS[name, "any"])


def shrink_options(variant: Variant) -> dict[str, object]:
    """Give what ``shrink_kernel`` is compiled for, and how."""
    names = ("KIND_X", "FORM_X", "KIND_V", "FORM_V", "KIND_E", "FORM_E", "TYPE")
    return {**{name: getattr(variant, name) for name in names}, **variant.tile._asdict()}


def expand_options(variant: Variant, architecture: str) -> dict[str, object]:
    """Give what ``expand_kernel`` is compiled for, and how."""
    names = ("KIND_Y", "FORM_Y", "KIND_U", "FORM_U", "KIND_E", "FORM_E", "WIDTH_IN", "WIDTH_OUT", "ONCE", "SHARES")
    wide = tl.float64 if tl.float64 == variant.TYPE else tl.float32
    own = {"SUM": wide, "PRECISION": _precision(variant, architecture), **variant.expansion._asdict()}
    if architecture != "hip" and not INTERPRETING:
        # said aloud, or ptxas spills a few registers for the sake of a third block per multiprocessor
        own["maxnreg"] = 255
    return {**{name: getattr(variant, name) for name in names}, **own}


def _precision(variant: Variant, architecture: str) -> str:
    # each side of float32 in three parts of 8 bits, whose products the tensor cores make: what is left out is below
    # 2^-25 of a product. TF32 would drop g to 11 bits and break the bound.
    # AMD's matrix cores have float32 of their own.
    return "ieee" if INTERPRETING or architecture == "hip" or tl.float64 == variant.TYPE else "bf16x6"


def refuses(y: Tensor, _x: Tensor, v: Tensor, *_: object) -> str | None:
    """Say why this call cannot be run, if it cannot."""
    if v.shape[1] > _WIDEST:
        return f"v has {v.shape[1]} columns, and it takes at most {_WIDEST}"
    return launch.refuses([y.device])
