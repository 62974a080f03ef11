"""What the compiled core needs to be called: instruction sets, addresses, and tables of blocks and jobs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch  # before _core: both use the OpenMP pool that torch brings
from numpy.typing import NDArray
from torch import Tensor

from loraspan import _core
from loraspan._dispatch import Backend

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
# the dtypes whose codes are the bits of a number
DTYPES = [
    frozenset(dtype for dtype, code in DTYPE_CODES.items() if bits >> code & 1) for bits in range(1 << len(DTYPE_CODES))
]
PRECISIONS = {"f32": _core.Precision.f32, "f64": _core.Precision.f64}
INSTRUCTION_SETS = _core.instruction_sets()
BEST = next(name for name, built, supported in reversed(INSTRUCTION_SETS) if built and supported)

# What is smaller has hardly a huge page of its own.
_HUGE = 4 << 20


def _reader() -> _core.TensorReader | None:
    # torch 2.10 and later; what it does not read, and all tensors of an older torch, are asked in Python
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    try:
        return exchange and _core.TensorReader(exchange, [torch.Tensor, torch.nn.Parameter])
    except ValueError:  # of a version of DLPack to come
        return None


READER = _reader()


def threads() -> int:
    """Give the number of threads to use: torch's."""
    return torch.get_num_threads()


def in_huge_pages(result: Tensor) -> Tensor:
    """Give ``result``, just allocated and not written yet, back; a large one has huge pages asked for.

    A large result is new memory in every call, and to fault that in by small pages takes longer than to compute it.
    NumPy asks for its arrays in the same way.
    """
    if result.nbytes >= _HUGE and result.is_cpu:
        _core.want_huge_pages(result.data_ptr(), result.nbytes)
    return result


def map_file(descriptor: int, size: int) -> Tensor:
    """Give the ``size`` bytes of an open file as uint8 ``[size]``, mapped; the file may then be closed.

    When its last view goes, the pages of a large file are given up by a thread of the core's own, and nobody waits for
    it. Writing into one changes this process's copy of its pages and never the file.

    Raises:
        OSError: if there is no room for it.
    """
    return torch.frombuffer(_core.Mapping(descriptor, size), dtype=torch.uint8)


def backends(run: Callable[..., T], refuses: Callable[..., str | None]) -> list[Backend[Callable[..., T]]]:
    """Give ``cpu`` (the widest instruction set here) and one backend per set by name, such as ``cpu:avx2``.

    ``run`` takes the name of the set as keyword ``isa``.
    """
    found: list[Backend[Callable[..., T]]] = [Backend("cpu", partial(run, isa=BEST), refuses)]
    for name, built, supported in INSTRUCTION_SETS:
        reason = None if built and supported else f"this {'processor' if built else 'build'} has no {name}"
        found.append(
            Backend(f"cpu:{name}", partial(run, isa=name), lambda *args, reason=reason: reason or refuses(*args))
        )
    return found


def table(rows: Sequence[Sequence[int]], fields: int) -> NDArray[np.int64]:
    """Give ``rows`` as the int64 array that the core reads, with the right width even when there are none."""
    return np.asarray(rows, dtype=np.int64).reshape(len(rows), fields)


def matrix_fields(matrix: Tensor | None) -> tuple[int, int, int, int]:
    """Give address, strides and dtype of a matrix as the core reads them; zeros for none."""
    if matrix is None:
        return (0, 0, 0, 0)
    row, column = matrix.stride()
    # torch says 0 for the address of an empty matrix, which is not "none"; nothing is read there
    return (matrix.data_ptr() or matrix.element_size(), row, column, DTYPE_CODES[matrix.dtype])


def batch_fields(matrices: Tensor) -> NDArray[np.int64]:
    """Give :func:`matrix_fields` of every member of ``[N, m, k]``, a row each."""
    fields = np.empty((matrices.shape[0], 4), dtype=np.int64)
    step = matrices.stride(0) * matrices.element_size()
    fields[:, 0] = (matrices.data_ptr() or matrices.element_size()) + step * np.arange(matrices.shape[0])
    fields[:, 1:] = *matrices.stride()[1:], DTYPE_CODES[matrices.dtype]
    return fields
