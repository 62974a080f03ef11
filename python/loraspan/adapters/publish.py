"""Write a tensor file, and a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraspan.adapters.header import DTYPES

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
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        _sync(file.fileno(), file.flush)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, synced to the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        _sync(file.fileno(), file.flush)


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Give a new folder to fill; it takes the place of ``target`` at the end, and is deleted if the body fails.

    A ``target`` that exists is replaced whole. If the process dies on the way, what is left is a folder beside it
    whose name begins with a dot.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 (resolve() would follow a link and replace what it names)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    draft.mkdir()
    try:
        yield draft
        if target.exists():
            old = draft.with_suffix(".old")
            target.rename(old)
            try:
                draft.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _sync(descriptor: int, flush: object) -> None:
    assert callable(flush)
    flush()
    os.fsync(descriptor)
