"""A resolver for vLLM: a task of a store becomes an adapter folder when somebody asks for it.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). It has no other way to hand
over settings than the environment, as vLLM's own resolvers take theirs:

=============================  ========================================================================================
``LORASPAN_VLLM_STORE``        the store; without it nothing is registered
``LORASPAN_VLLM_CACHE``        the folder for adapters; a private one in ``/dev/shm`` by default
``LORASPAN_VLLM_CACHE_BYTES``  what they may take together, such as ``16GB``; ``4GB`` by default
``LORASPAN_VLLM_DTYPE``        of their factors: ``bf16``, ``f16`` or ``f32``; that of the originals by default
``LORASPAN_VLLM_BASE_MODEL``   what vLLM calls the base model, where that is not what the adapters call it
``LORASPAN_VLLM_HOLD``         ``0`` lets an adapter leave while a server runs that has asked for it
=============================  ========================================================================================

vLLM asks a resolver once for a name, loads the folder, and loads it again whenever the adapter is asked for and no
longer among the ``--max-cpu-loras`` that a worker remembers; a folder that has gone by then ends the engine. So what a
living process was given stays, unless told otherwise, and a cache that is full of that refuses other tasks.

Written to vLLM's documented interface and its source (0.8 to 0.33), and tested against a stand-in of it and, where vLLM
can be imported, in its own registry, server and loader; not with an engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from loraspan._default_device import cpu_by_default
from loraspan.collection.layout import parse_bytes
from loraspan.errors import ArgumentError, LoraspanError
from loraspan.serve.export import VLLM_RANKS, Fit
from loraspan.serve.names import plain_part
from loraspan.serve.vllm_cache import Cache
from loraspan.store.opened import Opened, open_at
from loraspan.store.reader import wanted

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NAME = "loraspan"
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_PREFIX = "LORASPAN_VLLM_"
_KNOWN = ("STORE", "CACHE", "CACHE_BYTES", "DTYPE", "BASE_MODEL", "HOLD")
_TMPFS = Path("/dev/shm")
_CACHE_BYTES = 4_000_000_000
# vLLM keeps ids in 32 bits with a sign up to 0.11, and 0 is no id
_LAST_ID = 2**31 - 1
_log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """What the environment says; see the top of this file."""

    store: Path
    cache: Path | None = None
    cache_bytes: int = _CACHE_BYTES
    dtype: torch.dtype | None = None
    base_model: str | None = None
    hold: bool = True


class Found(NamedTuple):
    """What vLLM is told of a task."""

    path: Path
    number: int


def settings_of(environment: Mapping[str, str]) -> Settings | None:
    """Read the settings, None where no store is named.

    Raises:
        ArgumentError: if one has a value that it cannot have, or a name that is near these is none of them.

    Example:
        >>> settings_of({"LORASPAN_VLLM_STORE": "team.span", "LORASPAN_VLLM_CACHE_BYTES": "1GB"}).cache_bytes
        1000000000
    """
    given = {name.removeprefix(_PREFIX): value for name, value in environment.items() if name.startswith(_PREFIX)}
    for name in given:
        if name not in _KNOWN:
            raise ArgumentError(f"{_PREFIX}{name}: is none of {', '.join(_PREFIX + known for known in _KNOWN)}")
    if not given.get("STORE"):
        return None
    dtype, hold = given.get("DTYPE") or None, given.get("HOLD") or "1"
    if dtype is not None and dtype not in _DTYPES:
        raise ArgumentError(f"{_PREFIX}DTYPE: needs one of {', '.join(_DTYPES)}; got {dtype!r}")
    if hold not in ("0", "1"):
        raise ArgumentError(f"{_PREFIX}HOLD: needs 0 or 1; got {hold!r}")
    return Settings(
        Path(given["STORE"]),
        Path(given["CACHE"]) if given.get("CACHE") else None,
        parse_bytes(f"{_PREFIX}CACHE_BYTES", given.get("CACHE_BYTES") or None)
        or Settings._field_defaults["cache_bytes"],
        None if dtype is None else _DTYPES[dtype],
        given.get("BASE_MODEL") or None,
        hold == "1",
    )


class TaskFolders:
    """Tasks of a store as adapter folders for vLLM, made on demand; safe to use from several threads.

    A folder belongs to the very content of a task: the files of the store that it comes from, its place there and its
    name. A task that was changed gets another one, and one that a new generation only carries along keeps its own.

    Args:
        settings: see the top of this file.

    Raises:
        StoreError: if there is no such store, or the cache cannot be made.
    """

    def __init__(self, settings: Settings) -> None:
        wanted(settings.store, None)
        self._settings = settings
        self._fit = Fit(None, VLLM_RANKS, "vllm")
        shared = _TMPFS if _TMPFS.is_dir() else Path(tempfile.gettempdir())
        folder = settings.cache or shared / f"loraspan-vllm-{os.getuid()}"
        self._cache = Cache(folder.absolute(), settings.cache_bytes, hold=settings.hold, private=settings.cache is None)
        self._guard = threading.Lock()
        self._opened: Opened | None = None
        self._numbers: dict[int, str] = {}
        self._given: dict[str, str] = {}

    @cpu_by_default
    def resolve(self, base_model: str, name: str) -> Found | None:
        """Give the folder and the number of a task, None for a name that is no task of this store and base model.

        Raises:
            UnsupportedError: if vLLM cannot take the task.
            ArgumentError: if it has more columns than vLLM has ranks for.
            StoreError, FormatError, NotFiniteError: if the store is damaged, or the cache full or not to be written.
        """
        opened = self._current()
        if name not in opened.names or not self._is_for(opened, base_model, name):
            return None
        self._fit.check(opened.collection, name)
        digest = self._digest(opened, name)
        key = f"{plain_part(name)}~{digest[:32]}"
        path = self._cache.take(key, lambda: self._fit.rebuild(opened.collection, name, self._settings.dtype))
        with self._guard:
            before = self._given.get(name)
            self._given[name] = key
            number = self._number(digest)
        if before not in (None, key):
            self._cache.release(str(before))
        return Found(path, number)

    def _current(self) -> Opened:
        """Open the store, or go on with what is open where that is its generation still."""
        with self._guard:
            if self._opened is None or self._opened.generation != wanted(self._settings.store, None):
                self._opened = open_at(self._settings.store)
            return self._opened

    def _is_for(self, opened: Opened, base_model: str, name: str) -> bool:
        """Whether a task is for the model that vLLM runs; True where the store does not say what it is for."""
        mine = self._settings.base_model or opened.collection.base_model
        if not mine or mine.rstrip("/") == base_model.rstrip("/"):
            return True
        _log.warning(
            "task %r of %s is for base model %r, and vLLM runs %r: if they are one, set %sBASE_MODEL=%s",
            name[:200], self._settings.store, mine, base_model, _PREFIX, base_model,
        )  # fmt: skip
        return False

    def _digest(self, opened: Opened, name: str) -> str:
        """Give a hash of a task: the immutable files that it lies in, its place there, and how it is written."""
        i, place = opened.collection.places[name]
        files = opened.basis.sha256, opened.segments[i].sha256
        parts = ("1", *files, place, name, opened.collection.base_model, str(self._settings.dtype), VLLM_RANKS)
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def _number(self, digest: str) -> int:
        """Give a number from 1 to 2^31 - 1: one content always has the same, and any two in this process differ."""
        number = int(digest[:16], 16) % _LAST_ID + 1
        while self._numbers.setdefault(number, digest) != digest:
            number = number % _LAST_ID + 1
        return number


def register() -> None:
    """Register the resolver with vLLM, where the environment names a store: the entry point.

    Raises:
        ArgumentError: if a setting has a value that it cannot have.
        StoreError: if there is no such store, or the cache cannot be made.
    """
    settings = settings_of(os.environ)
    if settings is None:
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    folders = TaskFolders(settings)

    class Resolver(LoRAResolver):  # type: ignore[misc]
        """Tasks of a store, rebuilt when they are asked for."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """Give the request for a task, None for any other name."""
            return await _request(folders, LoRARequest, base_model_name, lora_name)

    LoRAResolverRegistry.register_resolver(NAME, Resolver())


async def _request(folders: TaskFolders, kind: Any, base_model: str, name: str) -> Any:
    """Resolve without keeping other requests waiting; None says that there is no such adapter, so errors are raised."""
    try:
        found = await asyncio.to_thread(folders.resolve, base_model, name)
    except LoraspanError as error:
        _log.error("task %r cannot be served: %s", name[:200], error)
        raise
    if found is None:
        return None
    return kind(lora_name=name, lora_int_id=found.number, lora_path=str(found.path))
