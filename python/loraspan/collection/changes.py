"""What a change does to a space, in numbers: what every changing call gives back, and ``dry_run`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loraspan.collection.collection import Collection


@dataclass(frozen=True)
class Change:
    """What a call changed, or with ``dry_run`` would change. ``str()`` of it is text, ``as_dict()`` plain values.

    Attributes:
        what: the change in words: "add sql".
        tasks: number of tasks before and after.
        nbytes: bytes on disk before and after.
        worst_error: largest error of any task before and after, 0 without tasks.
        added: names of tasks that came, each with its error. One that was replaced came and left.
        removed: names of tasks that left.
        refitted: whether the bases are new.
        forgotten: the most that any task lost to this change, relative to its ``dW``.
        dry_run: whether nothing was done.
    """

    what: str
    tasks: tuple[int, int]
    nbytes: tuple[int, int]
    worst_error: tuple[float, float]
    added: Mapping[str, float]
    removed: tuple[str, ...]
    refitted: bool
    forgotten: float
    dry_run: bool

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        (tasks, now), (before, after), (old, new) = self.tasks, self.nbytes, self.worst_error
        lines = [
            f"{self.what}: {'would change' if self.dry_run else 'changed'} tasks {tasks} to {now}, "
            f"bytes {before:,} to {after:,} ({after - before:+,}), worst error {old:.3g} to {new:.3g}."
        ]
        if self.refitted:
            lines.append(f"New bases: no task loses more than {self.forgotten:.3g} of its dW.")
        return "\n".join(lines)


def compare(
    what: str, before: Collection, after: Collection, nbytes: tuple[int, int], *, dry_run: bool = False
) -> Change:
    """Give what lies between two collections of ``nbytes``."""
    old, new = before.places, after.places
    refitted = any(after.slots[path] is not space for path, space in before.slots.items() if path in after.slots)
    # a refit touches every task; without one, another object of a name is another task
    changed = set() if refitted else {t.name for t in after.tasks if t.name in old and before.task(t.name) is not t}
    came = {task.name: task.error for task in after.tasks if task.name not in old or task.name in changed}
    left = tuple(task.name for task in before.tasks if task.name not in new or task.name in changed)
    lost = [after.task(t.name).forgotten - t.forgotten for t in before.tasks if t.name in new] if refitted else []
    return Change(
        what=what,
        tasks=(len(before.tasks), len(after.tasks)),
        nbytes=nbytes,
        worst_error=(_worst(before), _worst(after)),
        added=came,
        removed=left,
        refitted=refitted,
        forgotten=max(lost, default=0.0),
        dry_run=dry_run,
    )


def _worst(collection: Collection) -> float:
    return max((task.error for task in collection.tasks), default=0.0)
