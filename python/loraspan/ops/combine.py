"""Combine the rows of a matrix into a basis, and take the products with it in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan import _core, _device, _native
from loraspan._default_device import cpu_by_default
from loraspan._dispatch import Backend, choose
from loraspan.errors import ArgumentError, ShapeError
from loraspan.ops.blocks import RowBlocks, block_table, refuses_device, sum_chunks
from loraspan.ops.places import Partials, carried
from loraspan.ops.rounding import narrow
from loraspan.ops.stream import in_chunks


class Combined(NamedTuple):
    """What :func:`combine` gives: ``v [d, k]`` as stored, ``xv [R, k]`` and ``vtv [k, k]`` in float64."""

    v: Tensor
    xv: Tensor
    vtv: Tensor


def combine(
    x: RowBlocks | Sequence[Tensor] | Tensor,
    w: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    precision: str = "f32",
    products: bool = True,
    backend: str | None = None,
) -> Combined:
    r"""Give ``V = X^T W`` rounded to ``dtype`` and, of the rounded ``V``, the products ``X V`` and ``V^T V``.

    Args:
        x: ``X [R, d]`` as row blocks, read where they lie; see :class:`RowBlocks`.
        w: ``[R, k]``, float64.
        dtype: what ``V`` is rounded to, once: float16, bfloat16, float32 or float64.
        precision: ``"f32"`` rounds ``W`` to float32 and keeps the sums that make ``V`` in float32, and those of the
            products over at most 128 columns, which are then added in float64. ``"f64"`` keeps every product and sum
            in float64.
        products: whether ``X V`` is wanted, which is nearly half of the work; without it ``xv`` is ``[0, k]``.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``v [d, k]`` (row-major; column-major without ``products``), ``xv [R, k]`` and ``vtv [k, k]`` (float64,
        exactly symmetric). Before its rounding an
        entry of ``V`` is within ``(R + 2) u |X|^T |W|`` of the exact one, ``u = 2^-24`` or ``2^-53``; the products
        with the rounded ``V`` have the bounds of :func:`loraspan.ops.gram`. The compiled kernels give the same bits
        for any number of threads.

    Raises:
        ShapeError: if ``w`` does not have one float64 row per row of ``x``, or the blocks do not fit together.
        ArgumentError: if ``dtype`` or ``precision`` is none of those above.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> v, xv, vtv = combine(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5]], dtype=torch.float64))
        >>> v.T, xv, vtv
        (tensor([[1.5000, 2.0000]]), tensor([[12.5000]], dtype=torch.float64), tensor([[6.2500]], dtype=torch.float64))
    """
    return combine_many([(x, w)], dtype=dtype, precision=precision, products=products, backend=backend)[0]


@cpu_by_default
def combine_many(
    batch: Sequence[tuple[RowBlocks | Sequence[Tensor] | Tensor, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    precision: str = "f32",
    products: bool = True,
    out: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> list[Combined]:
    """Give :func:`combine` of every ``(x, w)`` of a batch, which may differ in all their sizes.

    Each result has the bits that its member gives alone.

    Args:
        batch: pairs of a matrix and its weights, as :func:`combine` takes them.
        dtype: as for :func:`combine`.
        precision: as for :func:`combine`.
        products: as for :func:`combine`.
        out: places for each ``v [d, k]``, of ``dtype`` and any strides; None for those that are to be made.
        backend: as for :func:`combine`.

    Returns:
        One :class:`Combined` per pair.

    Raises:
        ShapeError: if a ``w`` does not fit its matrix.
        ArgumentError: if ``dtype`` or ``precision`` is not one of those of :func:`combine`.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> batch = [(torch.ones(2, 3), torch.ones(2, 1).double()), (torch.ones(1, 4), torch.ones(1, 2).double())]
        >>> [tuple(c.v.shape) for c in combine_many(batch)]
        [(3, 1), (4, 2)]
    """
    if dtype not in _native.DTYPE_CODES:
        raise ArgumentError(f"combine: dtype is torch.float16, bfloat16, float32 or float64; got {dtype}")
    if precision not in _native.PRECISIONS:
        raise ArgumentError(f"combine: precision is 'f32' or 'f64'; got {precision!r}")
    pairs = [(RowBlocks.of(x), w.resolve_neg()) for x, w in batch]
    for x, w in pairs:
        if w.ndim != 2 or w.shape[0] != x.shape[0] or w.dtype != torch.float64:
            raise ShapeError(
                f"combine: w needs one float64 row for each of the {x.shape[0]} rows of x; "
                f"got {list(w.shape)} of {w.dtype}"
            )
    places = [None] * len(pairs) if out is None else list(out)
    for (x, w), place in zip(pairs, places, strict=True):
        device = x.home(dtype) or w.device
        if place is not None and (place.shape, place.dtype, place.device) != ((x.columns, w.shape[1]), dtype, device):
            raise ShapeError(
                f"combine: out needs to be [{x.columns}, {w.shape[1]}] of {dtype} on {device}; "
                f"got {list(place.shape)} of {place.dtype} on {place.device}"
            )
    if all(x.plain for x, _ in pairs):
        chosen = choose("combine", BACKENDS, backend, pairs)
        if chosen.name in _device.ORDER["combine"]:
            return _beside_nothing(chosen.run, pairs, dtype, precision, products, places)
        return chosen.run(pairs, dtype, precision, products, places)
    return _in_chunks(pairs, dtype, precision, products, places, backend)


def _beside_nothing(
    run: Callable[..., list[Combined]],
    pairs: Sequence[tuple[RowBlocks, Tensor]],
    dtype: torch.dtype,
    precision: str,
    products: bool,
    places: Sequence[Tensor | None],
) -> list[Combined]:
    """Run kernels of a GPU on what lies there: a matrix of no blocks lies nowhere, and its V is zeros beside W."""
    some = [i for i, (x, _) in enumerate(pairs) if x.device is not None]
    found: list[Combined | None] = [None] * len(pairs)
    if some or not pairs:
        made = run([pairs[i] for i in some], dtype, precision, products, [places[i] for i in some])
        for i, one in zip(some, made, strict=True):
            found[i] = one
    for i, ((x, w), place) in enumerate(zip(pairs, places, strict=True)):
        if x.device is None:
            v = torch.empty(x.columns, w.shape[1], dtype=dtype, device=w.device) if place is None else place
            xv, vtv = (torch.zeros(size, w.shape[1], dtype=torch.float64) for size in (0, w.shape[1]))
            found[i] = Combined(v.zero_(), xv, vtv)
    return [one for one in found if one is not None]


def _in_chunks(
    pairs: Sequence[tuple[RowBlocks, Tensor]],
    dtype: torch.dtype,
    precision: str,
    products: bool,
    places: Sequence[Tensor | None],
    backend: str | None,
) -> list[Combined]:
    """Add the products up over chunks of columns; each chunk gives its rows of ``V``."""
    out = [
        Combined(
            torch.empty(x.columns, w.shape[1], dtype=dtype, device=x.home(dtype) or w.device) if v is None else v,
            torch.zeros(x.shape[0] if products else 0, w.shape[1], dtype=torch.float64),
            torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64),
        )
        for (x, w), v in zip(pairs, places, strict=True)
    ]
    for chunks in in_chunks([x for x, _ in pairs], wide=torch.float64 in (dtype, _wide(precision))):
        there = [(chunk.x, pairs[chunk.member][1]) for chunk in chunks]
        run = choose("combine", BACKENDS, backend, there).run
        for chunk, part in zip(chunks, run(there, dtype, precision, products, [None] * len(there)), strict=True):
            v, xv, vtv = out[chunk.member]
            rows = v[chunk.start : chunk.start + chunk.x.columns]
            rows.copy_(carried(part.v, v.device, dtype))
            xv += part.xv
            vtv += part.vtv
    return out


def _wide(precision: str) -> torch.dtype:
    return torch.float32 if precision == "f32" else torch.float64


def _cpu(
    pairs: Sequence[tuple[RowBlocks, Tensor]],
    dtype: torch.dtype,
    precision: str,
    products: bool,
    places: Sequence[Tensor | None],
    *,
    isa: str,
) -> list[Combined]:
    blocks, spans = block_table([x for x, _ in pairs])
    weights = [w.contiguous() for _, w in pairs]

    def basis(d: int, k: int) -> Tensor:
        # without products the kernel makes V column after column
        made = _native.in_huge_pages(torch.empty((d, k) if products else (k, d), dtype=dtype))
        return made if products else made.T

    out = [
        Combined(
            basis(x.columns, w.shape[1]) if place is None else place,
            torch.empty(x.shape[0] if products else 0, w.shape[1], dtype=torch.float64),
            torch.empty(w.shape[1], w.shape[1], dtype=torch.float64),
        )
        for (x, w), place in zip(pairs, places, strict=True)
    ]
    code = _native.DTYPE_CODES[dtype]
    jobs = [
        (*span, w.data_ptr(), w.shape[1], c.v.data_ptr(), *c.v.stride(), code, c.xv.data_ptr(), c.vtv.data_ptr())
        for span, w, c in zip(spans, weights, out, strict=True)
    ]
    _core.combine(blocks, _native.table(jobs, 11), _native.PRECISIONS[precision], _native.threads(), isa)
    return out


@torch.no_grad()
def reference(
    pairs: Sequence[tuple[RowBlocks, Tensor]],
    dtype: torch.dtype,
    precision: str,
    products: bool,
    places: Sequence[Tensor | None],
) -> list[Combined]:
    """Say it in torch, chunk by chunk of columns, on whatever device the blocks are."""
    sums = Partials()
    found = [_reference(x, w, dtype, _wide(precision), products, sums) for x, w in pairs]
    sums.flush()
    out = []
    for (v, xv, vtv), place in zip(found, places, strict=True):
        v = v if place is None else place.copy_(v)
        out.append(Combined(v, xv, torch.tril(vtv) + torch.tril(vtv, -1).T))
    return out


def _reference(
    x: RowBlocks, w: Tensor, dtype: torch.dtype, wide: torch.dtype, products: bool, sums: Partials
) -> Combined:
    rank = w.shape[1]
    device = x.device or w.device
    weights = w.to(wide).contiguous().to(device)
    v = torch.empty(x.columns, rank, dtype=dtype, device=device)
    xv = torch.zeros(x.shape[0] if products else 0, rank, dtype=torch.float64)
    vtv = torch.zeros(rank, rank, dtype=torch.float64)
    for start, chunk in sum_chunks(x, wide):
        rows = narrow(chunk.T.contiguous() @ weights, dtype)
        v[start : start + len(rows)] = rows
        rounded = rows.to(wide)
        if products:
            sums.add(xv, chunk @ rounded)
        sums.add(vtv, rounded.T.contiguous() @ rounded)
    return Combined(v, xv, vtv)


def _refuses(pairs: Sequence[tuple[RowBlocks, Tensor]]) -> str | None:
    return refuses_device([x for x, _ in pairs])


BACKENDS = (
    *_native.backends(_cpu, _refuses),
    *_device.backends("combine"),
    Backend("reference", reference, lambda *_: None),
)
