"""How `shared_lora` calls the compiled kernels: what they need to know of the tasks, kept from call to call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraspan import _core, _native
from loraspan.ops.cores import Cores
from loraspan.ops.packed import Packed, fields_of, shape_of

_CODES = _native.DTYPE_CODES


def run(
    y: Tensor,
    x: Tensor,
    v: Tensor | Packed,
    u: Tensor | Packed,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
    *,
    isa: str,
    transposed: bool = False,
) -> int:
    """Add to ``y``; give -1, or the first row with a task that is not in the tables (nothing is written then)."""
    # held until the call, which has their addresses only
    tasks, shares = tasks.contiguous(), None if shares is None else shares.contiguous()
    fields = _native.matrix_fields
    places = (tasks.shape[0], tasks.data_ptr(), tasks.shape[1], 0 if shares is None else shares.data_ptr())
    fixed = _fixed(v, u, cores)
    return _core.shared_lora(fixed, (*fields(y), *fields(x), *places), scale, transposed, _native.threads(), isa)


def remember(v: Tensor | Packed, u: Tensor | Packed, cores: Cores) -> None:
    """Keep what the kernels are told of these bases and tasks, once they have been checked against each other."""
    if cores.index.is_cpu and not (is_negative(v) or is_negative(u)):
        cores.known[:] = [v, u, _state(v, u, cores), _fixed(v, u, cores)]


def run_again(
    y: Tensor,
    x: Tensor,
    v: Tensor | Packed,
    u: Tensor | Packed,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
) -> bool:
    """Run with bases and tasks that are remembered, if all else is plain; or give False, with nothing done.

    What a model does thousands of times: a few microseconds here are the whole of what a call costs beside its work,
    and each question put to a tensor is a tenth of one or more.
    """
    known = cores.known
    if not known or known[0] is not v or known[1] is not u or known[2] != _state(v, u, cores):
        return False
    fixed = known[3]
    places = tasks.shape
    rows, mixture = places[0], places[1] if len(places) == 2 else 1
    y_code, x_code = _CODES.get(y.dtype), _CODES.get(x.dtype)
    y_strides, x_strides = y.stride(), x.stride()
    if (
        y_code is None
        or x_code is None
        or len(places) > 2
        or y.shape != (rows, fixed[9])
        or x.shape != (rows, fixed[8])
        # rows that may share memory are for the checks; a negative view has strides of 2
        or y_strides[1] != 1
        or x_strides[1] != 1
        or y_strides[0] < fixed[9]
        or tasks.dtype is not torch.int64
        or not (y.is_cpu and x.is_cpu and tasks.is_cpu and tasks.is_contiguous())
    ):
        return False
    weights = 0
    if shares is not None:
        if shares.shape != places or shares.dtype is not torch.float32 or not shares.is_contiguous():
            return False
        weights = shares.data_ptr()
    y_at, x_at = (y.data_ptr(), *y_strides, y_code), (x.data_ptr(), *x_strides, x_code)
    spans = (rows, tasks.data_ptr(), mixture, weights)
    return _core.shared_lora(fixed, (*y_at, *x_at, *spans), scale, False, torch.get_num_threads(), _native.BEST) < 0


def is_negative(basis: Tensor | Packed) -> bool:
    """Say whether memory does not say the values of a basis."""
    return isinstance(basis, Tensor) and basis.is_neg()


def _state(v: Tensor | Packed, u: Tensor | Packed, cores: Cores) -> tuple[Any, ...]:
    """Give what changes if one of these very tensors is moved, turned or given other memory."""
    return (
        *(_place(v), _place(u), cores.index.data_ptr(), cores.weights.data_ptr()),
        *(cores.left.data_ptr(), cores.right.data_ptr(), cores.left_private.data_ptr(), cores.right_private.data_ptr()),
        *([packed.fields for packed in cores.packed if packed] if cores.is_packed else ()),
    )


def _place(basis: Tensor | Packed) -> tuple[Any, ...]:
    if isinstance(basis, Packed):
        return basis.fields
    return basis.data_ptr(), basis.stride()


def _fixed(v: Tensor | Packed, u: Tensor | Packed, cores: Cores) -> tuple[int, ...]:
    held = (cores.left, cores.left_private, cores.right, cores.right_private)
    tables = [
        cores.weights.data_ptr(),
        *[t.data_ptr() for t in held],
        cores.weights.shape[0],
        *[t.shape[0] for t in held],
    ]
    (d, k_in), (n, k_out) = shape_of(v), shape_of(u)
    plain = [t.dtype for t, packed in zip(held, cores.packed, strict=True) if packed is None]
    scales = [(0, 0) if t is None else (t.bits, t.scales.data_ptr()) for t in cores.packed]
    return (
        *(*fields_of(v), *fields_of(u), d, n, k_in, k_out),
        *(cores.index.data_ptr(), cores.index.shape[0], *tables),
        _CODES[plain[0]] if plain else _CODES[torch.float32],
        *(*[bits for bits, _ in scales], *[at for _, at in scales]),
    )
