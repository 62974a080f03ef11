"""reconstruct: ``out = scale * basis @ loadings`` for many pieces at once, or for one piece or batch of them.

Grid: one axis, a program per tile of an ``out``. One piece, or one batch ``[N, ., .]``, comes as arguments of the
launch: no copy, no wait, so a CUDA graph may capture it. Many pieces come through tables of addresses, one launch per
combination of dtypes, storage and class of size; the tables of the last calls stay on the device, so that a call with
the same tensors copies nothing and may be captured too. Sums are float32 on tensor cores where basis and loadings have
the same half-precision dtype, IEEE float32 else, float64 where a tensor is float64.

Count. Reads ``m k + k p`` entries (the strip of basis of a row of tiles once from memory, then from cache), writes
``m p`` and makes ``2 m k p`` operations. With k of 16 to 64 memory bounds it: the floor is the ``m p`` entries of out
over the bandwidth. On an H100 24 pieces of one task reach 0.39 of that floor in half precision and 0.22 in float32, 100
tasks of them 0.26 and 0.11.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from loraspan.ops.reconstruct import Piece
from loraspan.triton_ops import launch
from loraspan.triton_ops.launch import KINDS, compute_type, on
from loraspan.triton_ops.rounding import narrow
from loraspan.triton_ops.rows import element
from loraspan.triton_ops.strided import entries, form_of, put


class Tile(NamedTuple):
    """A configuration: the tile of out, inner size of a dot, warps and stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# by (type of the products or "copy", columns of out up to 16)
TILES = {
    ("half", True): Tile(64, 16, 32, 4, 2),
    ("half", False): Tile(64, 64, 32, 4, 2),
    ("fp32", True): Tile(64, 16, 16, 4, 2),
    ("fp32", False): Tile(64, 32, 16, 4, 2),
    ("fp64", True): Tile(32, 16, 16, 4, 1),
    ("fp64", False): Tile(32, 32, 16, 8, 1),
    ("copy", True): Tile(64, 16, 16, 4, 1),
    ("copy", False): Tile(32, 64, 16, 4, 1),
}
# tables of the last calls, by device and content: at most this many, of a few KB each
_KEPT = 64
_tables: OrderedDict[tuple[torch.device, bytes], Tensor] = OrderedDict()


class Variant(NamedTuple):
    """What a kernel is compiled for, by the piece alone: a batch must give the bits of its members."""

    KIND_B: str
    FORM_B: str
    KIND_L: str
    FORM_L: str
    KIND_O: str
    FORM_O: str
    TYPE: tl.dtype
    tile: Tile


def run(pieces: Sequence[Piece]) -> None:
    """Write every ``out``; waits for nothing."""
    pieces = [piece for piece in pieces if piece.out.numel()]
    if not pieces:
        return
    with on(pieces[0].out.device):
        if len(pieces) == 1:
            _run_one(_apart(pieces[0]))
        else:
            _run_many(pieces)


def _apart(piece: Piece) -> Piece:
    """Copy a basis that ``out`` may write to: a tile of ``out`` is written while another one is made."""
    basis, _, out, _ = piece
    spans = [
        (
            t.data_ptr(),
            t.data_ptr()
            + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) * t.element_size()
            + t.element_size(),
        )
        for t in (basis, out)
        if t.numel()
    ]
    overlap = len(spans) == 2 and spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]
    return piece._replace(basis=basis.clone()) if overlap else piece


def _run_one(piece: Piece) -> None:
    basis, loadings, out, scale = piece
    variant = variant_of(piece)
    tile = variant.tile
    m, p = out.shape[-2:]
    count = out.shape[0] if out.ndim == 3 else 1
    weights = basis if loadings is None else loadings
    strides = [t.stride() if t.ndim == 3 else (0, *t.stride()) for t in (basis, weights, out)]
    grid = (count * triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(p, tile.BLOCK_N),)
    piece_kernel[grid](
        basis, weights, out, bits(scale), m, basis.shape[-1], p, *strides[0], *strides[1], *strides[2],
        **options(variant),
    )  # fmt: skip


def _run_many(pieces: Sequence[Piece]) -> None:
    groups: dict[Variant, list[int]] = {}
    for i, piece in enumerate(pieces):
        groups.setdefault(variant_of(piece), []).append(i)
    arrays = [np.asarray([_fields(piece) for piece in pieces], dtype=np.int64)]
    for variant, members in groups.items():
        arrays.append(np.concatenate([_units(i, pieces[i], variant.tile) for i in members]))
    jobs, *units = _kept(arrays, pieces[0].out.device)
    for variant, array, own in zip(groups, arrays[1:], units, strict=True):
        pieces_kernel[(len(array),)](own, jobs, **options(variant))


def variant_of(piece: Piece) -> Variant:
    """Choose the kernel for a piece."""
    basis, loadings, out, _ = piece
    kinds = [KINDS[t.dtype] for t in (basis, loadings, out) if t is not None]
    compute = compute_of(kinds, loadings is not None)
    kind, form = ("none", "any") if loadings is None else (kinds[1], form_of(loadings))
    tile = tile_of(compute, loadings is not None, out.shape[-1])
    return Variant(kinds[0], form_of(basis), kind, form, kinds[-1], form_of(out), compute, tile)


def compute_of(kinds: Sequence[str], product: bool) -> tl.dtype:
    """Give the type that products of these kinds (that of out last) are made in."""
    if product or "f64" in kinds:
        return compute_type(kinds[:-1], "f64" in kinds)
    return tl.float32


def tile_of(compute: tl.dtype, product: bool, columns: int) -> Tile:
    """Look a configuration up."""
    name = compute.name if compute in (tl.float32, tl.float64) else "half"
    return TILES[name if product else "copy", columns <= 16]


def options(variant: Variant) -> dict[str, object]:
    """Give what the kernels are compiled for, and how."""
    return {**dict(list(variant._asdict().items())[:-1]), **variant.tile._asdict()}


def bits(scale: float) -> int:
    """Give a float64 as the integer with its bits: Triton would round the number to float32."""
    return int(struct.unpack("<q", struct.pack("<d", scale))[0])


def _fields(piece: Piece) -> tuple[int, ...]:
    basis, loadings, out, scale = piece
    weights = basis if loadings is None else loadings
    places = [field for t in (basis, weights, out) for field in (t.data_ptr(), *t.stride())]
    return (*places, bits(scale), out.shape[0], basis.shape[1], out.shape[1])


def _units(i: int, piece: Piece, tile: Tile) -> NDArray[np.int64]:
    across, down = triton.cdiv(piece.out.shape[1], tile.BLOCK_N), triton.cdiv(piece.out.shape[0], tile.BLOCK_M)
    units = np.arange(down * across)
    return np.stack([np.full_like(units, i), units], axis=1)


def _kept(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Give the arrays on ``device``; the same ones as an earlier call are there already."""
    sizes = [array.size for array in arrays]
    host = np.concatenate([array.ravel() for array in arrays])
    key = (device, host.tobytes())
    if key not in _tables:
        ready = torch.from_numpy(host)
        _tables[key] = ready.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ready
        while len(_tables) > _KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return list(torch.split(_tables[key], sizes))


def refuses(pieces: Sequence[Piece]) -> str | None:
    """Say why these pieces cannot be made, if they cannot."""
    return launch.refuses(piece.out.device for piece in pieces)


# the arguments of `piece_kernel` that are numbers: one compilation for all of their values
NUMBERS = [
    "scale", "m", "k", "p",
    "basis_stride_b", "basis_stride_m", "basis_stride_k", "loadings_stride_b", "loadings_stride_k",
    "loadings_stride_n", "out_stride_b", "out_stride_m", "out_stride_n",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def piece_kernel(
    basis, loadings, out, scale, m, k, p,
    basis_stride_b, basis_stride_m, basis_stride_k,
    loadings_stride_b, loadings_stride_k, loadings_stride_n,
    out_stride_b, out_stride_m, out_stride_n,
    KIND_B: tl.constexpr, FORM_B: tl.constexpr, KIND_L: tl.constexpr, FORM_L: tl.constexpr,
    KIND_O: tl.constexpr, FORM_O: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Make one tile of one member of a batch."""
    m, k, p = m.to(tl.int64), k.to(tl.int64), p.to(tl.int64)
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(p, BLOCK_N)
    b, unit = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    _tile(
        basis + b * basis_stride_b, loadings + b * loadings_stride_b, out + b * out_stride_b,
        scale.to(tl.int64), m, k, p, unit,
        basis_stride_m.to(tl.int64), basis_stride_k.to(tl.int64), loadings_stride_k.to(tl.int64),
        loadings_stride_n.to(tl.int64), out_stride_m.to(tl.int64), out_stride_n.to(tl.int64),
        KIND_B, FORM_B, KIND_L, FORM_L, KIND_O, FORM_O, TYPE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def pieces_kernel(
    units, jobs,
    KIND_B: tl.constexpr, FORM_B: tl.constexpr, KIND_L: tl.constexpr, FORM_L: tl.constexpr,
    KIND_O: tl.constexpr, FORM_O: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Make one tile of one piece of the table."""
    unit = units + tl.program_id(0).to(tl.int64) * 2
    job = jobs + tl.load(unit) * 13
    KIND_W: tl.constexpr = KIND_B if KIND_L == "none" else KIND_L
    _tile(
        tl.load(job).to(tl.pointer_type(element(KIND_B))), tl.load(job + 3).to(tl.pointer_type(element(KIND_W))),
        tl.load(job + 6).to(tl.pointer_type(element(KIND_O))),
        tl.load(job + 9), tl.load(job + 10), tl.load(job + 11), tl.load(job + 12), tl.load(unit + 1),
        tl.load(job + 1), tl.load(job + 2), tl.load(job + 4), tl.load(job + 5), tl.load(job + 7), tl.load(job + 8),
        KIND_B, FORM_B, KIND_L, FORM_L, KIND_O, FORM_O, TYPE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _tile(
    basis, loadings, out, scale, m, k, p, unit, basis_stride_m, basis_stride_k, loadings_stride_k,
    loadings_stride_n, out_stride_m, out_stride_n,
    KIND_B: tl.constexpr, FORM_B: tl.constexpr, KIND_L: tl.constexpr, FORM_L: tl.constexpr,
    KIND_O: tl.constexpr, FORM_O: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # 32 bits: a piece has fewer tiles than that, and a division of 64 bits is a call
    across, unit = tl.cdiv(p, BLOCK_N).to(tl.int32), unit.to(tl.int32)
    rows = (unit // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (unit % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    SUM: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    if KIND_L == "none":
        acc = entries(basis, basis_stride_m, basis_stride_k, rows, m, columns, p, KIND_B, FORM_B).to(SUM)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        inner = tl.arange(0, BLOCK_K).to(tl.int64)
        x = entries(basis, basis_stride_m, basis_stride_k, rows, m, inner, k, KIND_B, FORM_B).to(TYPE)
        y = entries(loadings, loadings_stride_k, loadings_stride_n, inner, k, columns, p, KIND_L, FORM_L).to(TYPE)
        # carried into the turn that multiplies them, as in products_kernel
        for start in range(0, k, BLOCK_K):
            acc = tl.dot(x, y, acc, input_precision="ieee", out_dtype=SUM)
            inner = start + BLOCK_K + tl.arange(0, BLOCK_K)
            x = entries(basis, basis_stride_m, basis_stride_k, rows, m, inner, k, KIND_B, FORM_B).to(TYPE)
            y = entries(loadings, loadings_stride_k, loadings_stride_n, inner, k, columns, p, KIND_L, FORM_L).to(TYPE)
    factor = scale.to(tl.float64, bitcast=True).to(SUM)
    put(out, out_stride_m, out_stride_n, rows, m, columns, p, narrow(factor * acc, element(KIND_O)), KIND_O, FORM_O)
