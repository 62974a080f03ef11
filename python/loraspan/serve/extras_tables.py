"""Parameters of many tasks in stacks, found by the tasks' numbers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# in place of a row: a task that has none of its own, and a number that no task has
NONE, GONE = -1, -2
# rows of one stack; which stack it is comes above
_ROWS = 1 << 32
# numbers that there is room for at least
_SPARE = 16


class Held(NamedTuple):
    """What belongs together: read once per call.

    Attributes:
        rows: ``[numbers]`` int64: for each number :data:`NONE`, :data:`GONE` or a place in the stacks.
        stacks: parameters by name, each ``[rows, *shape]``; one stack for each set of shapes.
    """

    rows: Tensor
    stacks: tuple[dict[str, Tensor], ...] = ()

    def places(self, ids: Tensor) -> Tensor:
        """Give the places of numbers; -1, no task, has none, and what is out of range is gone."""
        count = self.rows.shape[0]
        found = self.rows[ids.clamp(0, max(0, count - 1))] if count else torch.full_like(ids, GONE)
        found = torch.where((ids >= count) | (ids < -1), GONE, found)
        return torch.where(ids == -1, NONE, found)

    def at(self, place: int) -> dict[str, Tensor]:
        """Give the parameters at a place, as views."""
        return {name: stack[place % _ROWS] for name, stack in self.stacks[place // _ROWS].items()}


class Shelf:
    """Stacks with room for tasks to come, which doubles: tasks that come are written behind the others, in place.

    A number is found only once its parameters are there. What is swapped for something larger goes on giving what it
    gave; numbers that leave are gone in it too, as a captured graph may still read it.

    Args:
        device: of the stacks.
    """

    def __init__(self, device: torch.device) -> None:
        self.now = Held(torch.full((0,), GONE, dtype=torch.int64, device=device))
        self._used: list[int] = []
        self._old: list[Held] = []

    def write(self, count: int, brought: Mapping[int, Mapping[str, Tensor]], gone: Iterable[int]) -> None:
        """Take parameters of new numbers.

        Args:
            count: all numbers are below it.
            brought: by number, none or some parameters; on the device and of the dtype that they are to have.
            gone: numbers that left.
        """
        rows, stacks = self.now.rows, list(self.now.stacks)
        places = {}
        for number, parameters in brought.items():
            places[number] = NONE
            if parameters:
                at, row = self._row_for(stacks, parameters)
                for name, value in parameters.items():
                    stacks[at][name][row] = value
                places[number] = at * _ROWS + row
        same = len(stacks) == len(self.now.stacks) and all(map(operator.is_, stacks, self.now.stacks))
        grown = count > rows.shape[0] or not same
        if grown:
            # numbers that come are not for the old one, whose stacks may not reach as far
            room = rows.new_full((max(_roomy(count + _SPARE), rows.shape[0]),), GONE)
            room[: rows.shape[0]] = rows
            rows = room
        left = list(gone)
        for table in (rows, self.now.rows, *(old.rows for old in self._old)):
            table[left] = GONE
        for number, place in places.items():
            rows[number] = place
        if grown:
            self._old = [*self._old, self.now] if rows.is_cuda else []
            self.now = Held(rows, tuple(stacks))

    def stop(self) -> None:
        """Let all numbers be gone."""
        for held in (self.now, *self._old):
            held.rows.fill_(GONE)

    def _row_for(self, stacks: list[dict[str, Tensor]], parameters: Mapping[str, Tensor]) -> tuple[int, int]:
        """Give which stack is for parameters of these shapes, and a free row of it, making room in ``stacks``."""
        shapes = {name: value.shape for name, value in parameters.items()}
        known = [{name: held.shape[1:] for name, held in stack.items()} for stack in stacks]
        if shapes not in known:
            known.append(shapes)
            stacks.append({name: value.new_empty(0, *value.shape) for name, value in parameters.items()})
            self._used.append(0)
        at = known.index(shapes)
        row = self._used[at]
        if row == len(next(iter(stacks[at].values()))):
            stacks[at] = {name: _grown(held, row + 1) for name, held in stacks[at].items()}
        self._used[at] = row + 1
        return at, row


def _roomy(count: int) -> int:
    """Give the power of two from a count on."""
    return 1 << max(0, count - 1).bit_length()


def _grown(held: Tensor, count: int) -> Tensor:
    # zeros, since what a graph computes with and throws away is better finite
    room = held.new_zeros(_roomy(count), *held.shape[1:])
    room[: held.shape[0]] = held
    return room
