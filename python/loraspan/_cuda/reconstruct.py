"""``reconstruct`` on CUDA: pieces as arguments of the launch, so that a CUDA graph keeps them and nothing waits."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from torch import Tensor

from loraspan import _native
from loraspan._cuda import library, rows
from loraspan.ops.reconstruct import Piece

# as in kernels/cuda/reconstruct.cu
_PIECES, _TILE, _ENTRIES = 16, 64, 4096
_FIELDS = 24


def run(pieces: Sequence[Piece]) -> None:
    """Write every piece to its place, without waiting for it."""
    by_path: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_path.setdefault(_path(piece), []).append(piece)
    for path, members in by_path.items():
        for start in range(0, len(members), _PIECES):
            _launch(path, members[start : start + _PIECES])


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
    blocks, kept = 0, []
    for i, piece in enumerate(pieces):
        basis, loadings = piece.basis, piece.loadings
        # packed rows are refused before
        assert isinstance(basis, Tensor)
        assert loadings is None or isinstance(loadings, Tensor)
        # blocks of one launch write while others still read
        if basis.untyped_storage().data_ptr() == piece.out.untyped_storage().data_ptr():
            basis = basis.clone()
        kept.append(basis)
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
    apart = matrix.stride(0) if matrix.ndim == 3 else 0
    stride, step = matrix.stride()[-2:]
    code = _native.DTYPE_CODES[matrix.dtype]
    height, width = matrix.shape[-2:]
    line = (width, step, stride) if across else (height, stride, step)
    size = matrix.element_size()
    how = rows.reading_of_one(matrix.data_ptr(), *line, size, height if across else width)
    if how >= rows.EIGHTS and apart * size % 16:
        how = rows.ALONG_COLUMNS if how == rows.EIGHTS else rows.ALONG_ROWS
    return matrix.data_ptr(), apart, stride, step, code, how


def refuses(pieces: Sequence[Piece]) -> str | None:
    """Say why these pieces cannot be taken, if so."""
    return library.refuses([piece.out.device for piece in pieces])
