"""Open a generation of a store as a collection."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loraspan.adapters.regular import open_regular
from loraspan.collection.collection import Collection, Segment, SlotSpace
from loraspan.errors import ArgumentError, StoreError
from loraspan.store import manifest as manifests
from loraspan.store import segment
from loraspan.store.format import CURRENT, DamagedError, manifest_name
from loraspan.store.manifest import Manifest
from loraspan.store.mapped import TensorFile

_LARGEST_MANIFEST = 2**28


def open(path: str | os.PathLike[str], *, generation: int | None = None) -> Collection:
    """Open a store.

    The tensors are views of the mapped files: nothing of them is read before it is used, and the files are closed. A
    collection keeps the generation that it was opened at, whatever is saved to the folder afterwards.

    Args:
        path: the folder.
        generation: which one to open; None opens the current one.

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
    folder = Path(path)
    try:
        return _open(folder, generation)
    except DamagedError as error:
        raise error.within(folder) from None


def _open(folder: Path, generation: int | None) -> Collection:
    manifest = read_manifest(folder, wanted(folder, generation))
    bases = segment.read_basis(TensorFile(folder, manifest.basis), manifest)
    segments = tuple(segment.read_tasks(TensorFile(folder, data), manifest, data.tasks) for data in manifest.segments)
    if (double := double_name(segments)) is not None:
        raise DamagedError(manifest_name(manifest.generation), f"task {double!r}"[:200], "two tasks have this name")
    slots = {slot.name: SlotSpace(*bases[slot.name], slot.kind, slot.kernel) for slot in manifest.slots}
    return Collection(slots, segments, manifest.dtype, manifest.base_model, manifest.summary)


def current(folder: Path) -> int | None:
    """Give the number of the current generation, or None where there is no ``CURRENT``."""
    try:
        with open_regular(folder / CURRENT) as file:
            text = file.read(64)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{folder / CURRENT}: cannot be read: {error.strerror}") from error
    digits = text.removesuffix(b"\n")
    if not digits.isdigit() or len(digits) > 18 or digits.startswith(b"0"):
        raise DamagedError(CURRENT, "generation", f"it has to be one number; it is {text!r}")
    return int(digits)


def wanted(folder: Path, generation: int | None) -> int:
    """Give the number of the generation to open: the one asked for, or the current one."""
    newest = current(folder)
    if newest is None:
        reason = "it has no file CURRENT" if folder.is_dir() else "there is no such folder"
        raise StoreError(f"{folder}: not a loraspan store: {reason}")
    if generation is None:
        return newest
    if not 1 <= generation <= newest:
        raise ArgumentError(f"{folder}: generation has to be from 1 to {newest}, the current one; got {generation}")
    return generation


def read_manifest(folder: Path, generation: int) -> Manifest:
    """Read the manifest of a generation."""
    path = folder / manifest_name(generation)
    try:
        with open_regular(path) as file:
            data = file.read(_LARGEST_MANIFEST + 1)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST_MANIFEST:
        raise DamagedError(path.name, "size", f"a manifest has at most {_LARGEST_MANIFEST} bytes")
    manifest = manifests.parse(data, path.name)
    if manifest.generation != generation:
        raise DamagedError(path.name, "generation", f"it has to be {generation}; it is {manifest.generation}")
    return manifest


def double_name(segments: Iterable[Segment]) -> str | None:
    """Give a name that two tasks have, if there is one."""
    seen: set[str] = set()
    for of in segments:
        for task in of.tasks:
            if task is not None and task.name in seen:
                return task.name
            if task is not None:
                seen.add(task.name)
    return None
