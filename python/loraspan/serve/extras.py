"""What tasks bring beside their factors (heads, biases, saved modules): where it belongs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraspan.collection.collection import Task
from loraspan.errors import UnsupportedError
from loraspan.serve.extras_keys import LORA_BIAS, Key, lora_path, parts_of
from loraspan.serve.extras_layer import ServedExtras
from loraspan.serve.extras_modules import refusal, same, tensors_of
from loraspan.serve.match import Modules
from loraspan.serve.state import State
from loraspan.serve.unserved import refuse_module

__all__ = ["Plan", "ServedExtras", "plan"]

Paths = Callable[[str], str | None]


class Plan(NamedTuple):
    """Which modules need a :class:`ServedExtras`, and which tasks cannot be served.

    Attributes:
        paths: modules of the model for which some task brings parameters, each with its path in the adapters' files.
        refused: tasks, and why.
    """

    paths: dict[str, str]
    refused: dict[str, str]


def plan(state: State, modules: Modules, paths: Paths | None = None) -> Plan:
    """Say what the extras of all tasks are for.

    Args:
        state: the tasks.
        modules: of the model, as they were before any was replaced.
        paths: gives the model's path of a module for an adapter's, as for :func:`loraspan.attach`.

    Returns:
        The modules, and for each task with an extra that cannot be served the reason: a DoRA's magnitude, trained
        tokens, or a parameter that the model does not have in that shape. Nothing is ignored.
    """
    found: dict[str, str] = {}
    refused: dict[str, str] = {}
    places: dict[str, str | None] = {}
    known: dict[tuple[Any, ...], str | None] = {}
    for task in state.collection.tasks:
        parts = parts_of(tuple(task.extras))
        reason = parts.refused or ("it is a DoRA, of which the magnitudes are gone" if _is_dora(task) else None)
        for path in parts.modules:
            if path not in places:
                places[path] = _find(modules, path, paths)
        for path, parameters in parts.modules.items():
            brought = {parameter: task.extras[keys[0].name] for parameter, keys in parameters.items()}
            forms = tuple((parameter, value.shape, value.dtype) for parameter, value in brought.items())
            for parameter, keys in parameters.items():
                if reason is None:
                    what = (path, parameter, forms)
                    if what not in known:
                        known[what] = _refusal(modules, places[path], parameter, keys[0], brought)
                    reason = known[what] or _clash(modules, places[path], parameter, keys, task)
        if reason is not None:
            refused[task.name] = reason
            continue
        found |= {where: path for path in parts.modules if (where := places[path]) is not None}
    return Plan(found, refused)


def _is_dora(task: Task) -> bool:
    return bool(task.config.get("use_dora"))


def _find(modules: Modules, path: str, paths: Paths | None) -> str | None:
    given = None if paths is None else paths(path)
    found = [given] if given is not None else modules.candidates(path)
    return found[0] if len(found) == 1 and found[0] in modules.by_path else None


def _refusal(
    modules: Modules, where: str | None, parameter: str, key: Key, brought: Mapping[str, Tensor]
) -> str | None:
    """Say why a parameter of this form cannot be served, whatever its values, if so."""
    if where is None:
        return f"the model has no module for its tensor {key.name!r}"
    try:
        refuse_module(modules, where)
    except UnsupportedError as error:
        return f"its tensor {key.name!r} has no place: {error}"
    why = refusal(modules.by_path[where], parameter, brought)
    return None if why is None else f"its tensor {key.name!r} does not fit module {where!r}: {why}"


def _clash(modules: Modules, where: str | None, parameter: str, keys: list[Key], task: Task) -> str | None:
    """Say what of the values cannot be served."""
    values = [task.extras[key.name] for key in keys]
    if any(not torch.equal(values[0], other) for other in values[1:]):
        return f"its tensors {', '.join(repr(key.name) for key in keys)} are one parameter, and differ"
    if parameter == LORA_BIAS:
        return None if lora_path(keys[0]) in task.scales else f"its tensor {keys[0].name!r} has no factors beside it"
    assert where is not None
    base = tensors_of(modules.by_path[where])[parameter]
    if not keys[0].in_base or same(values[0], base):
        return None
    shared = [
        path
        for path, module in modules.by_path.items()
        if module is not modules.by_path[where] and any(held is base for held in tensors_of(module).values())
    ]
    if not shared:
        return None
    return (
        f"its tensor {keys[0].name!r} is not the model's own, which {', '.join(map(repr, shared))} has too, and PEFT "
        f"would change all of them"
    )
