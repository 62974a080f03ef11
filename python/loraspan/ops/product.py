"""Products of small or tall float64 matrices, many at once: what lies between the passes over the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan import _core, _native
from loraspan._dispatch import Backend, choose
from loraspan.errors import ShapeError
from loraspan.ops.places import backend_at


def product(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Give ``a @ b``, with the same bits for any number of threads and whatever else is in the batch.

    Args:
        a: ``[m, k]`` or ``[T, m, k]``, float64, in any order in memory.
        b: ``[k, n]``, for all members of ``a``, or ``[T, k, n]``.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``[m, n]`` or ``[T, m, n]``. Sums are of 128 products at a time, and then of those, so an entry is within
        ``(min(k, 128) + k / 128 + 1) 2^-53 |a| |b|``.

    Raises:
        ShapeError: if the matrices do not fit together or are not float64.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> product(torch.ones(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
        tensor([[1., 1., 1.],
                [1., 1., 1.]], dtype=torch.float64)
    """
    members = a.shape[:-2]
    if (
        a.ndim not in (2, 3)
        or b.ndim not in (2, a.ndim)
        or b.shape[:-2] not in ((), members)
        or a.shape[-1] != b.shape[-2]
        or not a.dtype == b.dtype == torch.float64
    ):
        raise ShapeError(
            f"product: a and b are float64 of [m, k] and [k, n], or T of them; got {list(a.shape)} of {a.dtype} and "
            f"{list(b.shape)} of {b.dtype}"
        )
    return choose("product", BACKENDS, backend_at(a.device, backend), a, b).run(a.resolve_neg(), b.resolve_neg())


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Give ``a^T b`` of tall float64 blocks ``[m, k]`` and ``[m, n]``, ``[k, n]``.

    Example:
        >>> import torch
        >>> inner(torch.ones(3, 1, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
        tensor([[1., 1., 1.]], dtype=torch.float64)
    """
    return product(a.mT, b)


def _cpu(a: Tensor, b: Tensor, *, isa: str) -> Tensor:
    # one after the other in memory, members with one b are rows of one matrix
    if a.ndim == 3 and b.ndim == 2 and a.is_contiguous():
        return _cpu(a.flatten(0, 1), b, isa=isa).view(*a.shape[:2], b.shape[1])
    if b.stride(-1) != 1:
        b = b.contiguous()
    # asked once: there are hundreds of products in a fit, many of them small
    (*count, m, k), n = a.shape, b.shape[-1]
    out = a.new_empty(*count, m, n)
    at_a, at_b = ((x.data_ptr(), *(x.stride() if x.ndim == 3 else (0, *x.stride()))) for x in (a, b))
    sizes = (count[0] if count else 1, m, n, k)
    _core.product(at_a, at_b[:3], out.data_ptr(), sizes, _native.threads(), isa)
    return out


@torch.no_grad()
def reference(a: Tensor, b: Tensor) -> Tensor:
    """Say it in torch."""
    return a @ b


def _refuses(a: Tensor, b: Tensor) -> str | None:
    if a.is_cpu and b.is_cpu:
        return None
    return f"it reads CPU memory, and the matrices are on {a.device} and {b.device}"


BACKENDS = (*_native.backends(_cpu, _refuses), Backend("reference", reference, lambda *_: None))
