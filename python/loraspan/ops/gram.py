"""Inner products of all rows of a matrix that lies in blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraspan import _core, _device, _native
from loraspan._default_device import cpu_by_default
from loraspan._dispatch import Backend, choose
from loraspan.errors import ArgumentError
from loraspan.ops.blocks import RowBlocks, block_table, refuses_device, sum_chunks
from loraspan.ops.places import Partials, off_metal
from loraspan.ops.stream import in_chunks


@cpu_by_default
def gram(x: RowBlocks | Sequence[Tensor] | Tensor, *, precision: str = "f32", backend: str | None = None) -> Tensor:
    r"""Give ``G = X X^T`` in float64.

    Args:
        x: ``X [R, d]`` as row blocks ``[r_i, d]``, read where they lie; see :class:`RowBlocks`. One tensor may have
            leading dimensions, which are batch dimensions.
        precision: ``"f32"`` sums float32 products over at most 128 columns in float32 and adds those sums in float64;
            float64 blocks are rounded to float32 first. ``"f64"`` keeps every product and sum in float64.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``. ``None`` takes the
            first that can.

    Returns:
        ``[R, R]`` (``[..., R, R]`` for a batch), float64, exactly symmetric. The error of entry ``(i, j)`` is at most
        ``(128 + 2) u |x_i| . |x_j|`` with ``u = 2^-24`` for ``"f32"`` (in practice below ``3e-7 sqrt(G_ii G_jj)``
        from a few thousand columns on), and ``(d + 1) 2^-53 |x_i| . |x_j|`` for ``"f64"``, to first order in
        the roundoff and where no product leaves the normal range of float32 or float64. The compiled kernels give
        the same bits for any number of threads.

        Where a matrix is bfloat16 throughout and the processor multiplies pairs of such numbers
        (``"cpu:avx512bf16"``), ``"f32"`` does so: each product is still rounded once, with its sum, but a float32 sum
        below ``2^-126`` counts as zero, so ``d 2^-126`` is added to the error.

    Raises:
        ShapeError: if the blocks do not fit together.
        ArgumentError: if ``precision`` is neither ``"f32"`` nor ``"f64"``.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> gram([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]).T])
        tensor([[ 5., 11.],
                [11., 25.]], dtype=torch.float64)

    Source:
        The bound: Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., section 3.1.
    """
    if not isinstance(x, Tensor) or x.ndim <= 2:
        return gram_many([x], precision=precision, backend=backend)[0]
    _check_precision(precision)
    if precision == "f64":
        x = off_metal(x)
    *batch, rows, columns = x.shape
    flat = x.reshape(math.prod(batch), rows, columns)
    # one member stands for all, and an empty batch is checked all the same
    RowBlocks([flat[0] if flat.shape[0] else flat.new_empty(rows, columns)])
    return choose("gram", BATCH_BACKENDS, backend, flat).run(flat, precision).view(*batch, rows, rows)


@cpu_by_default
def gram_many(
    batch: Sequence[RowBlocks | Sequence[Tensor] | Tensor], *, precision: str = "f32", backend: str | None = None
) -> list[Tensor]:
    """Give :func:`gram` of every matrix of a batch, which may differ in all their sizes.

    Each result has the bits that its matrix gives alone.

    Args:
        batch: matrices as :func:`gram` takes them.
        precision: as for :func:`gram`.
        backend: as for :func:`gram`.

    Returns:
        One float64 ``[R, R]`` per matrix.

    Raises:
        ShapeError: if the blocks of a matrix do not fit together.
        ArgumentError: if ``precision`` is neither ``"f32"`` nor ``"f64"``.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> [g.shape[0] for g in gram_many([torch.ones(2, 3), torch.ones(1, 7)])]
        [2, 1]
    """
    _check_precision(precision)
    matrices = [RowBlocks.of(x) for x in batch]
    if all(x.plain for x in matrices):
        return choose("gram", BACKENDS, backend, matrices).run(matrices, precision)
    total = [torch.zeros(x.shape[0], x.shape[0], dtype=torch.float64) for x in matrices]
    for chunks in in_chunks(matrices, wide=precision == "f64"):
        there = [chunk.x for chunk in chunks]
        found = choose("gram", BACKENDS, backend, there).run(there, precision)
        for chunk, part in zip(chunks, found, strict=True):
            total[chunk.member] += part
    return total


@cpu_by_default
def gram_blocks(batch: Sequence[RowBlocks], *, precision: str = "f32") -> list[Tensor | list[Tensor]]:
    """Give :func:`gram` of every block of every matrix, each block alone, on the backend that comes first.

    Args:
        batch: matrices. Their blocks are read where they lie, whatever computes with the matrices.
        precision: as for :func:`gram`.

    Returns:
        Per matrix float64 ``[B, r, r]`` where all its ``B`` blocks have ``r`` rows, and else a list of ``[r_i, r_i]``.

    Raises:
        ArgumentError: if ``precision`` is neither ``"f32"`` nor ``"f64"``.

    Example:
        >>> import torch
        >>> [grams] = gram_blocks([RowBlocks([torch.ones(2, 3), 2 * torch.ones(2, 3)])])
        >>> grams[:, 0, 1]
        tensor([ 3., 12.], dtype=torch.float64)
    """
    _check_precision(precision)
    if refuses_device(batch) is None:
        return _cpu_blocks(batch, precision)
    alone = gram_many([RowBlocks([block]) for x in batch for block in x.blocks], precision=precision)
    starts = np.cumsum([0, *(len(x.blocks) for x in batch)])
    return [alone[start:end] for start, end in itertools.pairwise(starts)]


def _check_precision(precision: str) -> None:
    if precision not in _native.PRECISIONS:
        raise ArgumentError(f"gram: precision is 'f32' or 'f64'; got {precision!r}")


def _cpu(matrices: Sequence[RowBlocks], precision: str, *, isa: str) -> list[Tensor]:
    blocks, spans = block_table(matrices)
    # one piece of memory for all: a batch may have thousands of small members
    sizes = [x.shape[0] ** 2 for x in matrices]
    memory = torch.empty(sum(sizes), dtype=torch.float64)
    out = [g.view(x.shape[0], x.shape[0]) for g, x in zip(torch.split(memory, sizes), matrices, strict=True)]
    jobs = _native.table([(*span, g.data_ptr()) for span, g in zip(spans, out, strict=True)], 4)
    _core.gram(blocks, jobs, _native.PRECISIONS[precision], _native.threads(), isa)
    return out


def _cpu_batch(batch: Tensor, precision: str, *, isa: str) -> Tensor:
    """Take ``[N, R, d]`` without making a tensor of each member."""
    count, rows, columns = batch.shape
    out = torch.empty(count, rows, rows, dtype=torch.float64)
    blocks, jobs = np.empty((count, 5), dtype=np.int64), np.empty((count, 4), dtype=np.int64)
    blocks[:, [0, 2, 3, 4]], blocks[:, 1] = _native.batch_fields(batch), rows
    jobs[:, 0], jobs[:, 1], jobs[:, 2], jobs[:, 3] = np.arange(count), 1, columns, _native.batch_fields(out)[:, 0]
    _core.gram(blocks, jobs, _native.PRECISIONS[precision], _native.threads(), isa)
    return out


def _cpu_blocks(batch: Sequence[RowBlocks], precision: str) -> list[Tensor | list[Tensor]]:
    tables = [x.table for x in batch]
    out: list[Tensor | list[Tensor]] = []
    jobs = np.ones((sum(map(len, tables)), 4), dtype=np.int64)
    jobs[:, 0] = np.arange(len(jobs))
    start = 0
    for x, table in zip(batch, tables, strict=True):
        places = jobs[start : start + len(table)]
        ends = (table[:, 1] ** 2).cumsum()
        memory = torch.empty(int(ends[-1]) if len(ends) else 0, dtype=torch.float64)
        places[:, 2] = x.columns
        places[:, 3] = memory.data_ptr() + 8 * (ends - table[:, 1] ** 2)
        out.append(_members(memory, x.rows))
        start += len(table)
    blocks = np.concatenate(tables) if tables else _native.table([], 5)
    _core.gram(blocks, jobs, _native.PRECISIONS[precision], _native.threads(), _native.BEST)
    return out


def _members(memory: Tensor, rows: Sequence[int]) -> Tensor | list[Tensor]:
    if rows and min(rows) == max(rows):
        return memory.view(len(rows), rows[0], rows[0])
    return [g.view(r, r) for g, r in zip(torch.split(memory, [r * r for r in rows]), rows, strict=True)]


@torch.no_grad()
def reference(matrices: Sequence[RowBlocks], precision: str) -> list[Tensor]:
    """Say it in torch, chunk by chunk of columns, on whatever device the blocks are."""
    wide = torch.float32 if precision == "f32" else torch.float64
    total = [torch.zeros(x.shape[0], x.shape[0], dtype=torch.float64) for x in matrices]
    sums = Partials()
    for x, g in zip(matrices, total, strict=True):
        for _, chunk in sum_chunks(x, wide):
            sums.add(g, chunk @ chunk.T.contiguous())
    sums.flush()
    # a matrix product need not be symmetric to the last bit
    return [torch.tril(g) + torch.tril(g, -1).T for g in total]


def _reference_batch(batch: Tensor, precision: str) -> Tensor:
    grams = reference([RowBlocks([x]) for x in batch], precision)
    return torch.stack(grams) if grams else torch.empty(0, batch.shape[1], batch.shape[1], dtype=torch.float64)


def _refuses_batch(batch: Tensor) -> str | None:
    return refuses_device([RowBlocks([x]) for x in batch[:1]])


BACKENDS = (
    *_native.backends(_cpu, refuses_device),
    *_device.backends("gram"),
    Backend("reference", reference, lambda *_: None),
)
BATCH_BACKENDS = (
    *_native.backends(_cpu_batch, _refuses_batch),
    *_device.backends("gram", form="batch"),
    Backend("reference", _reference_batch, lambda *_: None),
)
