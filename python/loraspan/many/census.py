"""Who takes part in a run over many adapters: every source opened once, briefly, and what is wrong set aside."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from loraspan.adapters import peft
from loraspan.adapters.base import Adapter
from loraspan.adapters.keys import CONFIG_NAME, WEIGHTS_NAME
from loraspan.adapters.sources import Found, Sources, find
from loraspan.errors import ArgumentError, FormatError, LoraspanError, MismatchError


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


class Aside(NamedTuple):
    """An adapter that was left out, and why."""

    source: str
    name: str
    reason: str


@dataclass(frozen=True)
class Member:
    """An adapter that takes part."""

    origin: Origin
    nbytes: int
    maps: tuple[Map, ...]


@dataclass(frozen=True)
class Census:
    """Everyone, in the order of the sources.

    Attributes:
        members: those that take part.
        aside: those that do not.
        base_model: the base model that most of them name, if any does.
        slots: by path, in the order in which they were first seen.
    """

    members: tuple[Member, ...]
    aside: tuple[Aside, ...] = ()
    base_model: str | None = None
    slots: Mapping[str, Map] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors that take part."""
        return sum(member.nbytes for member in self.members)

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON; tables of slots that members share are there once."""
        tables = {table: i for i, table in enumerate(dict.fromkeys(member.maps for member in self.members))}
        return {
            "tables": list(tables),
            "members": [(*member.origin, member.nbytes, tables[member.maps]) for member in self.members],
            "aside": self.aside,
            "base_model": self.base_model,
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Census:
        """Undo :meth:`as_dict`."""
        tables = [
            tuple(
                Map(path, n, d, kind, None if kernel is None else tuple(kernel), lora_rank)
                for path, n, d, kind, kernel, lora_rank in rows
            )
            for rows in table["tables"]
        ]
        members = tuple(
            Member(Origin(path, name, hub_id, tuple(stamp)), nbytes, tables[i])
            for path, name, hub_id, stamp, nbytes, i in table["members"]
        )
        aside = tuple(Aside(*one) for one in table["aside"])
        return cls(members, aside, table["base_model"], _slots_of(tables))

    def changed(self, found: Sequence[Found]) -> str | None:
        """Say what is not as it was: another source, or a file of one; None if all is."""
        now = {str(one.what): one for one in found}
        before = {member.origin.path: member.origin for member in self.members}
        known = before.keys() | {one.source for one in self.aside}
        for path, origin in before.items():
            if path not in now:
                return f"the source {origin.shown} has gone"
            if stamp_of(path) != origin.stamp:
                return f"a file of {origin.shown} has changed"
        for path, one in now.items():
            if path not in known and one.hub_id not in known:
                return f"the source {path} has come"
        kept = [path for path in now if path in before]
        if kept != list(before):
            return "the order of the sources has changed"
        return None


def _slots_of(tables: Iterable[tuple[Map, ...]]) -> dict[str, Map]:
    slots: dict[str, Map] = {}
    for table in tables:
        for each in table:
            slots.setdefault(each.path, each)
    return slots


_Opened: TypeAlias = "tuple[Member, str | None]"


def take_census(sources: Sources, skip: bool, report: Callable[[int, int], None]) -> Census:
    """Open every source once, see that they belong together, and close it again.

    With ``skip``, what cannot be read, bears a name that another has, or is unlike most of the others, is set aside.

    Args:
        sources: as for :func:`loraspan.adapters.read_all`, without :class:`Adapter` objects.
        skip: whether to go on without what does not do.
        report: called with the number of sources seen, and their number.

    Raises:
        ArgumentError: if a source is an adapter in memory, or none is left.
        LoraspanError: without ``skip``, whatever is wrong with a source.
    """
    aside: list[Aside] = []
    found = find_each(sources, skip, aside)
    tables: dict[tuple[Map, ...], tuple[Map, ...]] = {}
    opened: list[_Opened] = []
    for i, one in enumerate(found):
        report(i, len(found))
        try:
            opened.append(_look(one, tables))
        except LoraspanError as error:
            if not skip or isinstance(error, ArgumentError):
                raise
            aside.append(Aside(one.hub_id or str(one.what), one.name or "", str(error)))
    report(len(found), len(found))
    members = _unlike_set_aside(_doubles_set_aside(opened, skip, aside), skip, aside)
    if not members:
        reasons = f"; the first reason: {aside[0].reason}" if aside else ""
        raise ArgumentError(f"compress: there is no adapter to compress: {len(aside)} were set aside{reasons}")
    base_model = next((name for _, name in members if name), None)
    slots = _slots_of(dict.fromkeys(member.maps for member, _ in members))
    return Census(tuple(member for member, _ in members), tuple(aside), base_model, slots)


def find_each(sources: Sources, skip: bool, aside: list[Aside]) -> list[Found]:
    """Give each adapter that the sources name; with ``skip``, a source that names none is set aside."""
    parts: Iterable[Any] = [sources]
    if isinstance(sources, Mapping):
        parts = [{name: source} for name, source in sources.items()]
    elif isinstance(sources, Iterable) and not isinstance(sources, (str, bytes, bytearray)):
        parts = sources
    found: list[Found] = []
    for source in parts:
        try:
            found += find(source)
        except FormatError as error:
            if not skip:
                raise
            aside.append(Aside(str(source), "", str(error)))
    return found


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


def _look(found: Found, tables: dict[tuple[Map, ...], tuple[Map, ...]]) -> _Opened:
    if isinstance(found.what, Adapter):
        raise ArgumentError(
            f"compress: with memory= the sources are files; got the Adapter {found.what.name!r}, which is in memory "
            "already. Leave memory= out, or save it first"
        )
    path = os.fspath(found.what)
    adapter = peft.read(found.what, name=found.name)
    maps = tuple(Map(key, *slot.shape, slot.kind, slot.kernel, slot.lora_rank) for key, slot in adapter.slots.items())
    # thousands of adapters of one recipe share one table
    member = Member(
        Origin(path, adapter.name, found.hub_id, stamp_of(path)), adapter.nbytes, tables.setdefault(maps, maps)
    )
    return member, (adapter.source.base_model or "").rstrip("/") or None


def _doubles_set_aside(opened: Sequence[_Opened], skip: bool, aside: list[Aside]) -> list[_Opened]:
    first: dict[str, Origin] = {}
    kept: list[_Opened] = []
    for member, base_model in opened:
        origin = member.origin
        other = first.setdefault(origin.name, origin)
        if other is origin:
            kept.append((member, base_model))
            continue
        reason = (
            f"two adapters would both be task {origin.name!r}: {other.shown} and {origin.shown}. "
            "Name them: {'one': source, 'other': source}"
        )
        if not skip:
            raise MismatchError(reason)
        aside.append(Aside(origin.shown, origin.name, reason))
    return kept


def _unlike_set_aside(opened: Sequence[_Opened], skip: bool, aside: list[Aside]) -> list[_Opened]:
    """Set aside whoever names another base model, or has another shape in a slot, than most of the others."""
    base_models = Counter(base_model for _, base_model in opened if base_model)
    shapes: dict[str, Counter[Hashable]] = {}
    for table, count in Counter(member.maps for member, _ in opened).items():
        for each in table:
            shapes.setdefault(each.path, Counter())[each.identity] += count
    usual_model = base_models.most_common(1)[0][0] if base_models else None
    usual = {path: counter.most_common(1)[0][0] for path, counter in shapes.items()}
    kept: list[_Opened] = []
    for member, base_model in opened:
        reason = _unlike(member, base_model, usual_model, usual)
        if reason is None:
            kept.append((member, base_model))
            continue
        reason = f"adapter {member.origin.name!r} ({member.origin.shown}) does not belong with the others: {reason}"
        if not skip:
            raise MismatchError(reason)
        aside.append(Aside(member.origin.shown, member.origin.name, reason))
    return kept


def _unlike(member: Member, base_model: str | None, usual_model: str | None, usual: Mapping[str, Any]) -> str | None:
    if base_model is not None and base_model != usual_model:
        return f"it is for base model {base_model!r}, most are for {usual_model!r}"
    for each in member.maps:
        if each.identity != usual[each.path]:
            n, d, kind, _ = usual[each.path]
            return f"its slot {each.path!r} is {each.kind} [{each.n}, {each.d}]; in most it is {kind} [{n}, {d}]"
    return None
