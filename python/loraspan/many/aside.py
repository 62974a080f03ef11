"""Adapters that are set aside, and why: what cannot be read, and what does not belong with most of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from loraspan.adapters.base import Adapter
from loraspan.adapters.sources import Found, Sources, find, open_found
from loraspan.collection.factors import read_factors
from loraspan.errors import ArgumentError, FormatError, LoraspanError, MismatchError, NotFiniteError
from loraspan.many.members import Member, Origin, base_of, maps_of


class Aside(NamedTuple):
    """An adapter that was left out, and why."""

    source: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


# a member, and the base model that it names
Opened: TypeAlias = "tuple[Member, str | None]"


def read_or_set_aside(sources: Sources, *, hash_file: bool = False) -> tuple[list[Adapter], list[Aside]]:
    """Open every adapter that can be taken, and list the others with the reason.

    Args:
        sources: as for :func:`loraspan.adapters.read_all`.
        hash_file: also hash each whole tensor file.

    Raises:
        ArgumentError: if a source names nothing, or nobody is left.
    """
    aside: list[Aside] = []
    adapters: dict[int, Adapter] = {}
    opened: list[Opened] = []
    for one in find_each(sources, True, aside):
        try:
            adapter = open_found(one, hash_file=hash_file)
        except LoraspanError as error:
            aside.append(Aside(one.hub_id or str(one.what), one.name or "", str(error)))
            continue
        member = Member(Origin(_where(adapter), adapter.name, one.hub_id, ()), adapter.nbytes, maps_of(adapter))
        adapters[id(member)] = adapter
        opened.append((member, base_of(adapter)))
    kept = [adapters[id(member)] for member, _ in sift(opened, True, aside)]
    if not kept:
        raise nobody_left(aside)
    return kept, aside


def set_not_finite_aside(adapters: Sequence[Adapter]) -> tuple[list[Adapter], list[Aside]]:
    """Give the adapters whose factors are finite, and list the others."""
    kept, aside = [], []
    for adapter in adapters:
        try:
            read_factors([adapter])
            kept.append(adapter)
        except NotFiniteError as error:
            aside.append(Aside(_where(adapter), adapter.name, str(error)))
    return kept, aside


def nobody_left(aside: Sequence[Aside]) -> ArgumentError:
    """Say that there is nothing to compress, and why that is so."""
    reasons = f"; the first reason: {aside[0].reason}" if aside else ""
    return ArgumentError(f"compress: there is no adapter to compress: {len(aside)} were set aside{reasons}")


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


def sift(opened: Sequence[Opened], skip: bool, aside: list[Aside]) -> list[Opened]:
    """Set aside who bears a name that another has, or is unlike most of the others.

    Raises:
        MismatchError: without ``skip``, instead.
    """
    return _unlike_set_aside(_doubles_set_aside(opened, skip, aside), skip, aside)


def _where(adapter: Adapter) -> str:
    return adapter.source.path or "an adapter without a file"


def _doubles_set_aside(opened: Sequence[Opened], skip: bool, aside: list[Aside]) -> list[Opened]:
    first: dict[str, Origin] = {}
    kept: list[Opened] = []
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


def _unlike_set_aside(opened: Sequence[Opened], skip: bool, aside: list[Aside]) -> list[Opened]:
    """Set aside whoever names another base model, or has another shape in a slot, than most of the others."""
    base_models = Counter(base_model for _, base_model in opened if base_model)
    shapes: dict[str, Counter[Hashable]] = {}
    for table, count in Counter(member.maps for member, _ in opened).items():
        for each in table:
            shapes.setdefault(each.path, Counter())[each.identity] += count
    usual_model = base_models.most_common(1)[0][0] if base_models else None
    usual = {path: counter.most_common(1)[0][0] for path, counter in shapes.items()}
    kept: list[Opened] = []
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
