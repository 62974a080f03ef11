"""Look at every byte of a generation, and say all that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from loraspan._default_device import cpu_by_default
from loraspan.collection.collection import Segment
from loraspan.collection.columns import Columns
from loraspan.errors import StoreError
from loraspan.ops.gram import gram_many
from loraspan.ops.packed import Packed
from loraspan.store import segment
from loraspan.store.checksums import wrong_files
from loraspan.store.format import CURRENT, DamagedError, Finding, manifest_name
from loraspan.store.manifest import Manifest
from loraspan.store.mapped import TensorFile
from loraspan.store.reader import double_name, read_manifest, wanted

# What a fit may leave between two vectors beyond rounding: float32 sums reach a tenth of it.
_FIT_DEPARTURE = 1e-4
_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# entries looked at in one go
_CHUNK = 1 << 22


@cpu_by_default
def verify(path: str | os.PathLike[str], *, generation: int | None = None) -> list[Finding]:
    """Check a store: sizes and checksums of its files, all that opening checks, and the values.

    Bases and columns have to be finite, weights not negative, and the bases orthonormal: ``|v^T v - I|`` at most
    ``4 u + 1e-4`` in every entry, with ``u`` the unit roundoff of their dtype (rounding two unit vectors changes their
    product by ``2 u`` at most; the rest is for the fit). Extras are somebody else's numbers: their checksum has to do.

    Args:
        path: the folder.
        generation: which one to check; None checks the current one.

    Returns:
        What is wrong; an empty list if nothing is.

    Raises:
        StoreError: if the folder is no store.
        UnsupportedError: if a newer version of loraspan wrote it.

    Example:
        >>> import tempfile
        >>> from loraspan.collection.collection import Collection
        >>> from loraspan.store import save, verify
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     verify(folder) if save(Collection({}), folder) else None
        []
    """
    folder = Path(path)
    try:
        number = wanted(folder, generation)
    except DamagedError as error:
        return [error.finding]
    try:
        manifest = read_manifest(folder, number)
    except DamagedError as error:
        return [error.finding]
    except StoreError as error:
        return [Finding(manifest_name(number), "file", f"{error}; {CURRENT} names generation {number}")]
    findings = wrong_files(folder, manifest.files)
    spoilt = {finding.file for finding in findings if finding.what != "checksum"}
    findings += _basis(folder, manifest, spoilt)
    findings += _tasks(folder, manifest, spoilt)
    return findings


def _basis(folder: Path, manifest: Manifest, spoilt: set[str]) -> Iterator[Finding]:
    name = manifest.basis.file
    if name in spoilt:
        return
    try:
        bases = segment.read_basis(TensorFile(folder, manifest.basis), manifest)
    except DamagedError as error:
        yield error.finding
        return
    sides = {f"{side}.{slot}": m for slot, pair in bases.items() for side, m in zip("uv", pair, strict=True)}
    finite = {}
    for tensor, matrix in sides.items():
        try:
            held = matrix.scales if isinstance(matrix, Packed) else matrix
        except DamagedError as error:
            # coded bases are unpacked here, all of a stream
            yield error.finding
            return
        if (first := _first(held, _not_finite)) is not None:
            yield Finding(name, f"tensor {tensor!r}", f"entry {first} of {list(held.shape)} is not finite")
        elif not isinstance(matrix, Packed):
            finite[tensor] = matrix
    # how far packed vectors may be from orthonormal says little: their checksum has to do
    allowed = 4 * _ROUNDOFF[manifest.dtype] + _FIT_DEPARTURE
    for tensor, gram in zip(finite, gram_many([m.T for m in finite.values()], precision="f32"), strict=True):
        off = float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max()) if gram.numel() else 0.0
        if not off <= allowed:
            problem = f"its columns have to be orthonormal to {allowed:.1e}; they are to {off:.1e}"
            yield Finding(name, f"tensor {tensor!r}", problem)


def _tasks(folder: Path, manifest: Manifest, spoilt: set[str]) -> Iterator[Finding]:
    segments = []
    for data in manifest.segments:
        if data.file in spoilt:
            continue
        try:
            found = segment.read_tasks(TensorFile(folder, data), manifest, data)
        except DamagedError as error:
            yield error.finding
            continue
        # names are compared in the end; columns would stay in memory once they are unpacked
        segments.append(Segment(found.tasks, {}))
        try:
            for slot, part in found.columns.items():
                yield from _values(data.file, slot, part, found)
        except DamagedError as error:
            # coded ends are unpacked here
            yield error.finding
    if (double := double_name(segments)) is not None:
        yield Finding(manifest_name(manifest.generation), f"task {double!r}"[:200], "two tasks have this name")


def _values(file: str, slot: str, columns: Columns, of: Segment) -> Iterator[Finding]:
    offsets = columns.offsets()
    for j, (field, rows) in enumerate(columns.tensors().items()):
        tensor = rows.scales if isinstance(rows, Packed) else rows
        wrong, what = (_not_a_weight, "finite and not negative") if field == "weights" else (_not_finite, "finite")
        if (first := _first(tensor, wrong)) is None:
            continue
        column = first // (tensor.shape[1] if tensor.ndim == 2 else 1)
        row = int((offsets[1:, j] <= column).sum())
        task = of.tasks[int(columns.tasks[row])]
        name = "one removed" if task is None else repr(task.name[:100])
        yield Finding(file, f"tensor '{field}.{slot}'", f"row {column}, of task {name}, has to be {what}")


def _first(tensor: Tensor, wrong: Callable[[Tensor], Tensor]) -> int | None:
    """Give the place of the first wrong entry, counted row after row."""
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        places = wrong(flat[start : start + _CHUNK]).nonzero()
        if len(places):
            return start + int(places[0])
    return None


def _not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite()


def _not_a_weight(values: Tensor) -> Tensor:
    return ~(values.isfinite() & (values >= 0))
