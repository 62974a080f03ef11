"""``shared_lora`` on CUDA: two launches with all they need in their arguments, and one workspace between them."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from loraspan import _native
from loraspan._cuda import library, rows
from loraspan._cuda.reconstruct import matrix_fields
from loraspan.ops.cores import Cores

_TILE, _OUTPUTS = 64, 256
# columns of x in a slab at least; tiles that fill a large card
_SLAB, _BLOCKS = 128, 128
# rows to a block of the second launch, and the shared memory that a block has on every card
_HEIGHTS = (16, 4, 1)
_SHARED = 48 * 1024


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
    (d, k_in), (n, k_out) = v.shape, u.shape
    if not count or not n or not mixture:
        return
    # the kernels hold their addresses only, and what torch frees it keeps for this stream
    tasks, shares = tasks.contiguous(), None if shares is None else shares.contiguous()
    tiles = -(-count // _TILE) * -(-k_in // _TILE)
    slabs = min(max(_BLOCKS // max(tiles, 1), 1), max(d // _SLAB, 1))
    slab = max(-(-d // (slabs * 64)) * 64, 64)
    slabs = max(-(-d // slab), 1)
    own = mixture * (cores.most[1] + cores.most[3])
    space = torch.empty(count * (slabs * k_in + own), dtype=torch.float32, device=y.device)
    height = _height(count, cores, mixture, k_in, k_out)
    assert height is not None
    fields = [
        *(*matrix_fields(y, False), *matrix_fields(x, False), *matrix_fields(v, True), *matrix_fields(u, False)),
        *(count, n, d, k_out, k_in, cores.index.data_ptr(), cores.tasks, cores.weights.data_ptr()),
        *(t.data_ptr() for t in (cores.left, cores.left_private, cores.right, cores.right_private)),
        *(_native.DTYPE_CODES[cores.left.dtype], *cores.most, tasks.data_ptr(), mixture),
        *(0 if shares is None else shares.data_ptr(), struct.unpack("q", struct.pack("d", scale))[0]),
        *(space.data_ptr(), space.data_ptr() + 4 * count * slabs * k_in, slab, slabs, height),
    ]
    if cores.right_private.data_ptr() % 16 and fields[11] == rows.EIGHTS:
        fields[11] = rows.ALONG_COLUMNS
    table = (ctypes.c_int64 * len(fields))(*fields)
    codes = {_native.DTYPE_CODES[t.dtype] for t in (x, v)}
    path = codes.pop() if len(codes) == 1 and codes <= {rows.F16, rows.BF16} else rows.F32
    blocks = -(-count // height) * -(-n // _OUTPUTS)
    with library.stream_of(y.device) as stream:
        arguments = ctypes.addressof(table), tiles * slabs, blocks, height * _row(cores, mixture, k_in, k_out), stream
        library.opened().call("shared_lora", path, *arguments)


def _row(cores: Cores, mixture: int, k_in: int, k_out: int) -> int:
    """Give the bytes of shared memory that a row takes."""
    return 4 * (k_in + mixture * sum(cores.most) + k_out)


def _height(count: int, cores: Cores, mixture: int, k_in: int, k_out: int) -> int | None:
    """Give the rows to a block, of which few stay idle, or None if not even one fits."""
    size = _row(cores, mixture, k_in, k_out)
    fit = (height for height in _HEIGHTS if height * size <= _SHARED)
    return next((height for height in fit if height == 1 or 4 * count > height), None)


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
    if _height(1, cores, tasks.shape[1], v.shape[1], u.shape[1]) is None:
        size = _row(cores, tasks.shape[1], v.shape[1], u.shape[1])
        return f"a row's coefficients take {size} bytes of shared memory, and a block has {_SHARED}"
    return None
