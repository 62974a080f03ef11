"""Open a generation of a store as a collection."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from loraspan._default_device import cpu_by_default
from loraspan.collection.collection import Collection, SlotSpace
from loraspan.errors import StoreError
from loraspan.store import segment
from loraspan.store.checksums import wrong_files
from loraspan.store.format import DamagedError, manifest_name
from loraspan.store.manifest import DataFile
from loraspan.store.mapped import TensorFile
from loraspan.store.reader import current, double_name, parse_manifest, read_sealed, wanted

# how often a store may change under an opening before it fails
_PATIENCE = 8


@dataclass(frozen=True, eq=False)
class Opened:
    """A collection, and where each part of it lies: what :func:`loraspan.store.commit` follows on.

    Attributes:
        folder: of the store.
        generation: that was opened.
        collection: its tensors are views of the mapped files.
        basis: the file of ``collection.slots``.
        segments: the files of ``collection.segments``, one each.
        names: of all tasks.
        sha256: of the manifest.
    """

    folder: Path
    generation: int
    collection: Collection
    basis: DataFile
    segments: tuple[DataFile, ...]
    names: frozenset[str] = field(repr=False)
    sha256: str = field(repr=False)


def nbytes(opened: Opened) -> int:
    """Give the bytes of the files of a generation: bases, segments, manifest and ``CURRENT``."""
    try:
        manifest = (opened.folder / manifest_name(opened.generation)).stat().st_size
    except OSError:
        # gone since, with the folder or by a collection of garbage
        manifest = 0
    data = sum(each.size for each in (opened.basis, *opened.segments))
    return data + manifest + len(f"{opened.generation}\n")


@cpu_by_default
def open_at(path: str | os.PathLike[str], generation: int | None = None, *, check: bool = False) -> Opened:
    """Open a store, and keep what is needed to write its next generation from this one.

    The tensors are views of the mapped files: nothing of them is read before it is used, and the files are closed. A
    collection keeps the generation that it was opened at, whatever is saved to the folder afterwards.

    Args:
        path: the folder.
        generation: which one to open; None opens the current one.
        check: whether to read every file whole and compare its sha256 with the manifest's.

    Returns:
        The collection as it was saved, and the files of its parts.

    Raises:
        StoreError: if the folder is no store, lacks a file or cannot be read.
        FormatError: if a file is not what it has to be; the message names it and the part.
        UnsupportedError: if a newer version of loraspan wrote it.

    Example:
        >>> import tempfile
        >>> from loraspan.store import open_at, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     number = save(Collection({}), folder)
        ...     open_at(folder).generation
        1
    """
    folder = Path(path)
    try:
        for _ in range(_PATIENCE):
            number = wanted(folder, generation)
            try:
                return _open(folder, number, check)
            except StoreError:
                # gc may have removed what a writer has just replaced: then there is a newer one
                if generation is not None or current(folder) == number:
                    raise
        return _open(folder, wanted(folder, generation), check)
    except DamagedError as error:
        raise error.within(folder) from None


@cpu_by_default
def open(path: str | os.PathLike[str], *, generation: int | None = None, check: bool = False) -> Collection:
    """Open a store as a collection, as :func:`open_at` does.

    Args:
        path: the folder.
        generation: which one to open; None opens the current one.
        check: whether to read every file whole and compare its sha256 with the manifest's.

    Returns:
        The collection as it was saved.

    Raises:
        StoreError: if the folder is no store, lacks a file or cannot be read.
        FormatError: if a file is not what it has to be; the message names it and the part.
        UnsupportedError: if a newer version of loraspan wrote it.

    Example:
        >>> import tempfile, torch
        >>> from loraspan.store import open, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Collection({}, dtype=torch.bfloat16), folder + "/team.span")
        ...     open(folder + "/team.span").dtype
        1
        torch.bfloat16
    """
    return open_at(path, generation, check=check).collection


def _open(folder: Path, number: int, check: bool) -> Opened:
    data = read_sealed(folder, number)
    manifest = parse_manifest(data, number)
    bases = segment.read_basis(TensorFile(folder, manifest.basis), manifest)
    segments = tuple(segment.read_tasks(TensorFile(folder, each), manifest, each) for each in manifest.segments)
    if (double := double_name(segments)) is not None:
        raise DamagedError(manifest_name(number), f"task {double!r}"[:200], "two tasks have this name")
    for wrong in wrong_files(folder, manifest.files) if check else ():
        if wrong.what == "file":
            raise StoreError(f"{folder / wrong.file}: {wrong.problem}")
        raise DamagedError(wrong.file, wrong.what, wrong.problem)
    slots = {slot.name: SlotSpace(*bases[slot.name], slot.kind, slot.kernel) for slot in manifest.slots}
    held = Collection(
        slots, segments, manifest.dtype, manifest.base_model, manifest.summary, manifest.fitted, manifest.bits
    )
    names = frozenset(task.name for task in held.tasks)
    return Opened(folder, number, held, manifest.basis, manifest.segments, names, hashlib.sha256(data).hexdigest())
