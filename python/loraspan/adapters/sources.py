"""From what a user names (folders, globs, files, Hub ids) to adapters, in a fixed order and each with its own name."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from loraspan.adapters import hub
from loraspan.adapters.base import Adapter
from loraspan.adapters.keys import CONFIG_NAME, WEIGHTS_NAME
from loraspan.adapters.peft_read import read
from loraspan.errors import ArgumentError, FormatError, MismatchError

One: TypeAlias = "str | os.PathLike[str] | Adapter"
Sources: TypeAlias = "One | Iterable[One] | Mapping[str, One]"

_GLOB = re.compile(r"[*?\[]")


class Found(NamedTuple):
    """One adapter that a source named: a path or an object, the task's name if the source gives one, and its Hub id."""

    what: Path | Adapter
    name: str | None = None
    hub_id: str | None = None


def resolve(sources: Sources) -> list[Path]:
    """Give the path of each adapter that ``sources`` names.

    Args:
        sources: a folder that is an adapter, a folder of such folders, a glob, a ``.safetensors`` file, a Hub id
            ``owner/name`` (only where no such path exists), a dict of task names to any of these, or a list of any.

    Returns:
        Folders or ``.safetensors`` files: sources in the order given, what one of them finds sorted by path.

    Raises:
        FormatError: if a source names no adapter.
        ArgumentError: if a source is of a type that names no files, an ``Adapter`` among them.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in "sql", "legal":
        ...     (root / name).mkdir()
        ...     (root / name / "adapter_config.json").touch()
        >>> [path.name for path in resolve(root)]
        ['legal', 'sql']
    """
    found = find(sources)
    paths = [one.what for one in found if isinstance(one.what, Path)]
    if len(paths) < len(found):
        raise ArgumentError("resolve: needs paths, globs or Hub ids; got an Adapter, which has no file of its own")
    return paths


def read_all(sources: Sources, *, hash_file: bool = False) -> list[Adapter]:
    """Open every adapter that ``sources`` names.

    Args:
        sources: as for :func:`resolve`, and ``Adapter`` objects, which are taken as they are.
        hash_file: also hash each whole tensor file.

    Returns:
        The adapters, each with a name of its own: that in the dict, or the folder's.

    Raises:
        MismatchError: if two adapters would have one name.
        FormatError: if a source names no adapter, or a file does not hold.
        UnsupportedError: as :func:`loraspan.adapters.peft.read`.
    """
    found = find(sources)
    adapters = [open_found(one, hash_file=hash_file) for one in found]
    _check_names(adapters)
    return adapters


def open_found(found: Found, *, hash_file: bool = False) -> Adapter:
    """Open one adapter; one in memory is taken as it is."""
    if isinstance(found.what, Adapter):
        return found.what if found.name is None else replace(found.what, name=found.name)
    adapter = read(found.what, name=found.name, hash_file=hash_file)
    if found.hub_id is None:
        return adapter
    return replace(adapter, source=replace(adapter.source, path=found.hub_id))


def find(sources: Sources) -> list[Found]:
    """Give each adapter that ``sources`` names, in order, without opening any."""
    if isinstance(sources, Mapping):
        return [_named(name, source) for name, source in sources.items()]
    if isinstance(sources, Adapter):
        return [Found(sources)]
    if isinstance(sources, (str, os.PathLike)):
        return _find(sources)
    if isinstance(sources, Iterable) and not isinstance(sources, (bytes, bytearray)):
        return [found for source in sources for found in find(source)]
    raise ArgumentError(
        f"sources: needs paths, globs, Hub ids, adapters, or a list or dict of them; got {type(sources).__name__}"
    )


def _named(name: object, source: One) -> Found:
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"sources: a dict of sources needs names of tasks as its keys; got {name!r}")
    found = find(source)
    if len(found) != 1:
        raise ArgumentError(f"sources: the name {name!r} needs exactly one adapter; {source!s} holds {len(found)}")
    return found[0]._replace(name=name)


def _find(source: str | os.PathLike[str]) -> list[Found]:
    text = os.fspath(source)
    if text.startswith("~") and not os.path.lexists(text):
        # a shell leaves it alone in a quoted glob
        text = os.path.expanduser(text)  # noqa: PTH111 (globs too)
    path = Path(text)
    if path.is_file():
        return [Found(path)]
    if path.is_dir():
        return [Found(path)] if _is_adapter(path) else _in_folder(path)
    if _GLOB.search(text):
        return _in_glob(text)
    if isinstance(source, str) and hub.is_id(text):
        return [Found(hub.download(text), text.rpartition("/")[2], text)]
    raise FormatError(f"{text}: there is no such file or folder, and it is neither a glob nor a Hub id owner/name")


def _in_folder(folder: Path) -> list[Found]:
    inside = sorted(child for child in folder.iterdir() if child.is_dir() and _is_adapter(child))
    if not inside:
        raise FormatError(
            f"{folder}: needs to be an adapter ({CONFIG_NAME} and {WEIGHTS_NAME}) or to hold folders that are"
        )
    return [Found(path) for path in inside]


def _in_glob(pattern: str) -> list[Found]:
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (absolute patterns too)
    folders = {path for path in paths if path.is_dir() and _is_adapter(path)}
    # "**" matches an adapter's folder and also the file in it
    inside = {folder / WEIGHTS_NAME for folder in folders}
    hits = [path for path in paths if path in folders or (path.suffix == ".safetensors" and path not in inside)]
    if not hits:
        raise FormatError(
            f"{pattern}: needs to match folders that are adapters; it matches {len(paths)} paths, none is"
        )
    return [Found(path) for path in hits]


def _is_adapter(folder: Path) -> bool:
    # with one of the two missing it is still meant as an adapter, and reading it says what is missing
    return (folder / CONFIG_NAME).exists() or (folder / WEIGHTS_NAME).exists()


def _check_names(adapters: list[Adapter]) -> None:
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        other = first.setdefault(adapter.name, adapter)
        if other is not adapter:
            raise MismatchError(
                f"two adapters would both be task {adapter.name!r}: {_origin(other)} and {_origin(adapter)}. "
                "Name them: {'one': source, 'other': source}"
            )


def _origin(adapter: Adapter) -> str:
    return adapter.source.path or "an adapter without a file"
