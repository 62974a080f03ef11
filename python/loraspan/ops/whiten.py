"""Tall float64 blocks made orthonormal in a metric, in one round and in place, where rounding allows that."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan import _core, _native
from loraspan._dispatch import Backend, choose
from loraspan.errors import ShapeError
from loraspan.ops.dense import LARGEST, reference_root
from loraspan.ops.places import backend_at

_ROUNDOFF = 2.0**-53


def whiten_(block: Tensor, image: Tensor, limit: float, *, backend: str | None = None) -> bool:
    r"""Make ``block`` what ``image`` is by its root, ``image R^-1`` with ``R^T R = block^T image``, if that is good.

    With ``image = M block``, ``M = D^T D``, that is ``D^T Q`` for the orthonormal ``Q = D block R^-1``, and needs no
    ``D``. How far ``Q`` is from orthonormal is estimated: by the rounding of ``block^T image``, which its asymmetry
    shows, times the square of the largest entry of ``R^-1``, both for columns made unit ones. Where columns depend on
    others to rounding, ``R^-1`` is a pseudo-inverse: some of the result are zeros, and it spans what the block spans.

    Args:
        block: ``[m, k]``, float64, contiguous. Overwritten if the result is True.
        image: ``[m, k]``, float64, contiguous, in other memory.
        limit: how far from orthonormal the result may be.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        Whether it was done; if not, as where columns nearly depend on each other, one is zero or something is not
        finite, ``block`` is as it was. Neither the answer nor a bit depends on the number of threads, up to 512
        columns; more go to torch and LAPACK.

    Raises:
        ShapeError: if the blocks are not such, or are one.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> block = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
        >>> whiten_(block, block.clone(), 1e-8), block.T
        (True, tensor([[0.6000, 0.8000]], dtype=torch.float64))

    Source:
        Cholesky QR in an inner product: Lowery and Langou, *Stability analysis of QR factorization in an oblique inner
        product*, 2014.
    """
    fits = block.ndim == 2 and block.shape == image.shape and block.dtype == image.dtype == torch.float64
    if not (fits and block.is_contiguous() and image.is_contiguous()) or block.is_neg():
        raise ShapeError(
            f"whiten: block and image are contiguous float64 of [m, k]; got {list(block.shape)} of {block.dtype} and "
            f"{list(image.shape)} of {image.dtype}, strides {list(block.stride())} and {list(image.stride())}"
        )
    if block.numel() and block.data_ptr() == image.data_ptr():
        raise ShapeError("whiten: block and image are the same memory; give a copy of one")
    chosen = choose("whiten", BACKENDS, backend_at(block.device, backend), block, image)
    return chosen.run(block, image.resolve_neg(), limit)


def _cpu(block: Tensor, image: Tensor, limit: float, *, isa: str) -> bool:
    if block.shape[1] > LARGEST:
        return reference(block, image, limit)
    rows, columns = block.shape
    return _core.whiten(block.data_ptr(), image.data_ptr(), rows, columns, limit, _native.threads(), isa)


@torch.no_grad()
def reference(block: Tensor, image: Tensor, limit: float) -> bool:
    """Say it in torch."""
    gram = block.T @ image
    if not gram.isfinite().all():
        return False
    size = gram.diagonal().clamp(min=0).sqrt()
    inverse = reference_root((gram + gram.T) / 2).inverse
    # a column of zeros makes it a NaN
    noise = _ROUNDOFF + ((gram - gram.T) / size / size[:, None]).abs()
    if gram.numel() and not bool(noise.amax() * (size[:, None] * inverse).abs().amax().square() <= limit):
        return False
    torch.mm(image, inverse, out=block)
    return True


def _refuses(block: Tensor, image: Tensor) -> str | None:
    if block.is_cpu and image.is_cpu:
        return None
    return f"it reads CPU memory, and the blocks are on {block.device} and {image.device}"


BACKENDS = (*_native.backends(_cpu, _refuses), Backend("reference", reference, lambda *_: None))
