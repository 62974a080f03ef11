"""Adapters as a run sees them: where their files are, what they map, and what they may be told apart by."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from loraspan.adapters import peft
from loraspan.adapters.base import Adapter
from loraspan.adapters.keys import CONFIG_NAME, WEIGHTS_NAME
from loraspan.errors import FormatError, MismatchError


class Map(NamedTuple):
    """A slot of an adapter: its path, ``(n, d)``, what it is in the model, and the adapter's rank there."""

    path: str
    n: int
    d: int
    kind: str
    kernel: tuple[int, int, int] | None
    lora_rank: int

    @property
    def identity(self) -> Hashable:
        """What adapters of one base model agree on."""
        return (self.n, self.d, self.kind, self.kernel)


class Origin(NamedTuple):
    """Where to read an adapter, and how its files looked when the run began; small, and the same on every machine.

    ``stamp`` has the size and the time of change, in nanoseconds, of the tensor file and of the configuration.
    """

    path: str
    name: str
    hub_id: str | None
    stamp: tuple[int, ...]

    @property
    def shown(self) -> str:
        """The adapter as the user named it."""
        return self.hub_id or self.path


@dataclass(frozen=True)
class Member:
    """An adapter that takes part."""

    origin: Origin
    nbytes: int
    maps: tuple[Map, ...]


def stamp_of(path: str) -> tuple[int, ...]:
    """Give the sizes and times of change of an adapter's two files."""
    file = path if path.endswith(".safetensors") else os.path.join(path, WEIGHTS_NAME)  # noqa: PTH118
    stamp: list[int] = []
    for name in (file, os.path.join(os.path.dirname(file), CONFIG_NAME)):  # noqa: PTH118, PTH120
        try:
            status = os.stat(name)  # noqa: PTH116
        except OSError as error:
            raise FormatError(f"{name}: cannot be opened: {error.strerror}") from None
        stamp += [status.st_size, status.st_mtime_ns]
    return tuple(stamp)


def open_origin(origin: Origin, *, hash_file: bool = False) -> Adapter:
    """Open an adapter that the census has seen.

    Raises:
        MismatchError: if a file of it has changed since then.
    """
    if stamp_of(origin.path) != origin.stamp:
        raise MismatchError(f"{origin.shown}: a file of this adapter has changed since the run began; start it anew")
    adapter = peft.read(Path(origin.path), name=origin.name, hash_file=hash_file)
    if origin.hub_id is None:
        return adapter
    return replace(adapter, source=replace(adapter.source, path=origin.hub_id))


def maps_of(adapter: Adapter) -> tuple[Map, ...]:
    """Give the table of an adapter's slots."""
    return tuple(Map(key, *slot.shape, slot.kind, slot.kernel, slot.lora_rank) for key, slot in adapter.slots.items())


def base_of(adapter: Adapter) -> str | None:
    """Give the base model that an adapter names, as such names are compared; None if it names none."""
    return (adapter.source.base_model or "").rstrip("/") or None
