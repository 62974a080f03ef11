"""Random projections of a matrix that lies in blocks: ``X Omega``, and the fused power step ``X (X^T Q)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan import _core, _device, _native
from loraspan._default_device import cpu_by_default
from loraspan._dispatch import Backend, choose
from loraspan.errors import ArgumentError, ShapeError
from loraspan.ops.blocks import RowBlocks, block_table, refuses_device, sum_chunks
from loraspan.ops.places import Partials
from loraspan.ops.stream import in_chunks

_SEED_RANGE = 2**63


def sketch(
    x: RowBlocks | Sequence[Tensor] | Tensor,
    width: int,
    *,
    seed: int = 0,
    precision: str = "f32",
    backend: str | None = None,
) -> Tensor:
    r"""Give ``Y = X Omega`` for an ``Omega [d, width]`` of random signs, drawn on the fly and never stored.

    Entry ``(j, c)`` of ``Omega`` is +1 or -1 by a bit of Philox4x32-10 keyed by ``seed``, ``j`` and ``c`` and nothing
    else, so every backend draws the same ``Omega``, and a wider sketch begins with the narrower one.

    Args:
        x: ``X [R, d]`` as row blocks, read where they lie; see :class:`RowBlocks`.
        width: columns of ``Omega``, at least 0.
        seed: in ``[0, 2^63)``.
        precision: ``"f32"`` keeps float32 sums over at most 128 columns and adds those in float64; ``"f64"`` keeps
            everything in float64.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``[R, width]``, float64. The error of an entry of row ``i`` is at most ``(128 + 2) 2^-24 sum |x_i|`` for
        ``"f32"`` and ``(d + 1) 2^-53 sum |x_i|`` for ``"f64"``, to first order in the roundoff. The compiled kernels
        give the same bits for any number of threads.

    Raises:
        ArgumentError: if ``width``, ``seed`` or ``precision`` is out of range.
        ShapeError: if the blocks do not fit together.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> sketch(torch.eye(2), 3, seed=7).abs()
        tensor([[1., 1., 1.],
                [1., 1., 1.]], dtype=torch.float64)

    Source:
        Random signs as a range finder: Halko, Martinsson, Tropp, *Finding structure with randomness*, 2011,
        section 4.6. Philox: Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as easy as 1, 2, 3*, 2011.
    """
    return sketch_many([(x, width)], seed=seed, precision=precision, backend=backend)[0]


@cpu_by_default
def sketch_many(
    batch: Sequence[tuple[RowBlocks | Sequence[Tensor] | Tensor, int]],
    *,
    seed: int = 0,
    precision: str = "f32",
    backend: str | None = None,
) -> list[Tensor]:
    """Give :func:`sketch` of every ``(x, width)`` of a batch, which may differ in all their sizes.

    Each result has the bits that its member gives alone.

    Args:
        batch: pairs of a matrix and a width, as :func:`sketch` takes them.
        seed: as for :func:`sketch`, of all members.
        precision: as for :func:`sketch`.
        backend: as for :func:`sketch`.

    Returns:
        One float64 ``[R, width]`` per pair.

    Raises:
        ArgumentError: if a width, ``seed`` or ``precision`` is out of range.
        ShapeError: if the blocks of a matrix do not fit together.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> [tuple(y.shape) for y in sketch_many([(torch.ones(2, 3), 1), (torch.ones(1, 4), 2)])]
        [(2, 1), (1, 2)]
    """
    _check_precision("sketch", precision)
    for _, width in batch:
        if width < 0 or not 0 <= seed < _SEED_RANGE:
            raise ArgumentError(f"sketch: width is at least 0 and seed in [0, 2^63); got width={width}, seed={seed}")
    pairs = [(RowBlocks.of(x), width) for x, width in batch]
    if all(x.plain for x, _ in pairs):
        return choose("sketch", BACKENDS, backend, pairs).run(pairs, seed, precision)
    total = [torch.zeros(x.shape[0], width, dtype=torch.float64) for x, width in pairs]
    for chunks in in_chunks([x for x, _ in pairs], wide=precision == "f64"):
        there = [(chunk.x, pairs[chunk.member][1]) for chunk in chunks]
        found = choose("sketch", BACKENDS, backend, there).run(there, seed, precision)
        for chunk, part in zip(chunks, found, strict=True):
            total[chunk.member] += part
    return total


def power(
    x: RowBlocks | Sequence[Tensor] | Tensor, q: Tensor, *, precision: str = "f32", backend: str | None = None
) -> Tensor:
    r"""Give ``X (X^T Q)``, one pass over ``X``: each chunk of columns is used twice while it is in cache.

    Args:
        x: ``X [R, d]`` as row blocks, read where they lie; see :class:`RowBlocks`.
        q: ``[R, l]``, float64.
        precision: ``"f32"`` rounds ``Q`` and ``X^T Q`` to float32, keeps float32 sums over at most 128 columns in the
            second product and adds those in float64; ``"f64"`` keeps everything in float64.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``[R, l]``, float64, within ``(R + 128 + 4) u |X| |X|^T |Q|`` of the exact product, ``u = 2^-24`` or
        ``2^-53`` (with ``d`` for 128). The compiled kernels give the same bits for any number of threads.

    Raises:
        ShapeError: if ``q`` does not have one float64 row per row of ``x``, or the blocks do not fit together.
        ArgumentError: if ``precision`` is neither ``"f32"`` nor ``"f64"``.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> power(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]], dtype=torch.float64))
        tensor([[50.]], dtype=torch.float64)
    """
    return power_many([(x, q)], precision=precision, backend=backend)[0]


@cpu_by_default
def power_many(
    batch: Sequence[tuple[RowBlocks | Sequence[Tensor] | Tensor, Tensor]],
    *,
    precision: str = "f32",
    backend: str | None = None,
) -> list[Tensor]:
    """Give :func:`power` of every ``(x, q)`` of a batch, which may differ in all their sizes.

    Each result has the bits that its member gives alone.

    Args:
        batch: pairs of a matrix and a block, as :func:`power` takes them.
        precision: as for :func:`power`.
        backend: as for :func:`power`.

    Returns:
        One float64 ``[R, l]`` per pair.

    Raises:
        ShapeError: if a ``q`` does not fit its matrix.
        ArgumentError: if ``precision`` is neither ``"f32"`` nor ``"f64"``.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> batch = [(torch.ones(2, 3), torch.ones(2, 1).double()), (torch.ones(1, 4), torch.ones(1, 2).double())]
        >>> [y.tolist() for y in power_many(batch)]
        [[[6.0], [6.0]], [[4.0, 4.0]]]
    """
    _check_precision("power", precision)
    pairs = [(RowBlocks.of(x), q.resolve_neg()) for x, q in batch]
    for x, q in pairs:
        if q.ndim != 2 or q.shape[0] != x.shape[0] or q.dtype != torch.float64:
            raise ShapeError(
                f"power: q needs one float64 row for each of the {x.shape[0]} rows of x; "
                f"got {list(q.shape)} of {q.dtype}"
            )
    if all(x.plain for x, _ in pairs):
        return choose("power", POWER_BACKENDS, backend, pairs).run(pairs, precision)
    total = [torch.zeros(q.shape, dtype=torch.float64) for _, q in pairs]
    for chunks in in_chunks([x for x, _ in pairs], wide=precision == "f64"):
        there = [(chunk.x, pairs[chunk.member][1]) for chunk in chunks]
        found = choose("power", POWER_BACKENDS, backend, there).run(there, precision)
        for chunk, part in zip(chunks, found, strict=True):
            total[chunk.member] += part
    return total


def signs(rows: int, width: int, seed: int, start: int = 0) -> NDArray[np.float64]:
    """Give rows ``[start, start + rows)`` of ``Omega [., width]`` as the kernels draw it (tests and references)."""
    groups = -(-width // 128)
    counter = np.zeros((rows, groups, 4), dtype=np.uint64)
    index = np.arange(start, start + rows, dtype=np.uint64)[:, None]
    counter[..., 0] = index & np.uint64(0xFFFFFFFF)
    counter[..., 1] = index >> np.uint64(32)
    counter[..., 2] = np.arange(groups, dtype=np.uint64)[None, :]
    words = philox(counter, seed)
    bits = (words[..., None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
    omega: NDArray[np.float64] = 1.0 - 2.0 * bits.reshape(rows, groups * 128)[:, :width].astype(np.float64)
    return omega


def philox(counter: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Run the ten rounds of Philox4x32 on 32-bit words held in uint64, the seed the key."""
    low, key0, key1 = np.uint64(0xFFFFFFFF), seed & 0xFFFFFFFF, seed >> 32
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(key0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(key1),
            a & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def _check_precision(operator: str, precision: str) -> None:
    if precision not in _native.PRECISIONS:
        raise ArgumentError(f"{operator}: precision is 'f32' or 'f64'; got {precision!r}")


def _cpu(pairs: Sequence[tuple[RowBlocks, int]], seed: int, precision: str, *, isa: str) -> list[Tensor]:
    blocks, spans = block_table([x for x, _ in pairs])
    out = [torch.empty(x.shape[0], width, dtype=torch.float64) for x, width in pairs]
    jobs = [(*span, y.shape[1], seed, y.data_ptr()) for span, y in zip(spans, out, strict=True)]
    _core.sketch(blocks, _native.table(jobs, 6), _native.PRECISIONS[precision], _native.threads(), isa)
    return out


def _cpu_power(pairs: Sequence[tuple[RowBlocks, Tensor]], precision: str, *, isa: str) -> list[Tensor]:
    blocks, spans = block_table([x for x, _ in pairs])
    # held until the call: the table has their addresses only
    weights = [q.contiguous() for _, q in pairs]
    out = [torch.empty_like(q) for q in weights]
    jobs = [(*span, q.data_ptr(), q.shape[1], y.data_ptr()) for span, q, y in zip(spans, weights, out, strict=True)]
    _core.power(blocks, _native.table(jobs, 6), _native.PRECISIONS[precision], _native.threads(), isa)
    return out


@torch.no_grad()
def reference(pairs: Sequence[tuple[RowBlocks, int]], seed: int, precision: str) -> list[Tensor]:
    """Say it in torch, chunk by chunk of columns, on whatever device the blocks are."""
    wide = torch.float32 if precision == "f32" else torch.float64
    total = [torch.zeros(x.shape[0], width, dtype=torch.float64) for x, width in pairs]
    sums = Partials()
    for (x, width), y in zip(pairs, total, strict=True):
        for start, chunk in sum_chunks(x, wide):
            omega = torch.from_numpy(signs(chunk.shape[1], width, seed, x.first + start))
            sums.add(y, chunk @ omega.to(wide).contiguous().to(chunk.device))
    sums.flush()
    return total


@torch.no_grad()
def reference_power(pairs: Sequence[tuple[RowBlocks, Tensor]], precision: str) -> list[Tensor]:
    """Say it in torch, chunk by chunk of columns, on whatever device the blocks are."""
    wide = torch.float32 if precision == "f32" else torch.float64
    total = [torch.zeros(q.shape, dtype=torch.float64) for _, q in pairs]
    sums = Partials()
    for (x, q), y in zip(pairs, total, strict=True):
        weights = q.to(wide).contiguous().to(x.device or q.device)
        for _, chunk in sum_chunks(x, wide):
            sums.add(y, chunk @ (chunk.T.contiguous() @ weights))
    sums.flush()
    return total


def _refuses(pairs: Sequence[tuple[RowBlocks, object]]) -> str | None:
    return refuses_device([x for x, _ in pairs])


def _starts_late(pairs: Sequence[tuple[RowBlocks, object]]) -> str | None:
    if any(x.first for x, _ in pairs):
        return "it draws signs from column 0 on, and these are later columns of a matrix that is sent in chunks"
    return None


def _refuses_sketch(pairs: Sequence[tuple[RowBlocks, object]]) -> str | None:
    return _starts_late(pairs) or _refuses(pairs)


def _from_column_0(kernels: Backend[Callable[..., Any]]) -> Backend[Callable[..., Any]]:
    return replace(kernels, refuses=lambda pairs: _starts_late(pairs) or kernels.refuses(pairs))


BACKENDS = (
    *_native.backends(_cpu, _refuses_sketch),
    *map(_from_column_0, _device.backends("sketch")),
    Backend("reference", reference, lambda *_: None),
)
POWER_BACKENDS = (
    *_native.backends(_cpu_power, _refuses),
    *_device.backends("power"),
    Backend("reference", reference_power, lambda *_: None),
)
