"""Names of tasks, one per row or token, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loraspan.errors import ArgumentError
from loraspan.serve.rows import Rows

# of one row or token: a task, none, or several with weights
Name: TypeAlias = str | Mapping[str, float] | None
Names: TypeAlias = Name | Sequence[Name] | Sequence[Sequence[Name]]
Number: TypeAlias = Callable[[str | None], int]
# of weights, which are float32
_LARGEST = torch.finfo(torch.float32).max


def key_of(names: Names, per: str) -> Hashable:
    """Give what tells a batch of names from others.

    Raises:
        ArgumentError: if the names have another form.
    """
    return per, _key(names)


def _key(names: object) -> Hashable:
    if isinstance(names, Mapping):
        return Mapping, *((task, _key(share)) for task, share in names.items())
    if isinstance(names, (list, tuple)):
        return tuple(map(_key, names))
    if not isinstance(names, Hashable):
        raise ArgumentError(f"tasks: needs names of tasks, None, dicts of names and weights, or lists; got {names!r}")
    return names


def plain_numbers(names: object, numbers: Mapping[str, int]) -> tuple[int, ...] | None:
    """Give the numbers of a list of names that are all known, None for anything else: a look for each is all it takes.

    Args:
        names: anything.
        numbers: of the tasks that are served.

    Example:
        >>> plain_numbers(["b", None], {"a": 0, "b": 1}), plain_numbers(["c"], {"a": 0}), plain_numbers("a", {"a": 0})
        ((1, -1), None, None)
    """
    if not isinstance(names, (list, tuple)):
        return None
    try:
        return tuple([-1 if name is None else numbers[name] for name in names])
    except (KeyError, TypeError):
        # unknown, or a mixture, which has no hash
        return None


def rows_of_numbers(numbers: tuple[int, ...]) -> Rows | None:
    """Give the tasks of a batch with a number per row, None if there is none in it."""
    return Rows(torch.tensor(numbers, device="cpu")) if max(numbers) >= 0 else None


def rows_of_names(names: Names, per: str, number: Number) -> Rows | None:
    """Give the tasks of a batch, None if there is none in it.

    Args:
        names: as :meth:`Attached.tasks` takes them.
        per: ``"row"`` or ``"token"``.
        number: gives a task's.

    Raises:
        ArgumentError: if the names have another form.

    Example:
        >>> rows = rows_of_names(["a", {"a": 0.5, "b": 2}], "row", {"a": 0, "b": 1, None: -1}.__getitem__)
        >>> rows.ids.tolist(), rows.shares.tolist()
        ([[0, -1], [0, 1]], [[1.0, 0.0], [0.5, 2.0]])
    """
    if per not in ("row", "token"):
        raise ArgumentError(f"tasks: per is 'row' or 'token'; got {per!r}")
    if names is None or isinstance(names, (str, Mapping)):
        names, per = [names], "row"
    lines: Sequence[Any] = [names] if per == "row" else names
    if not all(isinstance(line, (list, tuple)) and line for line in lines) or len({len(line) for line in lines}) != 1:
        wanted = "a list with one per row" if per == "row" else "a list of such lists, one per row, of one length"
        raise ArgumentError(f"tasks: needs a name, None or a dict of names and weights, or {wanted}; got {names!r}")
    flat = [_members(name, number) for line in lines for name in line]
    if all(task < 0 for members in flat for task, _ in members):
        return None
    shape = (len(lines), len(lines[0])) if per == "token" else (len(flat),)
    if all(len(members) == 1 and members[0][1] == 1 for members in flat):
        return Rows(torch.tensor([members[0][0] for members in flat], device="cpu").reshape(shape), None, per)
    most = max(map(len, flat))
    filled = [members + [(-1, 0.0)] * (most - len(members)) for members in flat]
    ids = torch.tensor([[task for task, _ in members] for members in filled], device="cpu")
    shares = torch.tensor([[share for _, share in members] for members in filled], dtype=torch.float32, device="cpu")
    return Rows(ids.reshape(*shape, most), shares.reshape(*shape, most), per)


def ids_of_names(names: object, number: Number) -> Tensor:
    """Give ``[1]`` of one name, ``[B]`` of a list, ``[B, T]`` of lists of one length: int64.

    Raises:
        ArgumentError: if the names have another form.
    """
    if names is None or isinstance(names, str):
        names = [names]
    nested = isinstance(names, (list, tuple)) and any(isinstance(line, (list, tuple)) for line in names)
    lines = names if nested else [names]
    if not isinstance(lines, (list, tuple)) or not all(isinstance(line, (list, tuple)) for line in lines):
        raise ArgumentError(f"ids: needs a name, a list of names, or a list of lists of one length; got {names!r}")
    if len({len(line) for line in lines}) != 1 or any(
        not isinstance(name, str) and isinstance(name, Mapping) for line in lines for name in line
    ):
        raise ArgumentError(
            f"ids: lists need one length, and a mixture is numbers on another axis, beside task_shares; got {names!r}"
        )
    numbers = torch.tensor([[number(name) for name in line] for line in lines], dtype=torch.int64, device="cpu")
    return numbers if nested else numbers[0]


def _members(name: object, number: Number) -> list[tuple[int, float]]:
    if name is None or isinstance(name, str):
        return [(number(name), 1.0)]
    if not isinstance(name, Mapping) or not name or not all(map(_is_weight, name.values())):
        raise ArgumentError(
            f"tasks: a row or token has the name of a task, None, or a dict from names to finite weights; got {name!r}"
        )
    return [(number(task), float(share)) for task, share in name.items()]


def _is_weight(share: object) -> bool:
    return isinstance(share, (int, float)) and abs(share) <= _LARGEST
