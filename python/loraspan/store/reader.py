"""Which generation a store is at, and what its manifest says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loraspan.adapters.regular import open_regular
from loraspan.collection.collection import Segment
from loraspan.errors import ArgumentError, StoreError
from loraspan.store import manifest as manifests
from loraspan.store.format import CURRENT, DamagedError, manifest_name
from loraspan.store.manifest import Manifest

_LARGEST_MANIFEST = 2**28


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
    return parse_manifest(read_sealed(folder, generation), generation)


def read_sealed(folder: Path, generation: int) -> bytes:
    """Give the bytes of the manifest of a generation."""
    path = folder / manifest_name(generation)
    try:
        with open_regular(path) as file:
            data = file.read(_LARGEST_MANIFEST + 1)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST_MANIFEST:
        raise DamagedError(path.name, "size", f"a manifest has at most {_LARGEST_MANIFEST} bytes")
    return data


def parse_manifest(data: bytes, generation: int) -> Manifest:
    """Give what the manifest of a generation says."""
    name = manifest_name(generation)
    manifest = manifests.parse(data, name)
    if manifest.generation != generation:
        raise DamagedError(name, "generation", f"it has to be {generation}; it is {manifest.generation}")
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
