"""Rows of vectors as a collection stores them: floats of one dtype, or packed in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from loraspan.errors import ArgumentError
from loraspan.ops.packed import Packed, pack, unpack
from loraspan.ops.packed_reference import BLOCK

Rows: TypeAlias = Tensor | Packed
# a floating dtype, a number of bits, or CODED
Width: TypeAlias = torch.dtype | int

# Whole numbers of one step, coded in files and rows of 8 or 16 bits in memory: ends of columns of which one at least is
# private, and bases of one side. No number of bits: a name. What has no step of its own is packed in 8 bits beside it.
CODED = 1
_SCALE_BYTES = 2
# Share of the energy of a vector that rounding takes, about: measured on blocks of normal entries for 8 and 4 bits,
# u^2 / 3 for floats. Plans count with it; what a plan gave is measured.
_ROUNDING: dict[Width, float] = {
    8: 3.5e-5,
    4: 6.6e-3,
    # that of the shortest step
    CODED: 5.0e-9,
    torch.float16: 2.0**-22 / 3,
    torch.bfloat16: 2.0**-16 / 3,
    torch.float32: 2.0**-48 / 3,
    torch.float64: 2.0**-106 / 3,
}


class Widths(NamedTuple):
    """How the parts of a collection are stored.

    Attributes:
        dtype: of all that is not packed.
        basis: of the bases; a dtype is ``dtype``.
        loadings: of shared ends.
        private: of private ends.
    """

    dtype: torch.dtype
    basis: Width
    loadings: Width
    private: Width

    @classmethod
    def of(cls, given: Widths | Width) -> Widths:
        """Take one width for all, or widths as they are."""
        if isinstance(given, Widths):
            return given
        return cls(given if isinstance(given, torch.dtype) else torch.float32, given, given, given)

    @classmethod
    def from_bits(cls, dtype: torch.dtype, bits: Sequence[int]) -> Widths:
        """Undo :attr:`bits`."""
        basis, loadings, private = (each or dtype for each in bits)
        return cls(dtype, basis, loadings, private)

    @property
    def bits(self) -> tuple[int, int, int]:
        """Bits of bases, loadings and private ends; 0 for what is not packed, 1 for what is coded."""
        basis, loadings, private = (each if isinstance(each, int) else 0 for each in self[1:])
        return basis, loadings, private

    def __str__(self) -> str:
        names = [
            "coded" if each == CODED else f"int{each}" if isinstance(each, int) else str(each).removeprefix("torch.")
            for each in self[1:]
        ]
        return names[0] if len(set(names)) == 1 else f"{names[0]} bases, {names[1]} loadings, {names[2]} private ends"


WIDTHS: dict[str, Width] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "int8": 8,
    "int4": 4,
    "coded": CODED,
}


def width_named(operator: str, given: torch.dtype | str) -> Width:
    """Give a width from a dtype, or from a name of :data:`WIDTHS` or of a torch dtype.

    Raises:
        ArgumentError: if there is no such width.

    Example:
        >>> width_named("compress", "int4"), width_named("compress", torch.int8)
        (4, 8)
    """
    names = {**WIDTHS, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = names.get(str(given).removeprefix("torch."))
    if found is None:
        raise ArgumentError(
            f"{operator}: dtype is float32, bfloat16, float16, int8, 'int4' (8 and 4 bits in blocks) or 'coded'; "
            f"got {given!r}"
        )
    return found


def rounding_of(width: Width) -> float:
    """Give the share of a unit vector's energy that storing it takes, about."""
    return _ROUNDING[width]


def row_bytes(length: int, width: Width) -> int:
    """Give the bytes of one row; those in memory, in 8 bits, where it is coded.

    Example:
        >>> row_bytes(128, torch.float16), row_bytes(128, 4)
        (256, 68)
    """
    if isinstance(width, int):
        bits = 8 if width == CODED else width
        return -(-length * bits // 8) + _SCALE_BYTES * -(-length // BLOCK)
    return length * width.itemsize


def store_rows(rows: Tensor, width: Width) -> Rows:
    """Round rows ``[R, L]`` to what is stored; those of no length stay a tensor."""
    if not isinstance(width, int):
        return rows.to(width)
    bits = unstepped(width)
    assert isinstance(bits, int)
    return pack(rows, bits) if rows.shape[1] else rows.float()


def unstepped(width: Width) -> Width:
    """Give the width of rows that are rounded without a step: 8 bits where others are coded."""
    return 8 if width == CODED else width


def values_of(rows: Rows) -> Tensor:
    """Give the entries of stored rows: exact, in float32 if they are packed."""
    return unpack(rows) if isinstance(rows, Packed) else rows


def no_rows(length: int, dtype: torch.dtype) -> Tensor:
    """Give no rows of a length."""
    return torch.empty(0, length, dtype=dtype)


def cat_rows(parts: Sequence[Rows]) -> Rows:
    """Join rows, 8 bits and 16 in 16; those of no part are dropped, so that they need not be packed."""
    kept = [part for part in parts if part.shape[0]] or list(parts[:1])
    if len(kept) == 1:
        return kept[0]
    packed = [part for part in kept if isinstance(part, Packed)]
    if not packed:
        return torch.cat([part for part in kept if isinstance(part, Tensor)])
    assert len(packed) == len(kept)
    bits = max(part.bits for part in packed)
    assert len({part.bits for part in packed}) == 1 or min(part.bits for part in packed) > 4
    codes = [part.codes if part.bits == bits else part.numbers.to(torch.int16).view(torch.uint8) for part in packed]
    return Packed(torch.cat(codes), torch.cat([part.scales for part in packed]), packed[0].length, bits)


def take_rows(rows: Rows, index: Tensor) -> Rows:
    """Give rows by their numbers."""
    if isinstance(rows, Packed):
        return Packed(rows.codes[index], rows.scales[index], rows.length, rows.bits)
    return rows[index]


def some_rows(rows: Rows, start: int, stop: int) -> Rows:
    """Give rows ``[start, stop)`` as a view."""
    return rows.rows(start, stop) if isinstance(rows, Packed) else rows[start:stop]


def flip_rows(rows: Rows, signs: Tensor) -> Rows:
    """Multiply each row by 1 or -1, exactly; in 8 and 16 bits the scales stay."""
    if isinstance(rows, Packed) and rows.bits > 4:
        numbers = rows.numbers * signs[:, None].to(torch.int8)
        return Packed(numbers.view(torch.uint8), rows.scales, rows.length, rows.bits)
    if isinstance(rows, Packed):
        return Packed(rows.codes, rows.scales * signs[:, None].to(rows.scales.dtype), rows.length, rows.bits)
    return rows * signs[:, None].to(rows.dtype)


def same_rows(one: Rows, other: Rows) -> bool:
    """Say whether both are stored as the same bits."""
    pairs = zip(tensors_of("", "", one), tensors_of("", "", other), strict=False)
    return type(one) is type(other) and all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def tensors_of(field: str, slot: str, rows: Rows) -> list[tuple[str, Tensor]]:
    """Give the tensors that hold rows in a file, by name: codes as I8, I16 or, of 4 bits, U8, each with its scales."""
    if not isinstance(rows, Packed):
        return [(f"{field}.{slot}", rows)]
    codes = rows.numbers if rows.bits > 4 else rows.codes
    return [(f"{field}.{slot}", codes), (f"{field}_scales.{slot}", rows.scales)]
