"""``shared_lora`` on CUDA: two launches with all they need in their arguments, and one workspace between them."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loraspan import _native
from loraspan._cuda import library, rows
from loraspan._cuda.reconstruct import matrix_fields
from loraspan.ops.cores import Cores

# as in kernels/cuda/shared_lora.cu: rows and columns of a tile of the first launch, of it where rows are many, outputs
# of a turn of the second
_TILE, _COLUMNS, _MANY, _OUTPUTS = 16, 32, 256, 128
# columns of x in a slab at least, and slabs at most, whatever the batch: they decide the order of sums
_SLAB, _SLABS = 256, 16
# blocks that fill a large card twice
_BLOCKS = 256
# the shared memory that a block has on every card
_SHARED = 48 * 1024
_FIELDS = 52
_pack = struct.Struct(f"={_FIELDS}q").pack_into
_number, _integer = struct.Struct("=d"), struct.Struct("=q")
# by the cores that the kernels were last told of
_known: WeakKeyDictionary[Cores, _Told] = WeakKeyDictionary()


def run(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
) -> None:
    """Add to ``y`` in place, without waiting for it."""
    count, mixture = tasks.shape
    if not y.numel() or not mixture:
        return
    # the kernels hold their addresses only, and what torch frees it keeps for this stream
    tasks, shares = tasks.contiguous(), None if shares is None else shares.contiguous()
    told = _told(v, u, cores)
    of_y, of_x = matrix_fields(y, False), matrix_fields(x, False)
    if of_x[5] == rows.EIGHTS and not told.even_private:
        # private ends are read beside x, a like run at a time
        of_x = (*of_x[:5], rows.ALONG_COLUMNS)
    halves = of_x[4] == told.bases[4] and of_x[4] in (rows.F16, rows.BF16)
    key = (count, mixture, halves)
    if key not in told.grids:
        told.grids[key] = _grid(told, cores, count, mixture, halves)
    grid = told.grids[key]
    space = torch.empty(grid.floats, dtype=torch.float32, device=y.device)
    at = space.data_ptr()
    table = (ctypes.c_int64 * _FIELDS)()
    _pack(
        table, 0, *of_y, *of_x, *told.bases, count, *told.sizes, *told.ends, tasks.data_ptr(), mixture,
        0 if shares is None else shares.data_ptr(), *_integer.unpack(_number.pack(scale)), at, at + 4 * grid.sums,
        *told.slab, grid.height, grid.wide, told.even,
    )  # fmt: skip
    with library.stream_of(y.device) as stream:
        arguments = ctypes.addressof(table), grid.tiles, grid.blocks, grid.bytes, stream
        library.opened().call("shared_lora", of_x[4] if halves else rows.F32, *arguments)


class _Grid(NamedTuple):
    """Of a batch: blocks of the first launch; blocks, rows, outputs and shared bytes of the second; the workspace."""

    tiles: int
    blocks: int
    height: int
    wide: int
    bytes: int
    sums: int
    floats: int


class _Told(NamedTuple):
    """What the kernels are told of bases and tasks, as they were for these very tensors in this state."""

    state: tuple[object, ...]
    bases: tuple[int, ...]
    # n, d, k_out, k_in
    sizes: tuple[int, int, int, int]
    ends: tuple[int, ...]
    # columns of x in one, and how many
    slab: tuple[int, int]
    # whether shared ends, and private right ones, may be read by 16 bytes
    even: bool
    even_private: bool
    grids: dict[tuple[int, int, bool], _Grid]


def _told(v: Tensor, u: Tensor, cores: Cores) -> _Told:
    """Give what was told last time if nothing was moved, turned or replaced since."""
    tables = (cores.index, cores.weights, cores.left, cores.left_private, cores.right, cores.right_private)
    index, weights, *held = (t.data_ptr() for t in tables)
    state = (v.data_ptr(), u.data_ptr(), v.stride(), u.stride(), v.shape, u.shape, v.dtype, u.dtype, index, *held)
    known = _known.get(cores)
    if known is not None and known.state == state:
        return known
    (d, k_in), (n, k_out) = v.shape, u.shape
    slab = _SLAB * max(-(-d // (_SLAB * _SLABS)), 1)
    left, _, right, right_private = held
    told = _Told(
        state,
        (*matrix_fields(v, True), *matrix_fields(u, False)),
        (n, d, k_out, k_in),
        (index, cores.tasks, weights, *held, _native.DTYPE_CODES[cores.left.dtype], *cores.most),
        (slab, max(-(-d // slab), 1)),
        not (left % 16 or right % 16 or k_in % 8 or k_out % 8),
        right_private % 16 == 0,
        {},
    )
    _known[cores] = told
    return told


def _grid(told: _Told, cores: Cores, count: int, mixture: int, halves: bool) -> _Grid:
    """Share a batch out."""
    n, _, k_out, k_in = told.sizes
    slabs = told.slab[1]
    tiles = -(-count // (2 * _TILE if halves and count > _MANY else _TILE)) * -(-k_in // _COLUMNS)
    row = _row(cores, mixture, k_in, k_out)
    height = min(_TILE, (_SHARED - 4 * _TILE) // row)
    high = -(-count // height)
    # what a block makes of its rows' columns serves all of its outputs
    wide = -(-n // (max(_BLOCKS // high, 1) * _OUTPUTS)) * _OUTPUTS
    sums = count * slabs * k_in
    floats = sums + count * mixture * (cores.most[1] + cores.most[3])
    return _Grid(tiles * slabs, high * -(-n // wide), height, wide, height * row + 4 * _TILE, sums, floats)


def _row(cores: Cores, mixture: int, k_in: int, k_out: int) -> int:
    """Give the bytes of shared memory that a row takes: z, the loads of its columns and g, each with room to spare."""
    return 4 * (-(-k_in // 8) * 8 + -(-mixture * sum(cores.most) // 4) * 4 + -(-k_out // 32) * 32 + 8)


def refuses(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
) -> str | None:
    """Say why this call cannot be taken, if so."""
    del shares, scale
    if (reason := library.refuses([y.device])) is not None:
        return reason
    if torch.float64 in (y.dtype, x.dtype, v.dtype, u.dtype, cores.left.dtype):
        return "its sums are float32, and a tensor is float64"
    if y.is_neg() or x.is_neg() or v.is_neg() or u.is_neg():
        return "it reads memory, which does not say the values of a negative view: use .resolve_neg()"
    size = _row(cores, tasks.shape[1], v.shape[1], u.shape[1])
    if size > _SHARED - 4 * _TILE:
        return f"a row's coefficients take {size} bytes of shared memory, and a block has {_SHARED - 4 * _TILE}"
    return None
