"""Rebuild vectors from their loadings on a basis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan import _core, _device, _native
from loraspan._dispatch import Backend, choose
from loraspan.errors import ShapeError
from loraspan.ops.library import register
from loraspan.ops.packed import NOWHERE, Packed, refuses_packed, seen, shape_of, unpacked
from loraspan.ops.rounding import narrow


class Piece(NamedTuple):
    """One product of :func:`reconstruct_many`, written straight to its place.

    ``out [m, p]`` is overwritten with ``scale * basis [m, k] @ loadings [k, p]``, or with ``scale * basis`` where
    ``loadings`` is None: so private columns are converted and put beside rebuilt ones. All may have any strides.
    Packed rows count as columns: ``basis`` may be a :class:`loraspan.ops.Packed` ``[k, m]`` and ``loadings`` one of
    ``[p, k]``. They are read tile by tile, with the bits that unpacking them to float32 first would give.
    """

    basis: Tensor | Packed
    loadings: Tensor | Packed | None
    out: Tensor
    scale: float = 1.0


def reconstruct(
    basis: Tensor,
    loadings: Tensor,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Give ``scale * basis @ loadings``.

    Leading dimensions are batch dimensions and must be equal. Differentiable in ``basis`` and ``loadings``.

    Args:
        basis: ``[..., m, k]``, float16, bfloat16, float32 or float64. Its columns are the basis vectors; nothing here
            needs them orthonormal.
        loadings: ``[..., k, n]``, on the device of ``basis``; its dtype may differ.
        scale: a factor without unit, ``alpha / r`` for a LoRA adapter.
        dtype: of the result; ``None`` takes that of ``basis``.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``[..., m, n]``. Sums are kept in float32, or in float64 if ``basis``, ``loadings`` or the result are float64;
        each entry is within ``(k + 2) u |scale| |basis| @ |loadings|`` of the exact one, ``u`` the unit roundoff of
        the sum, and is then rounded once to ``dtype``. The same bits for any batch, and from the compiled kernels for
        any number of threads.

    Raises:
        ShapeError: if ``k``, the batch dimensions or the devices differ, or a dtype is none of those above.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> basis = torch.eye(3)[:, :2]
        >>> reconstruct(basis, torch.tensor([[1.0], [2.0]])).T
        tensor([[1., 2., 0.]])

    Source:
        The bound: Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., section 3.5.
    """
    if basis.ndim < 2 or loadings.ndim != basis.ndim or basis.shape[:-2] != loadings.shape[:-2]:
        raise ShapeError(
            f"reconstruct: basis [..., m, k] and loadings [..., k, n] need 2 dimensions or more and the same batch; "
            f"got {list(basis.shape)} and {list(loadings.shape)}"
        )
    wants_gradient = torch.is_grad_enabled() and (basis.requires_grad or loadings.requires_grad)
    if wants_gradient or torch.compiler.is_compiling():
        found: Tensor = torch.ops.loraspan.reconstruct(basis, loadings, scale, dtype, backend)
        return found
    return rebuild(basis, loadings, scale, dtype, backend)


def rebuild(basis: Tensor, loadings: Tensor, scale: float, dtype: torch.dtype | None, backend: str | None) -> Tensor:
    """Run a backend on a batch whose dimensions fit; see :func:`reconstruct`."""
    *batch, m, k = basis.shape
    n = loadings.shape[-1]
    out = basis.new_empty(*batch, m, n, dtype=dtype or basis.dtype)
    count = 1
    for size in batch:
        count *= size
    # not reshape(-1, ...): torch cannot infer a size when another one is 0
    flat = basis.reshape(count, m, k), loadings.reshape(count, *loadings.shape[-2:]), out.view(count, m, n)
    whole = Piece(*flat, scale)
    # one member stands for all, and an empty batch is checked all the same
    first, weights, target = (t[0] if count else t.new_empty(t.shape[1:]) for t in flat)
    _Checked([Piece(first, weights, target)])
    choose("reconstruct", BACKENDS, backend, [whole]).run([whole])
    return out


def reconstruct_many(pieces: Sequence[Piece], *, backend: str | None = None) -> None:
    """Do many products of all sizes at once, each written once to its own place in its own dtype.

    Args:
        pieces: see :class:`Piece`. No ``out`` may overlap another tensor of the call; but where there is one piece, row
            ``i`` of ``out`` may lie in row ``i`` of ``basis``, since rows are read before any of them is written.
        backend: as for :func:`reconstruct`.

    Raises:
        ShapeError: if the sizes or devices of a piece do not fit; nothing is written then.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> up = torch.empty(3, 2)
        >>> shared = Piece(torch.ones(3, 2), torch.ones(2, 1), up[:, :1], scale=0.5)
        >>> private = Piece(torch.full((3, 1), 7.0, dtype=torch.float16), None, up[:, 1:])
        >>> reconstruct_many([shared, private])
        >>> up[0]
        tensor([1., 7.])
    """
    checked = _Checked(pieces)
    choose("reconstruct", BACKENDS, backend, checked).run(checked)


class _Checked(list[Piece]):
    """Pieces that fit, with what the compiled core reads of each, and a device that some are on, if not the CPU.

    Tensors are asked but once: those of many tasks lie far apart in memory, where asking is a wait. So is a basis that
    many pieces share.
    """

    device: torch.device | None = None

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(pieces)
        read = _native.READER and _native.READER.pieces(self)
        self.jobs, self.scales = read or (self._ask(), np.asarray([p.scale for p in self], dtype=np.float64))

    def _ask(self) -> NDArray[np.int64]:
        """Ask in Python, and say what does not fit."""
        rows: list[tuple[int, ...]] = []
        bases: dict[int, Any] = {}
        for piece in self:
            basis, loadings, out, _ = piece
            left = bases.get(id(basis)) or bases.setdefault(id(basis), seen(basis))
            target = seen(out)
            right = left if loadings is None else seen(loadings)
            if left is None or right is None or target is None:
                raise _misfit(piece)
            m, k, device, of_basis = left
            inner, width, beside, of_loadings = right
            if loadings is None:
                inner, of_loadings = k, NOWHERE
            height, columns, place, of_out = target
            if k != inner or m != height or width != columns or not device == beside == place:
                raise _misfit(piece)
            rows.append((*of_basis, *of_loadings, *of_out, m, k, width))
            self.device = device or self.device
        return _native.table(rows, 15)


def _misfit(piece: Piece) -> ShapeError:
    """Say in which way a piece does not fit."""
    basis, loadings, out, _ = piece
    device = basis.device
    tensors = (basis, out) if loadings is None else (basis, loadings, out)
    for t in tensors:
        if isinstance(t, Tensor) and t.ndim != 2:
            return ShapeError(f"reconstruct: a piece is of matrices; got {[list(t.shape) for t in tensors]}")
        if isinstance(t, Tensor) and (t.layout != torch.strided or t.is_neg()):
            return ShapeError(
                f"reconstruct: tensors are dense and not lazily negated; got one of {t.layout}"
                f"{' that is' if t.is_neg() else ''}: use .to_dense() or .resolve_neg()"
            )
        kind = torch.float32 if isinstance(t, Packed) else t.dtype
        if kind not in _native.DTYPE_CODES or t.device != device:
            return ShapeError(
                f"reconstruct: tensors are float16, bfloat16, float32 or float64 and on one device; "
                f"got {kind} on {t.device} beside {'packed rows' if isinstance(basis, Packed) else basis.dtype} "
                f"on {device}"
            )
    m, k = shape_of(basis)
    return ShapeError(
        f"reconstruct: basis has {k} vectors of length {m}; got "
        f"loadings {None if loadings is None else list(shape_of(loadings))} and out {list(out.shape)}"
    )


def _cpu(pieces: Sequence[Piece], *, isa: str) -> None:
    if isinstance(pieces, _Checked):
        jobs, scales = pieces.jobs, pieces.scales
    else:
        jobs, scales = _batch_jobs(pieces[0]), np.full(pieces[0].out.shape[0], pieces[0].scale)
    _core.reconstruct(jobs, scales, _native.threads(), isa)


def _batch_jobs(whole: Piece) -> NDArray[np.int64]:
    """Give the jobs of one piece of batches ``[N, ., .]``, without making a tensor of each member."""
    sizes = np.asarray([[*whole.basis.shape[1:], whole.out.shape[2]]], dtype=np.int64)
    tensors = [t for t in whole[:3] if isinstance(t, Tensor)]
    return np.concatenate([*map(_native.batch_fields, tensors), sizes.repeat(whole.out.shape[0], 0)], axis=1)


@torch.no_grad()
def reference(pieces: Sequence[Piece]) -> None:
    """Say it in torch, on whatever device the tensors are (MPS among them)."""
    for basis, loadings, out, scale in pieces:
        basis = unpacked(basis)
        loadings = None if loadings is None else unpacked(loadings)
        if out.ndim == 3 and loadings is not None:
            # one by one: a batched product may round otherwise than that of a member alone
            reference([Piece(*members, scale) for members in zip(basis, loadings, out, strict=True)])
            continue
        dtypes = [t.dtype for t in (basis, loadings, out) if t is not None]
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        product = basis.to(wide) if loadings is None else basis.to(wide).contiguous() @ loadings.to(wide).contiguous()
        out.copy_(narrow(scale * product, out.dtype))


def _refuses(pieces: Sequence[Piece]) -> str | None:
    device = pieces.device if isinstance(pieces, _Checked) else pieces[0].out.device
    if device is None or device.type == "cpu":
        return None
    return f"it writes CPU memory, and a piece is on {device}"


def _refuses_packed(otherwise: Callable[..., str | None], pieces: Sequence[Piece]) -> str | None:
    return refuses_packed(*(matrix for piece in pieces for matrix in piece[:2])) or otherwise(pieces)


BACKENDS = (
    *_native.backends(_cpu, _refuses),
    *[Backend(b.name, b.run, partial(_refuses_packed, b.refuses)) for b in _device.backends("reconstruct")],
    Backend("reference", reference, lambda *_: None),
)


def _fake_rebuild(basis: Tensor, loadings: Tensor, _scale: float, dtype: torch.dtype | None, _: str | None) -> Tensor:
    return basis.new_empty(*basis.shape[:-1], loadings.shape[-1], dtype=dtype or basis.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    basis, loadings, ctx.scale, _, ctx.backend = inputs
    ctx.save_for_backward(basis, loadings)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    basis, loadings = ctx.saved_tensors
    of_basis = of_loadings = None
    if ctx.needs_input_grad[0]:
        of_basis = torch.ops.loraspan.reconstruct(grad, loadings.mT, ctx.scale, basis.dtype, ctx.backend)
    if ctx.needs_input_grad[1]:
        of_loadings = torch.ops.loraspan.reconstruct(basis.mT, grad, ctx.scale, loadings.dtype, ctx.backend)
    return of_basis, of_loadings, None, None, None


register(
    "reconstruct(Tensor basis, Tensor loadings, float scale, ScalarType? dtype, str? backend) -> Tensor",
    rebuild,
    _fake_rebuild,
    backward=_backward,
    keep=_keep,
)
