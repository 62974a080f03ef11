"""Give each task a folder of its own, whatever its name, and keep the index that leads back."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraspan.adapters.publish import write_text
from loraspan.adapters.regular import open_regular
from loraspan.adapters.strict_json import parse_object
from loraspan.errors import ArgumentError, FormatError, StoreError

INDEX = "tasks.json"
_FORMAT = "loraspan-export"
_LARGEST_INDEX = 2**28
# the same on every file system: one case, no end that Windows drops, nothing hidden, room for a suffix
_PLAIN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,78}[a-z0-9_-])?", re.ASCII)
# names that Windows keeps for devices, whatever follows a dot
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}
_SHOWN = 40
_DIGEST_BYTES = 10


def folder_name(task: str) -> str:
    """Give the name of the folder of a task: the same always, whatever other tasks there are.

    A plain name is its own folder: lower-case ASCII letters, digits, ``.``, ``_`` and ``-``, at most 80, none of those
    that a file system keeps for itself. Any other becomes what of it is plain, ``~`` and 80 bits of its SHA-256, so
    that names which differ in case, in look-alikes or after thousands of characters keep apart on every file system.

    Example:
        >>> folder_name("sql"), folder_name("SQL"), folder_name("../../etc")
        ('sql', 'SQL~u4cwurkwhhi4pxxm', 'etc~otgphrnuygnicz7z')
    """
    if _PLAIN.fullmatch(task) and task != INDEX and task.split(".")[0] not in _RESERVED:
        return task
    # a name from JSON may hold half of a pair, which UTF-8 has no bytes for
    digest = hashlib.sha256(task.encode("utf-8", "surrogatepass")).digest()[:_DIGEST_BYTES]
    return f"{plain_part(task)}~{base64.b32encode(digest).decode().lower()}"


def plain_part(task: str) -> str:
    """Give what of the beginning of a name may stand in that of a folder, for whoever reads it.

    Example:
        >>> plain_part("../Legal (new)"), plain_part("..")
        ('Legal_new', 'task')
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "_", task[:_SHOWN]).strip("_-") or "task"


def folder_names(tasks: Iterable[str]) -> dict[str, str]:
    """Give each task the name of its folder.

    Raises:
        ArgumentError: if two tasks have one folder, which takes 80 equal bits of two hashes.

    Example:
        >>> folder_names(["sql", "team/legal"])
        {'sql': 'sql', 'team/legal': 'team_legal~cxy46uiult4kgwt7'}
    """
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for task in tasks:
        name = folder_name(task)
        other = taken.setdefault(name.lower(), task)
        if other != task:
            raise ArgumentError(f"export: tasks {other!r} and {task!r} have one folder, {name!r}: rename one of them")
        names[task] = name
    return names


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """Give the tasks that an index lists, with what it says of each; none where there is no index.

    Raises:
        FormatError: if it is not an index, or lists a folder that is not its task's.
        StoreError: if it cannot be read.
    """
    path = folder / INDEX
    try:
        with open_regular(path) as file:
            raw = file.read(_LARGEST_INDEX + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > _LARGEST_INDEX:
        raise FormatError(f"{path}: needs an index of at most {_LARGEST_INDEX} bytes; it is longer")
    table = parse_object(raw, str(path))
    tasks = table.get("tasks")
    if table.get("format") != _FORMAT or not isinstance(tasks, dict):
        raise FormatError(f"{path}: needs the index of an export, with format {_FORMAT!r} and tasks; it is none")
    for name, entry in tasks.items():
        if not isinstance(entry, dict) or entry.get("folder") != folder_name(name):
            raise FormatError(
                f"{path}: needs the folder {folder_name(name)!r} for task {name[:200]!r}; got {entry!r:.200}"
            )
    return tasks


def write_index(folder: Path, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the index of a folder in one step, in place of one that is there.

    Raises:
        StoreError: if it cannot be written; one that is there is as it was.
    """
    draft = folder / f".{INDEX}.new"
    try:
        draft.unlink(missing_ok=True)
        write_text(draft, json.dumps({"format": _FORMAT, "tasks": tasks}, indent=1) + "\n")
        draft.replace(folder / INDEX)
    except OSError as error:
        raise StoreError(f"{folder / INDEX}: cannot be written: {error.strerror or error}") from error
