"""``reconstruct`` on CUDA: pieces as arguments of the launch, so that a CUDA graph keeps them and nothing waits."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan import _native
from loraspan._cuda import library, rows
from loraspan.ops.reconstruct import Piece

# as in kernels/cuda/reconstruct.cu
_PIECES, _TILE, _ENTRIES = 16, 64, 4096
_FIELDS = 24
_GROUPS, _MEMBERS, _GROUP_FIELDS = 8, 96, 27
# rows to a block of grouped pieces, by path, and blocks that fill a large card twice
_ROWS, _BLOCKS = {rows.F16: 256, rows.BF16: 256, rows.F32: 128}, 264
# vectors of a basis up to which the sums of tensor cores could be off by more than float32's
_FEW = 16
_member = struct.Struct("=qqd")


class _Group(NamedTuple):
    """Pieces alike in all but where loadings and results are: path, device, matrices and sizes, and those places."""

    path: int
    device: torch.device
    matrices: tuple[int, ...]
    sizes: tuple[int, int, int]
    batch: int
    members: list[tuple[int, int, float]]


class _Part(NamedTuple):
    """What goes into one launch of a group: how many tiles high it is, and which of its members."""

    group: _Group
    tiles: int
    start: int
    stop: int


def run(pieces: Sequence[Piece]) -> None:
    """Write every piece to its place, without waiting for it."""
    if len(pieces) == 1:
        pieces = _apart(pieces[0])
    groups: dict[tuple[object, ...], _Group | None] = {}
    others: dict[int, list[Piece]] = {}
    for piece in pieces:
        basis, loadings, out, scale = piece
        if isinstance(loadings, Tensor):
            at = loadings.data_ptr()
            key = (id(basis), loadings.stride(), loadings.dtype, at % 16, out.stride(), out.dtype, out.shape)
            group = groups[key] if key in groups else groups.setdefault(key, _group_of(piece))
            if group is not None:
                group.members.append((at, out.data_ptr(), scale))
                continue
        others.setdefault(_path(piece), []).append(piece)
    for path in _ROWS:
        _launch_groups(path, [group for group in groups.values() if group is not None and group.path == path])
    for path, members in others.items():
        for start in range(0, len(members), _PIECES):
            _launch(path, members[start : start + _PIECES])


def _apart(piece: Piece) -> list[Piece]:
    """Give a piece that reads nothing of what it writes; a batch as its members where these lie differently."""
    basis, loadings, out, scale = piece
    # packed rows are refused before
    assert isinstance(basis, Tensor)
    # blocks of one launch write while others still read
    if basis.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        piece = piece._replace(basis=basis.clone())
    if out.ndim < 3 or not out.numel() or _group_of(piece) is not None:
        return [piece]
    # a member alone may be of a group though the whole is of none, and is to have the same bits
    assert isinstance(loadings, Tensor)
    members = [Piece(*member, scale) for member in zip(basis, loadings, out, strict=True)]
    return members if any(_group_of(member) is not None for member in members) else [piece]


def _group_of(piece: Piece) -> _Group | None:
    """Begin a group with pieces like this one, or give None if its vectors are not whole runs of 16 bytes."""
    basis, loadings, out, _ = piece
    assert isinstance(basis, Tensor)
    assert isinstance(loadings, Tensor)
    path, k = _path(piece), basis.shape[-1]
    if path == rows.F64 or (path == rows.F32 and k <= _FEW) or not out.numel():
        return None
    of_basis, of_loadings = matrix_fields(basis, False), matrix_fields(loadings, True)
    if (of_basis[5], of_loadings[5]) != (rows.EIGHTS, rows.EIGHTS):
        return None
    sizes, batch = (basis.shape[-2], k, out.shape[-1]), out.shape[0] if out.ndim == 3 else 0
    return _Group(path, out.device, (*of_basis, *of_loadings, *matrix_fields(out, False)), sizes, batch, [])


def _launch_groups(path: int, groups: Sequence[_Group]) -> None:
    """Launch as much at a time as fits into the arguments."""
    parts: list[_Part] = []
    room, chained = _MEMBERS, 0
    for group in groups:
        start, tiles = 0, -(-group.sizes[0] // _ROWS[path])
        while start < len(group.members):
            if not room or len(parts) == _GROUPS:
                _launch_parts(path, parts, chained)
                parts, room, chained = [], _MEMBERS, 1
            stop = min(len(group.members), start + room)
            parts.append(_Part(group, tiles, start, stop))
            start, room = stop, room - (stop - start)
    if parts:
        _launch_parts(path, parts, chained)


def _launch_parts(path: int, parts: Sequence[_Part], chained: int) -> None:
    units = sum(part.tiles * (part.stop - part.start) for part in parts)
    # members to a block, which holds its rows of the basis for all of them
    several, blocks = -(-units // _BLOCKS), 0
    members: list[tuple[int, int, float]] = []
    table = (ctypes.c_int64 * (1 + _GROUPS * _GROUP_FIELDS + _MEMBERS * 3))(len(parts))
    for i, (group, tiles, start, stop) in enumerate(parts):
        count, each = (group.batch, 1) if group.batch else (stop - start, several)
        places = (blocks, tiles, len(members), count, each, int(group.batch > 0))
        table[1 + i * _GROUP_FIELDS : 1 + (i + 1) * _GROUP_FIELDS] = [*places, *group.matrices, *group.sizes]
        members += group.members[start:stop]
        blocks += tiles * -(-count // each)
    for i, member in enumerate(members):
        _member.pack_into(table, 8 * (1 + _GROUPS * _GROUP_FIELDS) + i * _member.size, *member)
    with library.stream_of(parts[0].group.device) as stream:
        library.opened().call("reconstruct_groups", path, ctypes.addressof(table), blocks, chained, stream)


def _path(piece: Piece) -> int:
    codes = [_native.DTYPE_CODES[t.dtype] for t in piece[:3] if isinstance(t, Tensor)]
    wide = rows.F64 if rows.F64 in codes else rows.F32
    if piece.loadings is None:
        return wide + 2
    halves = codes[0] == codes[1] and codes[0] in (rows.F16, rows.BF16) and wide == rows.F32
    return codes[0] if halves else wide


def _launch(path: int, pieces: Sequence[Piece]) -> None:
    device = pieces[0].out.device
    # the launch copies it
    table = (ctypes.c_int64 * (1 + _PIECES * _FIELDS))(len(pieces))
    blocks = 0
    for i, piece in enumerate(pieces):
        basis, loadings = piece.basis, piece.loadings
        # packed rows are refused before
        assert isinstance(basis, Tensor)
        assert loadings is None or isinstance(loadings, Tensor)
        m, k, p = *basis.shape[-2:], piece.out.shape[-1]
        tiles = -(-m * p // _ENTRIES) if loadings is None else -(-m // _TILE) * -(-p // _TILE)
        scale = struct.unpack("q", struct.pack("d", piece.scale))[0]
        fields = (*matrix_fields(basis, False), *matrix_fields(loadings, True), *matrix_fields(piece.out, False))
        table[1 + i * _FIELDS : 1 + (i + 1) * _FIELDS] = [blocks, max(tiles, 1), *fields, m, k, p, scale]
        blocks += tiles * (piece.out.shape[0] if piece.out.ndim == 3 else 1)
    if blocks:
        with library.stream_of(device) as stream:
            library.opened().call("reconstruct", path, ctypes.addressof(table), blocks, stream)


def matrix_fields(matrix: Tensor | None, across: bool) -> tuple[int, ...]:
    """Give address, strides (between members, rows, columns), dtype and reading of ``[m, k]`` or ``[N, m, k]``.

    The kernel reads its rows, or ``across`` them its columns.
    """
    if matrix is None:
        return (0,) * 6
    (*batch, height, width), (*between, stride, step) = matrix.shape, matrix.stride()
    apart, code, size = between[0] if batch else 0, _native.DTYPE_CODES[matrix.dtype], matrix.element_size()
    line = (width, step, stride) if across else (height, stride, step)
    at = matrix.data_ptr()
    how = rows.reading_of_one(at, *line, size, height if across else width)
    if how >= rows.EIGHTS and apart * size % 16:
        how = rows.ALONG_COLUMNS if how == rows.EIGHTS else rows.ALONG_ROWS
    return at, apart, stride, step, code, how


def refuses(pieces: Sequence[Piece]) -> str | None:
    """Say why these pieces cannot be taken, if so."""
    return library.refuses([piece.out.device for piece in pieces])
