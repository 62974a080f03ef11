"""Random projection of a matrix that lies in blocks, four additions an entry however many directions there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan import _core, _native
from loraspan._default_device import cpu_by_default
from loraspan._dispatch import Backend, choose
from loraspan.errors import ArgumentError
from loraspan.ops.blocks import RowBlocks, block_table, refuses_device, sum_chunks
from loraspan.ops.places import Partials, backend_at
from loraspan.ops.sketch import philox
from loraspan.ops.stream import in_chunks

# Entries in a row of Omega, and the last word of their counters.
_QUARTERS, _STREAM = 4, 1
_SEED_RANGE = 2**63


@cpu_by_default
def sparse_sketch(
    x: RowBlocks | Sequence[Tensor] | Tensor, width: int, *, seed: int = 0, backend: str | None = None
) -> Tensor:
    r"""Give ``Y = X Omega`` for an ``Omega [d, width]`` with four random signs in each row and zeros else.

    The columns of ``Omega`` are four quarters of ``m = width / 4``, its rows blocks of ``m``. In a quarter a block is
    a diagonal of random signs, shifted round by a random number of places. So an entry of ``X`` costs four additions
    however many columns ``Y`` has, where :func:`~loraspan.ops.sketch` takes one for each: ``Y Y^T / 4`` tells
    ``X X^T``, which it is on average, with an error that falls with the width, at the price of reading ``X`` once.

    Args:
        x: ``X [R, d]`` as row blocks, read where they lie; see :class:`RowBlocks`.
        width: columns of ``Omega``, a multiple of 4 and not 0.
        seed: in ``[0, 2^63)``.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``[R, width]``, float32. Entries of ``X`` are rounded to float32, float32 sums have 128 terms at most and are
        added in float64: so an entry of row ``i`` is within ``(128 + 2) 2^-24`` times the sum of the ``|x_ij|`` that it
        adds, to first order in the roundoff. The compiled kernels give the same bits, whatever the instruction set.

    Raises:
        ArgumentError: if ``width`` or ``seed`` is out of range.
        ShapeError: if the blocks do not fit together.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> sparse_sketch(torch.eye(2), 8, seed=7).abs().sum(1)
        tensor([4., 4.])

    Source:
        Sparse sign matrices: Tropp, Yurtsever, Udell, Cevher, *Streaming low-rank matrix approximation*, 2019, section
        3.3. Two rows of one block never meet in a column, and others with the chance of independent places.
    """
    if width < _QUARTERS or width % _QUARTERS or not 0 <= seed < _SEED_RANGE:
        raise ArgumentError(
            f"sparse_sketch: width is a multiple of {_QUARTERS} above 0, and seed in [0, 2^63); got width={width}, "
            f"seed={seed}"
        )
    # one pass of additions: sending the rows to a target would cost more than adding them where they lie
    matrix, backend = (given := RowBlocks.of(x)).on(given.device), backend_at(None, backend)
    if matrix.plain:
        return choose("sparse_sketch", BACKENDS, backend, matrix).run(matrix, width, seed)
    total = torch.zeros(matrix.shape[0], width, dtype=torch.float64)
    for [chunk] in in_chunks([matrix], wide=False):
        total += choose("sparse_sketch", BACKENDS, backend, chunk.x).run(chunk.x, width, seed)
    return total.float()


def sparse_signs(rows: int, width: int, seed: int, start: int = 0) -> NDArray[np.float64]:
    """Give rows ``[start, start + rows)`` of ``Omega [., width]`` as the kernels draw it (tests and references)."""
    m = width // _QUARTERS
    index = np.arange(start, start + rows, dtype=np.int64)
    own, first = _words(index, seed), _words(index - index % m, seed)
    shift = ((first >> np.uint64(1)) * np.uint64(m) >> np.uint64(31)).astype(np.int64)
    places = np.arange(_QUARTERS) * m + (index[:, None] + shift) % m
    omega = np.zeros((rows, width))
    np.put_along_axis(omega, places, 1.0 - 2.0 * (own & np.uint64(1)).astype(np.float64), axis=1)
    return omega


def _words(index: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    counter = np.zeros((len(index), 4), dtype=np.uint64)
    counter[:, 0], counter[:, 1] = index & 0xFFFFFFFF, index >> 32
    counter[:, 3] = _STREAM
    return philox(counter, seed)


def _cpu(x: RowBlocks, width: int, seed: int, *, isa: str) -> Tensor:
    blocks, spans = block_table([x])
    out = torch.empty(x.shape[0], width, dtype=torch.float32)
    jobs = [(*spans[0], width, seed, out.data_ptr())]
    _core.sparse_sketch(blocks, _native.table(jobs, 6), _native.threads(), isa)
    return out


@torch.no_grad()
def reference(x: RowBlocks, width: int, seed: int) -> Tensor:
    """Say it in torch, chunk by chunk of columns, on whatever device the blocks are."""
    total = torch.zeros(x.shape[0], width, dtype=torch.float64)
    sums = Partials()
    for start, chunk in sum_chunks(x, torch.float32):
        omega = torch.from_numpy(sparse_signs(chunk.shape[1], width, seed, x.first + start))
        sums.add(total, chunk @ omega.float().to(chunk.device))
    sums.flush()
    return total.float()


def _refuses(x: RowBlocks) -> str | None:
    if x.first:
        return "it draws from column 0 on, and these are later columns of a matrix that is sent in chunks"
    return refuses_device([x])


BACKENDS = (
    *_native.backends(_cpu, _refuses),
    Backend("reference", reference, lambda *_: None),
)
