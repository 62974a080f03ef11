"""Who takes part in a run over many adapters: every source opened once, briefly, and what is wrong set aside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraspan.adapters import peft
from loraspan.adapters.base import Adapter
from loraspan.adapters.sources import Found, Sources
from loraspan.errors import ArgumentError, LoraspanError
from loraspan.many.aside import Aside, Opened, find_each, nobody_left, sift
from loraspan.many.members import Map, Member, Origin, base_of, maps_of, stamp_of


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
    opened: list[Opened] = []
    for i, one in enumerate(found):
        report(i, len(found))
        try:
            opened.append(_look(one, tables))
        except LoraspanError as error:
            if not skip or isinstance(error, ArgumentError):
                raise
            aside.append(Aside(one.hub_id or str(one.what), one.name or "", str(error)))
    report(len(found), len(found))
    members = sift(opened, skip, aside)
    if not members:
        raise nobody_left(aside)
    base_model = next((name for _, name in members if name), None)
    slots = _slots_of(dict.fromkeys(member.maps for member, _ in members))
    return Census(tuple(member for member, _ in members), tuple(aside), base_model, slots)


def _look(found: Found, tables: dict[tuple[Map, ...], tuple[Map, ...]]) -> Opened:
    if isinstance(found.what, Adapter):
        raise ArgumentError(
            f"compress: with memory= or executor= the sources are files; got the Adapter {found.what.name!r}, which is "
            "in memory already. Leave them out, or write it to a file first (loraspan.adapters.peft.write)"
        )
    path = os.fspath(found.what)
    adapter = peft.read(found.what, name=found.name)
    maps = maps_of(adapter)
    # thousands of adapters of one recipe share one table
    member = Member(
        Origin(path, adapter.name, found.hub_id, stamp_of(path)), adapter.nbytes, tables.setdefault(maps, maps)
    )
    return member, base_of(adapter)
