"""The licence that an adapter states, if it does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from loraspan.adapters.regular import open_regular

_FRONT_MATTER_BYTES = 4096


def licence_of(folder: str, config: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    """Give it from the configuration, the tensor file's metadata, or the front matter of the folder's README.md.

    Example:
        >>> licence_of("", {"license": "apache-2.0"}, {})
        'apache-2.0'
    """
    return config.get("license") or metadata.get("license") or _from_readme(os.path.join(folder, "README.md"))  # noqa: PTH118


def _from_readme(path: str) -> str | None:
    try:
        with open_regular(path) as file:
            head = file.read(_FRONT_MATTER_BYTES)
    except OSError:
        return None
    front = head.split(b"---", 2)
    if len(front) < 3 or front[0].strip():
        return None
    for line in front[1].decode("utf-8", "replace").splitlines():
        if line.startswith("license:"):
            return line.removeprefix("license:").strip().strip("\"'") or None
    return None
