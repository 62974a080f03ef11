"""``shared_lora`` on CUDA: two launches with all they need in their arguments, and one workspace between them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan import _native
from loraspan._cuda import library, rows
from loraspan._cuda.reconstruct import matrix_fields
from loraspan.ops.cores import Cores

# as in kernels/cuda/shared_lora.cu: rows and columns of a tile of the first launch, rows and columns of one where rows
# are many, and from how many on they are; outputs of a turn of the second, of which it takes twice as many then
_TILE, _COLUMNS, _LARGE, _MANY, _OUTPUTS = 16, 32, 64, 256, 128
# columns of x in a slab at least, and slabs at most, whatever the batch: they decide the order of sums
_SLAB, _SLABS = 256, 16
# blocks that fill a large card once, or nearly, and twice
_ONCE, _BLOCKS = 100, 256
# the shared memory that a block has on every card
_SHARED = 48 * 1024
# batches of other shapes, and bases and tables at other addresses, that are remembered at a time
_PLANS, _TABLES = 256, 4096
# what the kernels were told last of the table of tasks at an address
_known: dict[int, _Told] = {}
_ADDRESS, _SHAPE, _DTYPE = Tensor.data_ptr, attrgetter("shape"), attrgetter("dtype")


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
    grid = _grid(told, cores, count, mixture, of_y, of_x, halves)
    parts = (
        of_y[1:],
        (*of_x[1:], *told.bases, count, *told.sizes, *told.ends),
        (told.slab[0], grid.slabs, grid.each, grid.height, grid.wide, told.even),
    )
    fixed = [struct.pack(f"={len(part)}q", *part) for part in parts]
    pack = _packing(*map(len, fixed))
    plan = _Plan(of_x[4] if halves else rows.F32, mixture, fixed[0], fixed[1], fixed[2], grid, pack)
    if len(told.plans) >= _PLANS:
        told.plans.clear()
    told.plans[_form(y, x, tasks.shape, of_y[0], of_x[0])] = plan
    _launch(plan, y.device, of_y[0], of_x[0], tasks, shares, scale)


def run_again(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    tables: Sequence[Tensor],
    most: Sequence[int],
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
) -> bool:
    """Run as with the same bases and tables and a batch of the same shape before; or give False, with nothing done.

    What a model does thousands of times. All that the checks and the kernels need to know is compared with what it was
    then, by its value: it does not matter whose tensors these are.
    """
    known = _known.get(tables[0].data_ptr())
    if known is None or known.state != _state(v, u, tables, most):
        return False
    device, at_y, at_x, places = y.device, y.data_ptr(), x.data_ptr(), tasks.shape
    plan = known.plans.get(_form(y, x, places if len(places) == 2 else (*places, 1), at_y, at_x))
    if (
        plan is None
        or not (device == known.device == x.device == tasks.device)
        or tasks.dtype is not torch.int64
        or not tasks.is_contiguous()
        or y.is_neg()
        or x.is_neg()
    ):
        return False
    if shares is not None and (
        shares.shape != places
        or shares.dtype is not torch.float32
        or shares.device != device
        or not shares.is_contiguous()
    ):
        return False
    _launch(plan, device, at_y, at_x, tasks, shares, scale)
    return True


@cache
def _packing(*sizes: int) -> Callable[..., bytes]:
    """Give what makes the table of a call of its parts."""
    return struct.Struct("=q{}sq{}s3qd2q{}s".format(*sizes)).pack


def _launch(
    plan: _Plan, device: torch.device, at_y: int, at_x: int, tasks: Tensor, shares: Tensor | None, scale: float
) -> None:
    path, mixture, of_y, middle, last, grid, pack = plan
    space = torch.empty(grid.floats, dtype=torch.float32, device=device)
    at = space.data_ptr()
    weights = 0 if shares is None else shares.data_ptr()
    places = tasks.data_ptr(), mixture, weights, scale, at, at + 4 * grid.sums
    table = pack(at_y, of_y, at_x, middle, *places, last)
    with library.stream_of(device) as stream:
        library.opened().call("shared_lora", path, table, grid.tiles, grid.blocks, grid.bytes, stream)


def _form(y: Tensor, x: Tensor, places: Sequence[int], at_y: int, at_x: int) -> tuple[object, ...]:
    """Give all that a plan follows from beside bases and tables; ``places`` is the shape of tasks."""
    return y.shape, y.stride(), y.dtype, at_y % 16, x.shape, x.stride(), x.dtype, at_x % 16, places


class _Plan(NamedTuple):
    """How batches of one form are done: what the kernels are told, in the parts that stay."""

    path: int
    mixture: int
    of_y: bytes
    middle: bytes
    last: bytes
    grid: _Grid
    pack: Callable[..., bytes]


class _Grid(NamedTuple):
    """Of a batch: blocks of the first launch; blocks, rows, outputs and shared bytes of the second; the workspace."""

    tiles: int
    blocks: int
    slabs: int
    each: int
    height: int
    wide: int
    bytes: int
    sums: int
    floats: int


class _Told(NamedTuple):
    """What the kernels are told of bases and tasks, as they were for these very tensors in this state."""

    state: tuple[object, ...]
    device: torch.device
    bases: tuple[int, ...]
    # n, d, k_out, k_in
    sizes: tuple[int, int, int, int]
    ends: tuple[int, ...]
    # columns of x in one, and how many
    slab: tuple[int, int]
    # whether shared ends, and private right ones, may be read by 16 bytes
    even: bool
    even_private: bool
    plans: dict[tuple[object, ...], _Plan]


def _state(v: Tensor, u: Tensor, tables: Sequence[Tensor], most: Sequence[int]) -> tuple[object, ...]:
    """Give all that can change of bases and tables but their entries, which the kernels read."""
    held = (v, u, *tables)
    return (
        *(tuple(map(_ADDRESS, held)), tuple(map(_SHAPE, held)), tuple(map(_DTYPE, held)), tuple(most), v.device),
        *(u.device, tables[0].device, v.stride(), u.stride(), v.is_neg(), u.is_neg()),
    )


def _told(v: Tensor, u: Tensor, cores: Cores) -> _Told:
    """Give what was told last time if nothing was moved, turned or replaced since."""
    tables = (cores.index, cores.weights, cores.left, cores.left_private, cores.right, cores.right_private)
    index, weights, *held = (t.data_ptr() for t in tables)
    state = _state(v, u, tables, cores.most)
    known = _known.get(index)
    if known is not None and known.state == state:
        return known
    (d, k_in), (n, k_out) = v.shape, u.shape
    slab = _SLAB * max(-(-d // (_SLAB * _SLABS)), 1)
    left, _, right, right_private = held
    told = _Told(
        state,
        v.device,
        (*matrix_fields(v, True), *matrix_fields(u, False)),
        (n, d, k_out, k_in),
        (index, cores.tasks, weights, *held, _native.DTYPE_CODES[cores.left.dtype], *cores.most),
        (slab, max(-(-d // slab), 1)),
        not (left % 16 or right % 16 or k_in % 8 or k_out % 8),
        right_private % 16 == 0,
        {},
    )
    if len(_known) >= _TABLES:
        _known.clear()
    _known[index] = told
    return told


def _grid(
    told: _Told, cores: Cores, count: int, mixture: int, of_y: Sequence[int], of_x: Sequence[int], halves: bool
) -> _Grid:
    """Share a batch out."""
    n, _, k_out, k_in = told.sizes
    (of_v, of_u), slabs, each = (told.bases[:6], told.bases[6:]), told.slab[1], 0
    size, turn = _TILE, _OUTPUTS
    many = halves and count > _MANY
    if many and of_x[5] == rows.EIGHTS and of_v[5] == rows.EIGHTS_ACROSS:
        tiles = -(-count // _LARGE) * -(-k_in // _LARGE)
        if tiles >= _ONCE:
            # a block adds the slabs of its rows itself
            slabs, each = 1, slabs
        else:
            tiles, each = tiles * slabs, 1
    else:
        tiles = -(-count // _TILE) * -(-k_in // _COLUMNS) * slabs
    private = cores.most[2] or cores.most[3]
    if many and not private and told.even and of_y[4] == of_u[4] == told.ends[7] and of_y[5] == of_u[5] == rows.EIGHTS:
        size, turn = 2 * _TILE, 2 * _OUTPUTS
    row = _row(cores, mixture, k_in, k_out, of_u[4])
    height = min(size, (_SHARED - 4 * size) // row)
    high = -(-count // height)
    # what a block makes of its rows' columns serves all of its outputs
    wide = -(-n // (max(_BLOCKS // high, 1) * turn)) * turn
    sums = count * slabs * k_in
    floats = sums + count * mixture * (cores.most[1] + cores.most[3])
    return _Grid(tiles, high * -(-n // wide), slabs, each, height, wide, height * row + 4 * size, sums, floats)


def _row(cores: Cores, mixture: int, k_in: int, k_out: int, dtype: int) -> int:
    """Give the bytes of shared memory that a row takes: z, the loads of its columns, g, and what keeps rows apart."""
    brains, g = dtype == rows.BF16, -(-k_out // 32) * 32
    size = -(-k_in // 8) * 8 + 4 + -(-mixture * sum(cores.most) // 4) * 4 + (g * 3 // 2 if brains else g)
    return 4 * (size + ((16 if brains else 4) - size) % 32)


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
    size = _row(cores, tasks.shape[1], v.shape[1], u.shape[1], _native.DTYPE_CODES[u.dtype])
    if size > _SHARED - 4 * _TILE:
        return f"a row's coefficients take {size} bytes of shared memory, and a block has {_SHARED - 4 * _TILE}"
    return None
