"""The Gram that a step of joint refinement takes the leading directions of, from cores that are never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan import _core, _native
from loraspan._dispatch import Backend, choose
from loraspan.errors import ShapeError
from loraspan.ops.places import backend_at


def joint_gram(near: Tensor, far: Tensor, g: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Give ``sum_i C_i g g^T C_i^T`` for cores ``C_i = near_i^T far_i``.

    As ``near_i^T (far_i g) (far_i g)^T near_i``, whose middle is a square of ``r``.

    Args:
        near: ``[T, r, l]``, float64.
        far: ``[T, r, d]``, float64.
        g: ``[d, k]``, float64.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``[l, l]``, symmetric. Sums over all rows are of 128 products at a time, and then of those. The number of
        threads changes no bit.

    Raises:
        ShapeError: if the arguments do not fit together or are not float64.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> joint_gram(torch.ones(3, 1, 2).double(), torch.ones(3, 1, 1).double(), torch.ones(1, 1).double())
        tensor([[3., 3.],
                [3., 3.]], dtype=torch.float64)

    Source:
        Higher-order orthogonal iteration: De Lathauwer, De Moor, Vandewalle, 2000.
    """
    if (
        (near.ndim, far.ndim, g.ndim) != (3, 3, 2)
        or near.shape[:2] != far.shape[:2]
        or far.shape[2] != g.shape[0]
        or not near.dtype == far.dtype == g.dtype == torch.float64
    ):
        raise ShapeError(
            f"joint_gram: near, far and g are float64 of [T, r, l], [T, r, d] and [d, k]; got {list(near.shape)} of "
            f"{near.dtype}, {list(far.shape)} of {far.dtype} and {list(g.shape)} of {g.dtype}"
        )
    chosen = choose("joint_gram", BACKENDS, backend_at(near.device, backend), near, far, g)
    return chosen.run(*(x.resolve_neg() for x in (near, far, g)))


def _cpu(near: Tensor, far: Tensor, g: Tensor, *, isa: str) -> Tensor:
    near, far, g = (x.detach().contiguous() for x in (near, far, g))
    out = near.new_empty(near.shape[2], near.shape[2])
    sizes = (*near.shape, *g.shape)
    _core.joint_gram(near.data_ptr(), far.data_ptr(), g.data_ptr(), out.data_ptr(), sizes, _native.threads(), isa)
    return out


@torch.no_grad()
def reference(near: Tensor, far: Tensor, g: Tensor) -> Tensor:
    """Say it in torch."""
    seen = far @ g
    found = near.flatten(0, 1).T @ (seen @ seen.mT @ near).flatten(0, 1)
    return (found + found.T) / 2


def _refuses(near: Tensor, far: Tensor, g: Tensor) -> str | None:
    if near.is_cpu and far.is_cpu and g.is_cpu:
        return None
    return f"it reads CPU memory, and the arguments are on {near.device}, {far.device} and {g.device}"


BACKENDS = (*_native.backends(_cpu, _refuses), Backend("reference", reference, lambda *_: None))
