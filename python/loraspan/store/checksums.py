"""Compare files of a store with the checksums that its manifest has for them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loraspan.adapters.regular import open_regular
from loraspan.store.format import Finding
from loraspan.store.manifest import DataFile

# bytes read in one go
_CHUNK = 1 << 22


def wrong_files(folder: Path, files: Iterable[DataFile]) -> list[Finding]:
    """Read files whole, several at a time, and say which are not those that were written, in order."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return [finding for found in pool.map(lambda data: _wrong(folder, data), files) for finding in found]


def _wrong(folder: Path, data: DataFile) -> list[Finding]:
    digest = hashlib.sha256()
    size = 0
    try:
        with open_regular(folder / data.file) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        return [Finding(data.file, "file", f"cannot be read: {error.strerror}")]
    if size != data.size:
        return [Finding(data.file, "size", f"the manifest says {data.size} bytes; it has {size}")]
    if digest.hexdigest() != data.sha256:
        return [Finding(data.file, "checksum", f"the manifest says {data.sha256}; it has {digest.hexdigest()}")]
    return []
