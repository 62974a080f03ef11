"""How `shared_lora` calls the compiled kernels: what they need to know of the tasks, kept from call to call."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan import _core, _native
from loraspan.ops.cores import Cores
from loraspan.ops.packed import Packed, fields_of, shape_of

_CODES = _native.DTYPE_CODES
# one loop in C over a tuple of tensors takes half the time of as many lines
_ADDRESS, _STRIDES = Tensor.data_ptr, Tensor.stride
# names of this file are found sooner than those of others
_INT64, _RUN, _THREADS, _BEST = torch.int64, _core.shared_lora, torch.get_num_threads, _native.BEST


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
        held = tensors_of(v, u, cores)
        plain = tuple(basis for basis in (v, u) if isinstance(basis, Tensor))
        state = (tuple(map(_ADDRESS, held)), tuple(map(_STRIDES, plain)))
        fixed = _fixed(v, u, cores)
        cores.known[:] = [v, u, held, plain, *state, fixed, *fixed[8:10]]


def run_again(
    y: Tensor,
    x: Tensor,
    v: Tensor | Packed,
    u: Tensor | Packed,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...] | None:
    """Run with bases and tasks that are remembered, if all else is plain, and give their tensors; or do nothing.

    What a model does thousands of times: a few microseconds here are the whole of what a call costs beside its work,
    and each question put to a tensor is a tenth of one or more.
    """
    if not cores.known:
        return None
    known_v, known_u, held, plain, addresses, strides, fixed, d, n = cores.known
    if (
        known_v is not v
        or known_u is not u
        # what changes if one of these very tensors is moved, turned or given other memory
        or tuple(map(_ADDRESS, held)) != addresses
        or ((v.stride(), u.stride()) if len(plain) == 2 else tuple(map(_STRIDES, plain))) != strides
    ):
        return None
    places = tasks.shape
    axes = len(places)
    rows = places[0] if 1 <= axes <= 2 else -1
    if y.shape != (rows, n) or x.shape != (rows, d):
        return None
    (y_down, y_across), (x_down, x_across) = y.stride(), x.stride()
    y_code, x_code = _CODES.get(y.dtype), _CODES.get(x.dtype)
    if (
        # rows that may share memory are for the checks; a negative view has strides of 2
        y_across != 1
        or x_across != 1
        or y_down < n
        or y_code is None
        or x_code is None
        or tasks.dtype is not _INT64
        or not (y.is_cpu and x.is_cpu and tasks.is_cpu and tasks.is_contiguous())
    ):
        return None
    weights = 0
    if shares is not None:
        if shares.shape != places or shares.dtype is not torch.float32 or not shares.is_contiguous():
            return None
        weights = shares.data_ptr()
    mixture = places[1] if axes == 2 else 1
    spans = (y.data_ptr(), y_down, 1, y_code, x.data_ptr(), x_down, 1, x_code, rows, tasks.data_ptr(), mixture, weights)
    return held if _RUN(fixed, spans, scale, False, _THREADS(), _BEST) < 0 else None


def is_negative(basis: Tensor | Packed) -> bool:
    """Say whether memory does not say the values of a basis."""
    return isinstance(basis, Tensor) and basis.is_neg()


def tensors_of(v: Tensor | Packed, u: Tensor | Packed, cores: Cores) -> tuple[Tensor, ...]:
    """Give every tensor that what is added depends on beside the rows, but empty tables: where kernels may read."""
    bases = [(basis.codes, basis.scales) if isinstance(basis, Packed) else (basis,) for basis in (v, u)]
    scales = [packed.scales for packed in cores.packed if packed is not None]
    return (*bases[0], *bases[1], cores.index, *[table for table in (*cores.tables, *scales) if table.numel()])


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
