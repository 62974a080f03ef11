"""The sum of squares of every row of a matrix that lies in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraspan import _core, _native
from loraspan._default_device import cpu_by_default
from loraspan._dispatch import Backend, choose
from loraspan.ops.blocks import RowBlocks, block_table, panels, refuses_device, sum_chunks
from loraspan.ops.places import Partials, backend_at
from loraspan.ops.stream import in_chunks


@cpu_by_default
def squares(x: RowBlocks | Sequence[Tensor] | Tensor, *, backend: str | None = None) -> Tensor:
    r"""Give ``sum_j x_ij^2`` of every row ``i``, in one pass.

    Args:
        x: ``X [R, d]`` as row blocks, read where they lie; see :class:`RowBlocks`.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``[R]``, float64; products and sums in float64, so within ``(d + 1) 2^-53`` of each exact sum, relatively. The
        compiled kernels give the same bits for any number of threads.

    Raises:
        ShapeError: if the blocks do not fit together.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> squares([torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2).half()])
        tensor([25.,  0.], dtype=torch.float64)
    """
    # one pass of additions: sending the rows to a target would cost more than adding them where they lie; and no GPU
    # has kernels for it
    matrix, backend = (given := RowBlocks.of(x)).on(given.device), backend_at(None, backend)
    if matrix.plain:
        return choose("squares", BACKENDS, backend, [matrix]).run(matrix)
    total = torch.zeros(matrix.shape[0], dtype=torch.float64)
    for [chunk] in in_chunks([matrix], wide=True):
        total += choose("squares", BACKENDS, backend, [chunk.x]).run(chunk.x)
    return total


def _cpu(x: RowBlocks, *, isa: str) -> Tensor:
    blocks, spans = block_table([x])
    out = torch.empty(x.shape[0], dtype=torch.float64)
    _core.squares(blocks, _native.table([(*spans[0], out.data_ptr())], 4), _native.threads(), isa)
    return out


@torch.no_grad()
def reference(x: RowBlocks) -> Tensor:
    """Say it in torch, some columns at a time, on whatever device the blocks are."""
    total = torch.zeros(x.shape[0], dtype=torch.float64)
    sums = Partials()
    # a GPU waits for every call, so it has few of them
    pieces = panels if x.device is not None and x.device.type == "cuda" else sum_chunks
    for _, piece in pieces(x, torch.float64):
        sums.add(total, piece.square().sum(1))
    sums.flush()
    return total


BACKENDS = (
    *_native.backends(_cpu, refuses_device),
    Backend("reference", reference, lambda *_: None),
)
