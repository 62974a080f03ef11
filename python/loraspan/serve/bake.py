"""A copy of a model that has one task in its weights, and needs nothing of loraspan to run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor, nn

from loraspan._default_device import cpu_by_default
from loraspan.collection.collection import Collection
from loraspan.collection.rebuild import rebuild
from loraspan.errors import MismatchError, UnsupportedError
from loraspan.serve.bake_plan import Edit, Place, edited, finder, plan

Model = TypeVar("Model", bound=nn.Module)


class Holder(Protocol):
    """What holds a collection: a :class:`loraspan.Subspace`."""

    @property
    def collection(self) -> Collection:
        """Bases and tasks."""
        ...


@cpu_by_default
def bake(
    model: Model,
    space: Holder,
    task: str,
    *,
    paths: Callable[[str], str | None] | None = None,
    share: bool = False,
) -> Model:
    """Give a copy of a model with one task in its weights; the model itself stays as it is, bit for bit.

    ``W + dW`` is summed in float64 (float32 on MPS) from factors in float32, and rounded once to the dtype of ``W``.
    Heads, biases and other modules that the task keeps stand in the copy in place of the base model's; a DoRA's rows
    get their norms.

    Where modules share a parameter, as an embedding and the head of a language model may, only the module that the task
    adapts is changed, as PEFT computes before it merges (its ``merge_and_unload`` changes both). The copy has a
    parameter of its own there, and a transformers config says so (``tie_word_embeddings = False``), so that it is saved
    and loaded as it is. Trained tokens (``trainable_token_indices``) change in both, as PEFT trains them.

    Args:
        model: the base model, in floats: quantized weights are refused.
        space: what holds the task.
        task: its name.
        paths: gives the model's path of a module for an adapter's, as for :func:`loraspan.attach`.
        share: share the memory of parameters that the task leaves alone with ``model``, which then takes no more than
            the adapted ones. Whoever writes into one of those in place (an optimizer does) writes into both models;
            moving or converting one of them is safe. False copies everything.

    Returns:
        A model of the same class, on the same device, in the same mode.

    Raises:
        UnknownTaskError: if there is no such task.
        MismatchError: if the model lacks a module that the task adapts, or has it under two names.
        ShapeError: if shapes differ.
        UnsupportedError: if an adapted weight is quantized or computed.
        NotFiniteError: if a weight overflows its dtype.

    Example:
        >>> import loraspan, torch
        >>> from loraspan.adapters import Adapter, Slot
        >>> space = loraspan.compress([Adapter("sql", {"0": Slot(torch.ones(1, 3), torch.ones(2, 1), 0.5)})], rank=1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> baked = bake(model, space, "sql")
        >>> torch.allclose(baked[0].weight - model[0].weight, torch.full((2, 3), 0.5))
        True
    """
    adapter = rebuild(space.collection, task)
    edits = plan(model, adapter, finder(model, paths))
    _check_once(model, {path for path, _ in edits})
    before = {place: _tensor(model, place) for place in edits}
    after = {place: edited(edit, before[place], ".".join(place)) for place, edit in edits.items()}
    return _copy_with(model, edits, after, share)


def _check_once(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse modules that the model has under several names: PEFT adapts them under one of those."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for path in paths:
        same = names[id(model.get_submodule(path))]
        if len(same) > 1:
            raise MismatchError(
                f"bake: the model has one module under the names {', '.join(map(repr, same[:3]))}, and the task adapts "
                f"{path!r}: give it a module of its own there (copy.deepcopy) first"
            )


def _tensor(model: nn.Module, place: Place) -> Tensor:
    found: Tensor = getattr(model.get_submodule(place[0]), place[1])
    return found


def _copy_with(model: Model, edits: Mapping[Place, Edit], after: Mapping[Place, Tensor], share: bool) -> Model:
    """Copy a model and put new parameters in it, without a copy of those that they replace."""
    places: dict[int, list[Place]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((path, name))
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        here = places[id(parameter)]
        changed = [place for place in here if place in edits]
        ties = [edits[place].tied for place in changed]
        if (len(changed) > 1 and any(ties)) or (len(here) > 1 and None in ties):
            raise UnsupportedError(
                f"bake: {' and '.join('.'.join(place) for place in here)} are one parameter in the model, and the task "
                "changes one of them in a way that is meant for all: give the model parameters of their own there first"
            )
        if changed and (len(here) == 1 or edits[changed[0]].tied):
            memo[id(parameter)] = _parameter(after[changed[0]], parameter)
        elif share and type(parameter) is nn.Parameter:
            memo[id(parameter)] = _parameter(parameter.detach(), parameter)
    baked = copy.deepcopy(model, memo)
    untied = False
    for place, value in after.items():
        old = _tensor(model, place)
        module = baked.get_submodule(place[0])
        if not isinstance(old, nn.Parameter):
            module._buffers[place[1]] = value
        elif len(places[id(old)]) > 1 and not edits[place].tied:
            module._parameters[place[1]] = _parameter(value, old)
            untied = True
    if untied:
        _untie(baked)
    return baked


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=like.requires_grad)


def _untie(model: nn.Module) -> None:
    """Say in the configs of a transformers model that nothing ties its embeddings now."""
    for module in model.modules():
        config = getattr(module, "config", None)
        text: Callable[[], object] | None = getattr(config, "get_text_config", None)
        for each in (config, text() if callable(text) else None):
            if getattr(each, "tie_word_embeddings", False) is True:
                each.tie_word_embeddings = False  # type: ignore[union-attr]
