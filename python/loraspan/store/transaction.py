"""Write a generation: new files first, the name of the generation last."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from loraspan.collection.collection import Collection
from loraspan.collection.layout import header, order
from loraspan.collection.segments import merge
from loraspan.errors import ArgumentError, FormatError, StoreError
from loraspan.store import files, segment
from loraspan.store import manifest as manifests
from loraspan.store.checks import check
from loraspan.store.format import (
    BASIS,
    CURRENT,
    DATA_FILE,
    LOCK,
    MANIFEST_FILE,
    TASKS,
    TEMPORARY,
    data_name,
    manifest_name,
)
from loraspan.store.manifest import DataFile, Manifest
from loraspan.store.reader import current, read_manifest

Named = Sequence[tuple[str, Tensor]]


def save(
    collection: Collection,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    parent: int | None = None,
    timeout: float = 30.0,
) -> int:
    """Write a collection to a folder, as a new store or as the next generation of one.

    Whatever happens on the way, the folder holds the old generation or the new one, and whoever has the old one open
    keeps it.

    Args:
        collection: to write. One file is written for the bases and one for the tasks.
        path: the folder. It is made if it is missing; one that holds anything else is refused.
        overwrite: needed where the folder holds a store: this writes its next generation.
        parent: the generation that the new one follows. If the store is at another one, nothing is written. None takes
            the one that the store is at when the call begins.
        timeout: seconds to wait for another writer.

    Returns:
        The number of the new generation; the first is 1.

    Raises:
        StoreError: if the folder is something else, ``overwrite`` was needed, another writer was faster or holds the
            lock, or the files cannot be written.
        ShapeError: if parts of the collection do not fit together.
        ArgumentError: if a name occurs twice, or something cannot be written as it is.

    Example:
        >>> import tempfile
        >>> from loraspan.store import save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [save(Collection({}), folder, overwrite=again) for again in (False, True)]
        [1, 2]
    """
    folder = Path(path)
    check(collection)
    planned = [(BASIS, segment.basis_tensors(collection), 0)]
    for held in collection.segments:
        living = merge([held])
        planned.append((TASKS, segment.task_tensors(living), living.living))
    return publish(collection, folder, planned, overwrite=overwrite, parent=parent, timeout=timeout)


def publish(
    collection: Collection,
    folder: Path,
    planned: Sequence[tuple[str, Named, int]],
    *,
    overwrite: bool,
    parent: int | None = None,
    timeout: float = 30.0,
) -> int:
    """Write the planned files ``(kind, tensors, tasks)``, the bases first, and a manifest for them."""
    seen = _standing(folder, overwrite)
    if parent is not None and parent != seen:
        raise StoreError(f"{folder}: at generation {seen}, not {parent}: open it again and repeat the change")
    try:
        files.make_folder(folder)
        with _locked(folder, timeout):
            if (now := current(folder)) != seen:
                raise StoreError(
                    f"{folder}: another writer was faster: it is at generation {now} and was at {seen} when this "
                    "began; nothing was written; open it again and repeat the change"
                )
            _clean(folder, seen)
            return _commit(collection, folder, planned, seen)
    except StoreError:
        raise
    except OSError as error:
        what = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise StoreError(f"{folder}: cannot be written: {what}; the store is as it was before") from error


def _commit(collection: Collection, folder: Path, planned: Sequence[tuple[str, Named, int]], parent: int | None) -> int:
    temporary: list[Path] = []
    try:
        written = _write_all(folder, planned, temporary)
        manifest = Manifest(
            generation=(parent or 0) + 1,
            parent=parent,
            dtype=collection.dtype,
            base_model=collection.base_model,
            summary=collection.summary,
            slots=segment.slot_shapes(collection),
            basis=written[0],
            segments=tuple(written[1:]),
        )
        _write_small(folder, manifest_name(manifest.generation), manifests.dump(manifest), temporary)
        # every file that the manifest names, and the manifest, have to last before CURRENT names them
        files.sync_folder(folder)
        _write_small(folder, CURRENT, f"{manifest.generation}\n".encode(), temporary)
        files.sync_folder(folder)
        return manifest.generation
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                files.remove(path)


def _write_all(folder: Path, planned: Sequence[tuple[str, Named, int]], temporary: list[Path]) -> list[DataFile]:
    """Write files of tensors side by side, each while it is being hashed."""
    with ThreadPoolExecutor(max_workers=2 * len(planned)) as pool:
        jobs: list[tuple[Path, list[memoryview], Future[str], Future[None]]] = []
        for kind, named, _ in planned:
            buffers, path = _buffers(kind, named), _temporary(folder, temporary)
            jobs.append((path, buffers, pool.submit(_hash, buffers), pool.submit(_write, path, buffers)))
    written = []
    for (kind, _, tasks), (path, buffers, digest, done) in zip(planned, jobs, strict=True):
        done.result()
        sha256 = digest.result()
        name = data_name(kind, sha256)
        files.rename(path, folder / name)
        written.append(DataFile(name, sha256, sum(map(len, buffers)), tasks))
    return written


def _buffers(kind: str, named: Named) -> list[memoryview]:
    """Give a file of tensors as pieces of memory: the header, then the tensors where they are."""
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named]
    places = order(entries)
    pieces = [memoryview(header((entries[i] for i in places), {"loraspan": kind}))]
    pieces += [memoryview(_memory(named[i][1])) for i in places if named[i][1].numel()]
    return pieces


def _memory(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def _hash(buffers: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in buffers:
        digest.update(piece)
    return digest.hexdigest()


def _write(path: Path, buffers: Sequence[memoryview]) -> None:
    descriptor = files.create(path)
    try:
        for piece in buffers:
            done = 0
            while done < len(piece):
                done += files.write(descriptor, piece[done:])
        files.sync(descriptor)
    finally:
        files.close(descriptor)


def _write_small(folder: Path, name: str, data: bytes, temporary: list[Path]) -> None:
    path = _temporary(folder, temporary)
    _write(path, [memoryview(data)])
    files.rename(path, folder / name)


def _temporary(folder: Path, made: list[Path]) -> Path:
    made.append(folder / f"{TEMPORARY}{uuid.uuid4().hex}")
    return made[-1]


def _standing(folder: Path, overwrite: bool) -> int | None:
    """Give the generation that a folder is at, None where there is none yet; refuse a folder of something else."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise StoreError(f"{folder}: a store is a folder, and this is a file: choose another path")
    generation = current(folder)
    if generation is None:
        # what the first save leaves when it is cut short
        strangers = [entry.name for entry in folder.iterdir() if not _ours(entry.name)]
        if strangers:
            raise StoreError(f"{folder}: a folder that is no store, with {strangers[0]!r} in it: choose another path")
    elif not overwrite:
        raise StoreError(
            f"{folder}: a store already, at generation {generation}: "
            "pass overwrite=True to write its next generation, or choose another path"
        )
    return generation


def _ours(name: str) -> bool:
    return (
        name == LOCK or name.startswith(TEMPORARY) or bool(DATA_FILE.fullmatch(name) or MANIFEST_FILE.fullmatch(name))
    )


@contextlib.contextmanager
def _locked(folder: Path, timeout: float) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = folder / LOCK
    # made here, so that its mode follows the umask and whoever may write to the folder may lock it
    with contextlib.suppress(FileExistsError):
        files.close(files.create(path))
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise StoreError(
            f"{folder}: another writer has held {LOCK} for {timeout:g} s: wait until it is done, and repeat"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _clean(folder: Path, generation: int | None) -> None:
    """Remove what a writer that was cut short left behind."""
    used: set[str] | None = set()
    candidates = []
    for entry in sorted(folder.iterdir()):
        match = MANIFEST_FILE.fullmatch(entry.name)
        if entry.name.startswith(TEMPORARY) or (match and int(match[1]) > (generation or 0)):
            files.remove(entry)
        elif match and used is not None:
            try:
                used.update(data.file for data in read_manifest(folder, int(match[1])).files)
            except (FormatError, StoreError, ArgumentError):
                used = None  # a generation that cannot be read may still be repaired: keep all files
        elif DATA_FILE.fullmatch(entry.name):
            candidates.append(entry)
    for entry in candidates:
        if used is not None and entry.name not in used:
            files.remove(entry)
