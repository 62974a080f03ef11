"""Write a tensor file, and a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraspan.adapters.exchange import alive, exchange, mark, sync_folder
from loraspan.adapters.header import DTYPES
from loraspan.errors import StoreError

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: no copy of a contiguous tensor, permissions as the umask says, synced to the disk.

    Views of one storage are fine. The widest dtypes come first, so that each tensor is aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        tensor = tensors[name]
        end = at + tensor.nbytes
        fields[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    # half a pair of UTF-16, which a licence out of a damaged store may hold, is no text: a question mark
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    header += b" " * (-len(header) % 8)
    _write(path, [len(header).to_bytes(8, "little") + header, *(_memory(tensors[name]) for name in names)])


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, synced to the disk."""
    _write(path, [text.encode()])


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Give a new folder to fill; it takes the place of ``target`` at the end, and is deleted if the body fails.

    A ``target`` that exists is replaced whole, in one step: whoever looks, and whenever the process dies, sees the old
    one or the new one. (Where two names cannot be exchanged in one step, as on Windows, there is a moment with neither,
    and a process that dies in it leaves the old one beside ``target``.) Then, or if it dies earlier, a folder is left
    whose name begins with a dot, and the next call for ``target`` removes it.

    Raises:
        StoreError: if the folder cannot be written; what was there before is there again.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 (resolve() would follow a link and replace what it names)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _tidy(target)
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
        draft.mkdir()
        try:
            with mark(draft):
                yield draft
                sync_folder(draft)
                old = _place(draft, target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except OSError as error:
        raise StoreError(
            f"{target}: cannot be written: {error.strerror or error}; what was there before is as it was"
        ) from error
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _place(draft: Path, target: Path) -> Path | None:
    """Give a folder its name, and say where the one is that had it."""
    if not target.exists():
        draft.rename(target)
        try:
            sync_folder(target.parent)
        except OSError:
            target.rename(draft)
            raise
        return None
    if exchange(draft, target):
        try:
            sync_folder(target.parent)
        except OSError:
            exchange(draft, target)
            raise
        return draft
    old = draft.with_suffix(".old")
    target.rename(old)
    try:
        draft.rename(target)
    except BaseException:
        old.rename(target)
        raise
    sync_folder(target.parent)
    return old


def _tidy(target: Path) -> None:
    """Remove what a process left that died while it wrote ``target``."""
    left = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(new|old)")
    for entry in target.parent.iterdir():
        if left.fullmatch(entry.name) and not alive(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
