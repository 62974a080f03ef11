"""Files on their way into a store: written under other names, and gone again if anything fails."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.collection.headers import file_start, order
from loraspan.errors import ArgumentError, FormatError, StoreError
from loraspan.store import files
from loraspan.store.format import DATA_FILE, MANIFEST_FILE, TEMPORARY, UNFINISHED, data_name
from loraspan.store.manifest import DataFile
from loraspan.store.reader import current, read_manifest

Named = Sequence[tuple[str, Tensor]]
_AT_ONCE = 2


class _Job(NamedTuple):
    """A file that is being written."""

    kind: str
    path: Path
    size: int
    digest: Future[str]
    done: Future[None]


class Drafts:
    """What one writer has made so far, for generation ``number``."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._temporary: list[Path] = []
        self._made: list[Path] = []

    def write_all(self, planned: Sequence[tuple[str, Callable[[], Named]]]) -> list[DataFile]:
        """Write files of tensors ``(kind, tensors)``, some side by side, each while it is being hashed."""
        written: list[DataFile] = []
        waiting: deque[_Job] = deque()
        with ThreadPoolExecutor(max_workers=2 * min(_AT_ONCE, len(planned) or 1)) as pool:
            for kind, named in planned:
                # no more than these are in memory, where they are not mapped
                if len(waiting) == _AT_ONCE:
                    written.append(self._done(waiting.popleft()))
                buffers, path = _buffers(kind, named()), self._draft()
                size = sum(map(len, buffers))
                # written first: the disk is at work while others are hashed
                done = pool.submit(_write, path, buffers)
                waiting.append(_Job(kind, path, size, pool.submit(_hash, buffers), done))
                del buffers
            written += [self._done(job) for job in waiting]
        return written

    def _done(self, job: _Job) -> DataFile:
        job.done.result()
        sha256 = job.digest.result()
        data = DataFile(data_name(job.kind, sha256), sha256, job.size)
        self._settle(job.path, data.file, data.size)
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        path = self._draft()
        _write(path, [memoryview(data)])
        self._settle(path, name, len(data))

    def _draft(self) -> Path:
        self._temporary.append(self._folder / f"{TEMPORARY}{uuid.uuid4().hex}")
        return self._temporary[-1]

    def _settle(self, path: Path, name: str, size: int) -> None:
        target = self._folder / name
        if not target.exists():
            self._made.append(target)
        replaced = True
        try:
            files.rename(path, target)
        except FileExistsError:
            replaced = False
        if not replaced or path.exists() or target.stat().st_size != size:
            raise not_replaced(target)

    def discard(self) -> None:
        """Remove everything but what the current generation may consist of."""
        for path in self._temporary:
            files.remove(path)
        if current(self._folder) != self._number:
            for path in reversed(self._made):
                files.remove(path)


def not_replaced(target: Path) -> StoreError:
    """Give the error for a file that did not take the place of another."""
    return StoreError(
        f"{target}: its file system does not put a new file in place of an old one, without which no change can be "
        "made in one step: the store is as it was before; copy it to another disk to change it"
    )


@contextlib.contextmanager
def unfinished(folder: Path, number: int) -> Iterator[Drafts]:
    """Mark a store as being written to, and give what takes the files; the mark outlasts a writer that is cut short."""
    mark, drafts = folder / UNFINISHED, Drafts(folder, number)
    with contextlib.suppress(FileExistsError):
        files.close(files.create(mark))
    try:
        yield drafts
    except BaseException:
        # what cannot be removed is left to the next writer, with the mark
        with contextlib.suppress(OSError, FormatError):
            drafts.discard()
            files.remove(mark)
        raise
    with contextlib.suppress(OSError):
        files.remove(mark)


def tidy(folder: Path, generation: int | None) -> None:
    """Remove what a writer that was cut short left behind, if one has."""
    if not (folder / UNFINISHED).exists():
        return
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
    if used is not None:
        files.remove(folder / UNFINISHED)


def _buffers(kind: str, named: Named) -> list[memoryview]:
    """Give a file of tensors as pieces of memory: its start, then the tensors where they are."""
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named]
    places = order(entries)
    pieces = [memoryview(file_start([entries[i] for i in places], {"loraspan": kind}))]
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
