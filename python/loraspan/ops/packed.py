"""Rows of vectors in 16, 8 or 4 bits an entry, with a scale for every block of 64 entries of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraspan import _core, _native
from loraspan._default_device import cpu_by_default
from loraspan._dispatch import Backend, choose
from loraspan.errors import ArgumentError, NotFiniteError, ShapeError
from loraspan.ops.packed_reference import BLOCK, LARGEST, pack_rows, unpack_rows

# bits an entry, and the dtype code that the compiled core knows them by
_CODES = {8: 4, 4: 5, 16: 6}
# those that :func:`pack` makes
_NARROW = (8, 4)


@dataclass(frozen=True, eq=False)
class Packed:
    """``[rows, length]`` entries: entry ``i`` of row ``r`` is ``level * scales[r, i // 64] / 128``.

    In 16 and 8 bits the level is signed number ``i`` of row ``r`` of ``codes``. In 4 bits it is one of 16 fixed levels
    from -116 to 127 (`packed_reference.LEVELS`), its index being in the low half of byte ``i // 2`` where ``i`` is
    even, in the high half where it is odd; a negative scale turns the levels round. Entries are float32: exact in 8 and
    4 bits, rounded once in 16. :func:`pack` makes one of 8 or 4 bits.

    Attributes:
        codes: ``[rows, ceil(length * bits / 8)]`` uint8, contiguous.
        scales: ``[rows, ceil(length / 64)]`` float16, contiguous.
        length: entries of a row.
        bits: 16, 8 or 4.

    Raises:
        ShapeError: if these do not fit each other.

    Example:
        >>> import torch
        >>> packed = pack(127 * torch.eye(3), 4)
        >>> packed.shape, packed.nbytes, unpack(packed.rows(1, 2))
        ((3, 3), 12, tensor([[  0., 127.,   0.]]))
    """

    codes: Tensor
    scales: Tensor
    length: int
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in _CODES or self.length < 0:
            raise ShapeError(
                f"Packed: bits are 16, 8 or 4, and length is not negative; got {self.bits} and {self.length}"
            )
        widths = (("codes", self.codes, torch.uint8, -(-self.length * self.bits // 8)),)
        for name, tensor, dtype, width in (*widths, ("scales", self.scales, torch.float16, -(-self.length // BLOCK))):
            wanted = (self.codes.shape[0] if self.codes.ndim else 0, width)
            if tensor.dtype != dtype or tensor.shape != wanted or not tensor.is_contiguous():
                raise ShapeError(
                    f"Packed: for rows of {self.length} entries of {self.bits} bits, {name} is contiguous {dtype} "
                    f"{list(wanted)}; got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
                )
        if self.codes.device != self.scales.device:
            raise ShapeError(
                f"Packed: codes and scales are on one device; got {self.codes.device} and {self.scales.device}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows, and of what length."""
        return self.codes.shape[0], self.length

    @property
    def numbers(self) -> Tensor:
        """The levels of 16 or 8 bits, ``[rows, length]``: a view."""
        return self.codes.view(torch.int16 if self.bits == 16 else torch.int8)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where both tensors are."""
        return self.codes.device

    def rows(self, start: int, stop: int) -> Packed:
        """Give rows ``[start, stop)`` as a view."""
        return Packed(self.codes[start:stop], self.scales[start:stop], self.length, self.bits)

    def columns(self, start: int, stop: int) -> Packed:
        """Give entries ``[start, stop)`` of all rows, copied; ``start`` is where a block begins."""
        if start % BLOCK:
            raise ArgumentError(f"Packed.columns: start is a multiple of {BLOCK}; got {start}")
        stop = max(start, min(stop, self.length))
        codes = self.codes[:, start * self.bits // 8 : -(-stop * self.bits // 8)]
        scales = self.scales[:, start // BLOCK : -(-stop // BLOCK)]
        return Packed(codes.contiguous(), scales.contiguous(), stop - start, self.bits)

    def to(self, device: torch.device | str) -> Packed:
        """Give it on another device, or itself."""
        if self.device == torch.device(device):
            return self
        return Packed(self.codes.to(device), self.scales.to(device), self.length, self.bits)

    @property
    def fields(self) -> tuple[int, int, int, int]:
        """Its transpose ``[length, rows]`` as the compiled core reads a packed matrix: codes, scales, length, dtype."""
        # torch says 0 for the address of an empty tensor, which is not "none"
        return (self.codes.data_ptr() or 1, self.scales.data_ptr(), self.length, _CODES[self.bits])


@cpu_by_default
def pack(rows: Tensor, bits: int, *, backend: str | None = None) -> Packed:
    r"""Quantize every row in blocks of 64 entries.

    Args:
        rows: ``[R, L]``, float16, bfloat16, float32 or float64 (which is rounded to float32 first), any strides; no
            entry above 64992 in magnitude.
        bits: 8 or 4.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        A :class:`Packed`, of ``bits + 16 / 64`` bits an entry where ``L`` is a multiple of 64. In 8 bits the scale is
        that of the block's largest entry; an entry is within ``max(|scale| / 256, 2^-25)`` of what is packed. In 4 bits
        the scale is, of those tried, the one that leaves the least squared error: the one of the largest entry, 0.84,
        0.92 and 1.08 of it, each with both signs, and from the best of these two steps of least squares. An entry has
        the nearest level, and is within ``max(|scale| / 8, |x| - 116 |scale| / 128)``. Both to float32's roundoff. Of
        float16 scales, rounded before the levels are chosen. The same bits from every backend and for any number of
        threads.

    Raises:
        ShapeError: if ``rows`` is no matrix of those dtypes.
        ArgumentError: if ``bits`` is neither 8 nor 4, or an entry is above 64992.
        NotFiniteError: if an entry is a NaN or an infinity.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> unpack(pack(torch.tensor([[1.0, -0.5, 0.25]]), 8))
        tensor([[ 0.9999, -0.5039,  0.2520]])

    Source:
        Scales of blocks: Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, 2022, section 2. Levels that
        lie denser where entries do, with 0 among them: Dettmers et al., *QLoRA*, 2023, section 3. Levels by their
        squared error: Lloyd, *Least squares quantization in PCM*, 1982.
    """
    if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.dtype not in _native.DTYPE_CODES:
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ShapeError(f"pack: rows are a matrix of float16, bfloat16, float32 or float64; got {got}")
    if bits not in _NARROW:
        raise ArgumentError(f"pack: bits are 8 or 4; got {bits!r}")
    if rows.is_mps:
        # scales are searched in float64
        return pack(rows.cpu(), bits, backend=backend).to(rows.device)
    rows = rows.detach().resolve_neg()
    count, length = rows.shape
    codes = torch.empty(count, -(-length * bits // 8), dtype=torch.uint8, device=rows.device)
    scales = torch.empty(count, -(-length // BLOCK), dtype=torch.float16, device=rows.device)
    wrong = choose("pack", PACK_BACKENDS, backend, rows).run(rows, bits, codes, scales)
    if wrong >= 0:
        _refuse(rows, wrong)
    return Packed(codes, scales, length, bits)


@cpu_by_default
def unpack(packed: Packed, *, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """Give the entries of what is packed.

    Args:
        packed: ``[R, L]``.
        dtype: of the result: float16, bfloat16, float32 or float64.
        backend: as for :func:`pack`.

    Returns:
        ``[R, L]``; float32 and float64 hold the entries exactly, others are rounded once.

    Raises:
        ShapeError: if ``dtype`` is none of those.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> unpack(pack(torch.ones(1, 2), 8), dtype=torch.bfloat16)
        tensor([[1., 1.]], dtype=torch.bfloat16)
    """
    if dtype not in _native.DTYPE_CODES:
        raise ShapeError(f"unpack: dtype is float16, bfloat16, float32 or float64; got {dtype}")
    found: Tensor = choose("unpack", UNPACK_BACKENDS, backend, packed.codes).run(packed, dtype)
    return found


def shape_of(matrix: Tensor | Packed) -> tuple[int, int]:
    """Give the shape of a matrix, of which packed rows are the columns."""
    rows, columns = matrix.shape
    return (columns, rows) if isinstance(matrix, Packed) else (rows, columns)


def fields_of(matrix: Tensor | Packed | None) -> tuple[int, int, int, int]:
    """Give what the compiled core is told of a matrix, of which packed rows are the columns."""
    return matrix.fields if isinstance(matrix, Packed) else _native.matrix_fields(matrix)


# what the compiled core is told where there is no matrix
NOWHERE = (0, 0, 0, 0)


def seen(matrix: Tensor | Packed) -> tuple[int, int, torch.device | None, tuple[int, int, int, int]] | None:
    """Give :func:`shape_of` a matrix and :func:`fields_of` it, between them None; or where it is, if not on the CPU.

    What is elsewhere has fields of zeros. None if a tensor is no matrix, of a dtype that the compiled core does not
    read, or of a kind whose memory does not say its values.
    """
    if isinstance(matrix, Packed):
        rows, columns = shape_of(matrix)
        return (rows, columns, None, matrix.fields) if matrix.codes.is_cpu else (rows, columns, matrix.device, NOWHERE)
    code = _native.DTYPE_CODES.get(matrix.dtype)
    if code is None or matrix.ndim != 2 or matrix.layout != torch.strided or matrix.is_neg():
        return None
    rows, columns = matrix.shape
    if not matrix.is_cpu:
        return rows, columns, matrix.device, NOWHERE
    row, column = matrix.stride()
    # as _native.matrix_fields says it, which asks once more: this is done for every tensor of thousands of pieces
    return rows, columns, None, (matrix.data_ptr() or matrix.element_size(), row, column, code)


def unpacked(matrix: Tensor | Packed) -> Tensor:
    """Give a matrix, of which packed rows are the columns, in full (references only)."""
    return _unpack_reference(matrix, torch.float32).T if isinstance(matrix, Packed) else matrix


def refuses_packed(*matrices: Tensor | Packed | None) -> str | None:
    """Say why a backend that knows no packed rows cannot take these, if so."""
    return "it reads no packed rows" if any(isinstance(m, Packed) for m in matrices) else None


def _refuse(rows: Tensor, row: int) -> None:
    entries = rows[row].to(torch.float32)
    column = int((~(entries.abs() <= LARGEST)).nonzero()[0])
    value = rows[row, column].item()
    if not torch.isfinite(rows[row, column]):
        raise NotFiniteError(f"pack: entries are finite; row {row}, column {column} of rows is {value}")
    raise ArgumentError(
        f"pack: entries are at most {LARGEST:.0f} in magnitude, for their scales are float16; row {row}, column "
        f"{column} of rows is {value}: divide the row by a power of two first"
    )


def _cpu_pack(rows: Tensor, bits: int, codes: Tensor, scales: Tensor, *, isa: str) -> int:
    block = (rows.data_ptr(), rows.shape[0], *rows.stride(), _native.DTYPE_CODES[rows.dtype])
    places = (codes.data_ptr(), scales.data_ptr())
    return _core.pack(block, rows.shape[1], bits, *places, _native.threads(), isa)


def _cpu_unpack(packed: Packed, dtype: torch.dtype, *, isa: str) -> Tensor:
    out = torch.empty(packed.shape, dtype=dtype)
    places = (packed.codes.data_ptr(), packed.scales.data_ptr())
    form = (*packed.shape, packed.bits, out.data_ptr(), _native.DTYPE_CODES[dtype])
    _core.unpack(*places, *form, _native.threads(), isa)
    return out


def _unpack_reference(packed: Packed, dtype: torch.dtype) -> Tensor:
    return unpack_rows(packed.codes, packed.scales, packed.length, packed.bits).to(dtype)


def _refuses(tensor: Tensor) -> str | None:
    return None if tensor.is_cpu else f"it reads CPU memory, and the tensor is on {tensor.device}"


PACK_BACKENDS: tuple[Backend[Any], ...] = (
    *_native.backends(_cpu_pack, _refuses),
    Backend("reference", pack_rows, lambda *_: None),
)
UNPACK_BACKENDS: tuple[Backend[Any], ...] = (
    *_native.backends(_cpu_unpack, _refuses),
    Backend("reference", _unpack_reference, lambda *_: None),
)
