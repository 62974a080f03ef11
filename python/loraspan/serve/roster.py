"""The numbers of a space's tasks, and the models that are told when tasks come and go."""

from __future__ import annotations

import weakref
from collections.abc import Collection as Names
from collections.abc import Iterable, Mapping
from typing import Protocol

from loraspan.collection.collection import Collection
from loraspan.errors import ArgumentError
from loraspan.serve.state import State


class Follower(Protocol):
    """What is told of changes: an attached model."""

    def may_change(self, operator: str) -> None:
        """Raise if the space may not change now."""

    def follow(self, state: State) -> None:
        """Serve another state."""


class Roster:
    """Numbers of tasks: each that ever lived has its own, kept when it is renamed or refitted, and never used again.

    Args:
        collection: of the space now; its tasks get the first numbers.
    """

    def __init__(self, collection: Collection) -> None:
        names = [task.name for task in collection.tasks]
        # of all numbers the last name of their task
        self.names = names
        self.state = State(collection, {name: i for i, name in enumerate(names)}, len(names))
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()

    def join(self, follower: Follower) -> None:
        """Tell a model of changes, as long as someone else holds it."""
        self._followers.add(follower)

    def leave(self, follower: Follower) -> None:
        """Tell it no more."""
        self._followers.discard(follower)

    def may_change(self, operator: str, *, by: Follower | None = None) -> None:
        """Ask all models whether the space may change, but for the one, if any, that the change comes from.

        Raises:
            ArgumentError: if one is being trained.
        """
        for follower in list(self._followers):
            if follower is not by:
                follower.may_change(operator)

    def planned(
        self, before: Collection, after: Collection, renamed: Mapping[str, str], kept: Names[str] = ()
    ) -> State:
        """Number the tasks of a changed collection.

        Args:
            before: the collection of this roster's state.
            after: the collection it is to become, made of it.
            renamed: old names to new ones.
            kept: names of tasks that are the same with other columns, which were trained.
        """
        refitted = any(after.slots.get(path) is not space for path, space in before.slots.items())
        old = {renamed.get(name, name): number for name, number in self.state.numbers.items()}
        stays = {renamed.get(task.name, task.name): task for task in before.tasks}
        numbers, rows = {}, self.state.rows
        for task in after.tasks:
            was = stays.get(task.name)
            # a task that came in the place of one of its name is another
            same = was is not None and (refitted or was is task or task.name in renamed.values() or task.name in kept)
            numbers[task.name] = old[task.name] if same else rows
            rows += not same
        return State(after, numbers, rows, self.state.fitted + (refitted or bool(kept)))

    def become(self, state: State) -> None:
        """Take a new state, and tell all models.

        Raises:
            Exception: the first that a model raised, once all are told; that model serves nothing any more.
        """
        self.names += [""] * (state.rows - len(self.names))
        for name, number in state.numbers.items():
            self.names[number] = name
        self.state = state
        errors = []
        for follower in list(self._followers):
            try:
                follower.follow(state)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def number(self, name: object) -> int:
        """Give the number of a task, -1 for None.

        Raises:
            UnknownTaskError: if there is no such task.
        """
        if name is None:
            return -1
        if isinstance(name, str) and (number := self.state.numbers.get(name)) is not None:
            return number
        if isinstance(name, str):
            self.state.collection.find(name)
        raise ArgumentError(f"ids: needs names of tasks, or None; got {name!r}")

    def told(self, numbers: Iterable[int]) -> str:
        """Describe numbers that no task has, for an error."""
        known = len(self.names)
        return ", ".join(f"{n} (was {self.names[n]!r})" if 0 <= n < known else str(n) for n in numbers)
