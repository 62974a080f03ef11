"""Names, versions and damage: what every part of a store agrees on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from loraspan.adapters.strict_json import parse_object
from loraspan.errors import FormatError

# What this version writes, and the newest that it reads: 1 knew no directories, 2 no coded ends.
SCHEMA = 3

CURRENT = "CURRENT"
LOCK = ".lock"
UNFINISHED = ".unfinished"
PINS, PIN = ".pins", ".pin-"
TEMPORARY = ".tmp-"
BASIS, TASKS = "basis", "tasks"

DATA_FILE = re.compile(r"(basis|tasks)-[0-9a-f]{32}\.safetensors", re.ASCII)
PIN_FILE = re.compile(r"\.pin-([0-9]{6,18})-[0-9a-f]{32}", re.ASCII)
MANIFEST_FILE = re.compile(r"manifest-([0-9]{6,18})\.json", re.ASCII)

# far above any real dimension, and small enough that sums and products of a few stay in 64 bits
LARGEST = 2**31 - 1

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """Something wrong in a store.

    Attributes:
        file: in the store's folder.
        what: the part of the file: a tensor, a slot, a task, a field of the manifest.
        problem: what it has to be and what it is.
    """

    file: str
    what: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}: {self.problem}"


class DamagedError(FormatError):
    """A :class:`FormatError` that knows its :class:`Finding`."""

    def __init__(self, file: str, what: str, problem: str, folder: object = None) -> None:
        self.finding = Finding(file, what, problem)
        self._folder = folder
        super().__init__(str(self.finding) if folder is None else f"{folder}{os.sep}{self.finding}")

    def __reduce__(self) -> tuple[type[DamagedError], tuple[object, ...]]:
        # processes hand on errors by pickling them
        return type(self), (self.finding.file, self.finding.what, self.finding.problem, self._folder)

    def within(self, folder: object) -> DamagedError:
        """Give the same, naming the folder too."""
        return DamagedError(self.finding.file, self.finding.what, self.finding.problem, folder)


def manifest_name(generation: int) -> str:
    """Give the name of a generation's manifest."""
    return f"manifest-{generation:06d}.json"


def data_name(kind: str, sha256: str) -> str:
    """Give the name of a file of tensors."""
    return f"{kind}-{sha256[:32]}.safetensors"


def parse_json(data: bytes, file: str, what: str) -> dict[str, Any]:
    """Read a JSON object that a stranger may have written: no double keys, no NaN, no endless nesting."""
    try:
        return parse_object(data, what)
    except FormatError as error:
        raise DamagedError(file, what, str(error).removeprefix(f"{what}: ")) from None


def take(table: Any, key: str, kind: type[T], file: str, what: str) -> T:
    """Give ``table[key]``, which has to be there and of exactly that type."""
    if type(table) is not dict or key not in table:
        raise DamagedError(file, what, f"{key!r} is missing")
    value: T = table[key]
    if type(value) is not kind:
        raise DamagedError(file, what, f"{key!r} has to be {kind.__name__}; it is {type(value).__name__}")
    return value


def take_size(table: Any, key: str, file: str, what: str, *, largest: int = LARGEST) -> int:
    """Give ``table[key]``, which has to be a number from 0 to ``largest``."""
    value = take(table, key, int, file, what)
    if not 0 <= value <= largest:
        raise DamagedError(file, what, f"{key!r} has to be from 0 to {largest}; it is {value}")
    return value
