"""The exact SVD of low-rank products and of their weighted sums, from the factors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from loraspan._default_device import cpu_by_default
from loraspan._native import DTYPE_CODES
from loraspan.errors import ArgumentError, ShapeError
from loraspan.linalg.factors import Rows
from loraspan.linalg.products import Products, decompose
from loraspan.linalg.svd import SVD
from loraspan.ops.blocks import RowBlocks
from loraspan.ops.places import find_device, off_metal


@overload
def factored_svd(
    b: Tensor,
    a: Tensor,
    rank: int | None = None,
    *,
    scale: float = 1.0,
    device: str | torch.device | None = None,
    backend: str | None = None,
) -> SVD: ...
@overload
def factored_svd(
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    rank: int | None = None,
    *,
    scale: float | Sequence[float] = 1.0,
    device: str | torch.device | None = None,
    backend: str | None = None,
) -> list[SVD]: ...
@torch.no_grad()
@cpu_by_default
def factored_svd(
    b: Tensor | Sequence[Tensor],
    a: Tensor | Sequence[Tensor],
    rank: int | None = None,
    *,
    scale: float | Sequence[float] = 1.0,
    device: str | torch.device | None = None,
    backend: str | None = None,
) -> SVD | list[SVD]:
    r"""Give the singular value decomposition of ``scale * b @ a`` without forming the product.

    Args:
        b: ``[..., n, r]``, float16, bfloat16, float32 or float64, with any strides; or a list of matrices of all sizes.
        a: ``[..., r, d]``, with the batch dimensions and the device of ``b``; its dtype may differ. Or a list.
        rank: keep at most so many triplets. ``None`` keeps all.
        scale: a factor without unit, ``alpha / r`` for a LoRA adapter; of either sign. For lists, also one per pair.
        device: ``"cuda"`` for factors that lie elsewhere: they are sent there in chunks of columns, two at a time of
            128 MB each. ``None`` takes where they lie. ``"mps"`` takes the CPU, since all of this is float64.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``), ``"cuda"``, ``"triton"`` or
            ``"reference"``.

    Returns:
        ``SVD(u, s, vh, discarded)``: ``u [..., n, k]``, ``s [..., k]``, ``vh [..., k, d]`` in float64 if a factor is
        float64, else in float32; lists give a list. ``k`` is the numerical rank of the product, or ``rank`` if that is
        less: zero factors give ``k = 0``. The members of a batched tensor share ``k = min(r, n, d, rank)``; triplets
        that do not exist have ``s = 0`` and zero vectors. A triplet exists where ``s`` is above the rounding of the
        product in float64, ``8 r 2^-53 |scale| sum_j |b_j| |a_j|`` over columns of ``b`` and rows of ``a``.

        Everything is computed in float64 and rounded once to the dtype, of unit roundoff ``u``. To first order ``s`` is
        within that rounding floor, and ``u s``, of the exact one; ``u`` and ``vh`` are orthonormal to ``8 r u``; and
        the product less its decomposition is within ``8 r u s_1`` of what was cut. ``discarded [...]``, float64 on the
        CPU, is the energy that was cut. The entry of largest magnitude of a column of ``u`` is positive. A member has
        the bits that it has alone, for any number of threads. The result is not tracked by autograd, and lies where
        the factors do.

    Raises:
        ShapeError: if shapes, batch dimensions, dtypes or devices do not fit.
        ArgumentError: if ``rank`` or ``scale`` is out of range, two lists differ in length, or there is no such device.
        NotFiniteError: if a factor holds a NaN or an infinity, or a singular value exceeds the dtype. Entries of
            float64 factors count as 0 below 1e-154, since their squares are summed, and raise this above 1e154.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> b, a = torch.tensor([[0.0], [3.0]]), torch.tensor([[4.0, 0.0, 0.0]])
        >>> u, s, vh, discarded = factored_svd(b, a, scale=0.5)
        >>> u.T, s, vh
        (tensor([[0., 1.]]), tensor([6.]), tensor([[1., 0., 0.]]))
        >>> [svd.rank for svd in factored_svd([b, torch.zeros(5, 1)], [a, torch.ones(1, 4)])]
        [1, 0]

    Source:
        Truncation by way of two QR factorizations: Grasedyck, Hackbusch, *Construction and arithmetics of H-matrices*,
        Computing 70, 2003. How the factorizations are taken: :mod:`loraspan.linalg.factors`.
    """
    _check_rank("factored_svd", rank)
    place = _place("factored_svd", device)
    if isinstance(b, Tensor) and isinstance(a, Tensor):
        scales = [_number("factored_svd", "scale", scale)]
        return _batch("factored_svd", [b], [a], scales, ("b", "a"), rank, place, backend)
    bs, as_ = _lists("factored_svd", b, a)
    scales = _numbers("factored_svd", "scale", scale, len(bs))
    alike: dict[tuple[int, int, int, torch.dtype, torch.device], list[int]] = {}
    for i, (x, y) in enumerate(zip(bs, as_, strict=True)):
        _check_pair("factored_svd", x, y, (f"b[{i}]", f"a[{i}]"))
        if x.ndim != 2:
            raise ShapeError(f"factored_svd: lists hold matrices; b[{i}] is {list(x.shape)}")
        alike.setdefault((x.shape[1], x.shape[0], y.shape[1], _dtype([x, y]), x.device), []).append(i)
    found: dict[int, SVD] = {}
    for (r, n, d, dtype, home), which in alike.items():
        left, right = ([_on([x], place) for x in side] for side in ([bs[i].mT for i in which], [as_[i] for i in which]))
        weights = torch.tensor([[scales[i]] * r for i in which], dtype=torch.float64)
        named = [(f"{name}[{i}]", side[i]) for i in which for name, side in (("b", bs), ("a", as_))]
        products = Products((len(which), r, n, d), left, right, weights, dtype, named)
        members = decompose("factored_svd", products, rank, backend).members()
        found.update(zip(which, [_brought(svd, home) for svd in members], strict=True))
    return [found[i] for i in range(len(bs))]


@torch.no_grad()
@cpu_by_default
def merged_svd(
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    *,
    device: str | torch.device | None = None,
    backend: str | None = None,
) -> SVD:
    r"""Give the singular value decomposition of ``sum_i weights[i] * b[i] @ a[i]`` without forming the sum.

    The factors are taken as one product of concatenated ones, and read where they lie. This is what merging adapters
    needs: ``weights[i]`` is the share of an adapter times its own ``alpha / r``.

    Args:
        b: matrices ``[..., n, r_i]`` of one ``n``; ranks, dtypes and strides may differ.
        a: matrices ``[..., r_i, d]`` of one ``d``, one for each of ``b``; leading dimensions, equal for all, are batch
            dimensions, such as one adapter's layers of equal shape.
        weights: one finite number each, of either sign; ``None`` is 1 for all.
        rank: keep at most so many triplets. ``None`` keeps all.
        device: as for :func:`factored_svd`.
        backend: as for :func:`factored_svd`.

    Returns:
        As for :func:`factored_svd`, with ``r`` the sum of the ranks, and ``|weights[i]|`` under the sum that says what
        counts as rounding. The sum of the ranks may exceed ``n`` and ``d``: the sum of products, which then is no
        larger than the factors, is formed in float64.

    Raises:
        ShapeError: if shapes, batch dimensions, dtypes or devices do not fit.
        ArgumentError: if there is no pair, ``rank`` or a weight is out of range, the lists differ in length, or there
            is no such device.
        NotFiniteError: as for :func:`factored_svd`.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> b, a = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> merged_svd([b, b], [a, a.half()], [0.75, 0.5]).s
        tensor([2.5000])
        >>> merged_svd([b, b], [a, a], [1.0, -1.0]).rank
        0

    Source:
        As for :func:`factored_svd`, where sums of low-rank matrices are rounded so. The dense way:
        ``add_weighted_adapter(combination_type="svd")`` of PEFT.
    """
    _check_rank("merged_svd", rank)
    place = _place("merged_svd", device)
    bs, as_ = _lists("merged_svd", b, a)
    if not bs:
        raise ArgumentError("merged_svd: b and a need at least one matrix each; got none")
    shares = _numbers("merged_svd", "weights", 1.0 if weights is None else weights, len(bs))
    return _batch("merged_svd", bs, as_, shares, None, rank, place, backend)


def _batch(
    operator: str,
    bs: Sequence[Tensor],
    as_: Sequence[Tensor],
    weights: Sequence[float],
    names: tuple[str, str] | None,
    rank: int | None,
    place: torch.device | None,
    backend: str | None,
) -> SVD:
    """Decompose the weighted sum of products, for every place of the batch dimensions."""
    names_of = [names or (f"b[{i}]", f"a[{i}]") for i in range(len(bs))]
    for b, a, pair in zip(bs, as_, names_of, strict=True):
        _check_pair(operator, b, a, pair)
    *batch, n, _ = bs[0].shape
    for b, a, pair in zip(bs, as_, names_of, strict=True):
        if b.shape[-2] != n or a.shape[-1] != as_[0].shape[-1] or list(b.shape[:-2]) != batch:
            first = f"{names_of[0][0]} {list(bs[0].shape)} and {names_of[0][1]} {list(as_[0].shape)}"
            raise ShapeError(
                f"{operator}: products need one shape to be added; got {pair[0]} {list(b.shape)} and {pair[1]} "
                f"{list(a.shape)} beside {first}"
            )
    d, count = as_[0].shape[-1], math.prod(batch)
    # not reshape(-1, ...): torch cannot infer a size when another one is 0
    left, right = (_rows([x.reshape(count, *x.shape[-2:]) for x in side], place) for side in ([b.mT for b in bs], as_))
    repeated = [w for w, a in zip(weights, as_, strict=True) for _ in range(a.shape[-2])]
    named = [
        pair for names, *tensors in zip(names_of, bs, as_, strict=True) for pair in zip(names, tensors, strict=True)
    ]
    products = Products(
        (count, len(repeated), n, d),
        left,
        right,
        torch.tensor([repeated], dtype=torch.float64),
        _dtype([*bs, *as_]),
        named,
    )
    found = decompose(operator, products, rank, backend)
    if not batch:
        return _brought(found.members()[0], bs[0].device)
    u, s, v, discarded = (x.reshape(*batch, *x.shape[1:]) for x in found)
    return _brought(SVD(u.mT, s, v, discarded), bs[0].device)


def _rows(blocks: Sequence[Tensor], place: torch.device | None) -> Rows:
    """Take blocks ``[N, r_i, d]`` of N matrices, to be computed with at ``place``."""
    if len(blocks) == 1 and place in (None, blocks[0].device):
        return off_metal(blocks[0])
    return [_on(members, place) for members in zip(*blocks, strict=True)]


def _place(operator: str, device: str | torch.device | None) -> torch.device | None:
    """Give the device to send factors to; all is float64, so Metal has no part in it."""
    place = find_device(operator, device)
    return None if place is not None and place.type == "mps" else place


def _on(blocks: Sequence[Tensor], place: torch.device | None) -> RowBlocks:
    return RowBlocks([off_metal(block) for block in blocks]).on(place)


def _brought(svd: SVD, home: torch.device) -> SVD:
    """Take what was computed beside Metal to factors that lie there."""
    if home.type != "mps":
        return svd
    return SVD(svd.u.to(home), svd.s.to(home), svd.vh.to(home), svd.discarded)


def _dtype(factors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in factors) else torch.float32


def _check_pair(operator: str, b: Tensor, a: Tensor, names: tuple[str, str]) -> None:
    for name, x in zip(names, (b, a), strict=True):
        if not isinstance(x, Tensor):
            raise ArgumentError(f"{operator}: {name} is a tensor; got {type(x).__name__}: use torch.as_tensor")
        if x.dtype not in DTYPE_CODES or x.layout != torch.strided:
            raise ShapeError(
                f"{operator}: {name} is a dense tensor of float16, bfloat16, float32 or float64; "
                f"got {x.dtype}, {x.layout}"
            )
    if b.ndim < 2 or a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2] or b.shape[-1] != a.shape[-2]:
        raise ShapeError(
            f"{operator}: {names[0]} [..., n, r] and {names[1]} [..., r, d] need one r and the same batch dimensions; "
            f"got {list(b.shape)} and {list(a.shape)}"
        )
    if b.device != a.device:
        raise ShapeError(f"{operator}: {names[0]} is on {b.device} and {names[1]} on {a.device}; move one of them")


def _check_rank(operator: str, rank: int | None) -> None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
        raise ArgumentError(f"{operator}: rank is a whole number of at least 0, or None for all; got {rank!r}")


def _lists(operator: str, b: object, a: object) -> tuple[list[Tensor], list[Tensor]]:
    for name, x in (("b", b), ("a", a)):
        if isinstance(x, Tensor) or not isinstance(x, Sequence):
            raise ArgumentError(f"{operator}: b and a are lists of tensors; {name} is {type(x).__name__}")
    assert isinstance(b, Sequence)
    assert isinstance(a, Sequence)
    if len(b) != len(a):
        raise ArgumentError(f"{operator}: b and a are as many matrices; got {len(b)} and {len(a)}")
    return list(b), list(a)


def _numbers(operator: str, name: str, values: float | Sequence[float], count: int) -> list[float]:
    if isinstance(values, (int, float)):
        return [_number(operator, name, values)] * count
    if len(values) != count:
        raise ArgumentError(f"{operator}: {name} is one number for each of the {count} pairs; got {len(values)}")
    return [_number(operator, name, value) for value in values]


def _number(operator: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError(f"{operator}: {name} is a finite number; got {value!r}")
    return float(value)
