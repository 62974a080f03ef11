"""How many bytes a thing takes on disk: what budgets count with and what a store writes by."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from loraspan.collection.coded import basis_tensors
from loraspan.collection.filed import file_tensors
from loraspan.collection.headers import Entry, count, file_start, narrow, order
from loraspan.collection.rows import Width, Widths, row_bytes
from loraspan.errors import ArgumentError

if TYPE_CHECKING:
    from loraspan.collection.collection import Collection, Segment
    from loraspan.collection.columns import Columns

_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGTKmgt]?B?)", re.ASCII)
_UNITS = {"": 1, "B": 1, **{f"{unit}{b}": 10 ** (3 * i) for i, unit in enumerate("KMGT", 1) for b in ("", "B")}}
# of a manifest beside its names and numbers, and of its lists' elements; see `manifest_bytes`
_MANIFEST, _MANIFEST_SLOT, _MANIFEST_KEY, _MANIFEST_FILE = 471, 25, 2, 101
# of a number of bytes, at the most
_DIGITS = 12
# What the manifest of a later generation tells of a change, beside names.
CHANGE_BYTES = 64


def basis_bytes(n: int, d: int, k_out: int, k_in: int, dtype: Widths | Width) -> int:
    """Give the bytes of the tensors ``u [n, k_out]`` and ``v [d, k_in]``, exactly.

    Example:
        >>> basis_bytes(1024, 4096, 32, 32, torch.bfloat16)
        327680
    """
    width = Widths.of(dtype).basis
    return k_out * row_bytes(n, width) + k_in * row_bytes(d, width)


def columns_bytes(
    counts: ArrayLike, *, n: int, d: int, k_out: int, k_in: int, dtype: Widths | Width, dense: ArrayLike = False
) -> NDArray[np.int64]:
    """Give the bytes of the five tensors of tasks in a slot, exactly; what indexes them is :func:`index_bytes`.

    Args:
        counts: ``[..., 4]``, columns of each form, in the order of ``loraspan.collection.columns.FORMS``.
        n: outputs of the slot.
        d: inputs of the slot.
        k_out: width of its output basis.
        k_in: width of its input basis.
        dtype: of loadings and private columns, or the widths of each.
        dense: ``[...]``, whether the task holds a dense core there.

    Returns:
        ``[...]`` int64.

    Example:
        >>> int(columns_bytes([2, 0, 0, 1], n=64, d=32, k_out=8, k_in=8, dtype=torch.float16))
        268
    """
    ss, sp, ps, pp = np.moveaxis(np.asarray(counts, dtype=np.int64), -1, 0)
    _, _, loadings, private = Widths.of(dtype)
    left = (ss + sp) * row_bytes(k_out, loadings) + (ps + pp) * row_bytes(n, private)
    right = (np.where(np.asarray(dense), 0, ss) + ps) * row_bytes(k_in, loadings) + (sp + pp) * row_bytes(d, private)
    return np.asarray(torch.float32.itemsize * (ss + sp + ps + pp) + left + right, dtype=np.int64)


def index_bytes(columns: Columns, tasks: int) -> int:
    """Give the bytes of the integers beside the five tensors of a slot in a segment of ``tasks`` tasks, exactly."""
    rows = len(columns.tasks)
    if not rows:
        return 0
    total = 4 * rows * narrow(int(columns.counts.max())).itemsize
    if rows < tasks:
        total += rows * narrow(int(columns.tasks[-1])).itemsize
    return total + (rows if columns.dense.any() else 0)


def collection_bytes(collection: Collection) -> int:
    """Give the bytes of the files of a generation that holds ``collection``, a file a segment.

    All but the manifest is exact for a segment that is written anew; what is counted for the manifest of a first
    generation is up to 64 bytes more than it takes, and no less.
    """
    return basis_file_bytes(collection) + sum(map(segment_bytes, collection.segments)) + manifest_bytes(collection)


def basis_file_bytes(collection: Collection) -> int:
    """Give the bytes of the file of the bases, as :func:`collection_bytes` counts them."""
    named = basis_tensors({name: (slot.u, slot.v) for name, slot in collection.slots.items()})
    return _file_bytes("basis", [(name, tensor.dtype, tensor.shape) for name, tensor in named])


def segment_bytes(segment: Segment) -> int:
    """Give the bytes of the file of a segment whose tasks all live, as :func:`collection_bytes` counts them."""
    return _file_bytes("tasks", [(name, tensor.dtype, tensor.shape) for name, tensor in file_tensors(segment)])


def manifest_bytes(collection: Collection) -> int:
    """Give the bytes of the first manifest and of ``CURRENT``, or some dozen more: as if numbers of bytes were long."""
    total = _MANIFEST + 2 * _DIGITS + len(_dumps([collection.summary, collection.base_model]))
    total += sum(_MANIFEST_FILE + _DIGITS + len(str(len(segment.tasks))) for segment in collection.segments)
    for name, slot in collection.slots.items():
        total += _MANIFEST_SLOT + sum(len(_dumps(value)) for value in (name, *slot.shape))
        kind = "" if slot.kind == "linear" else slot.kind
        told = {"k_out": slot.ranks[0], "k_in": slot.ranks[1], "kind": kind, "kernel": slot.kernel}
        total += sum(_MANIFEST_KEY + len(_dumps(key)) + len(_dumps(value)) for key, value in told.items() if value)
    return total


def parse_bytes(operator: str, value: int | str | None) -> int | None:
    """Give a number of bytes from a number or from text, in powers of ten.

    Raises:
        ArgumentError: if it is neither a positive number nor such text.

    Example:
        >>> parse_bytes("refit", "1.5 GB"), parse_bytes("refit", 200)
        (1500000000, 200)
    """
    if value is None:
        return None
    match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else value
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ArgumentError(f"{operator}: a number of bytes is positive, or text such as '200MB'; got {value!r}")
    return count


def _file_bytes(kind: str, entries: Sequence[Entry]) -> int:
    # as a writer does: of what has no element, only extras are told of
    kept = [entry for entry in entries if count(entry[2]) or entry[0].startswith("extra.")]
    data = sum(count(shape) * dtype.itemsize for _, dtype, shape in kept)
    return len(file_start([kept[i] for i in order(kept)], {"loraspan": kind})) + data


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), default=str)
