"""Tasks of a collection as adapters in a model of PEFT, without a file."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraspan._default_device import cpu_by_default
from loraspan.adapters.base import Adapter
from loraspan.adapters.peft_write import contents
from loraspan.collection.collection import Collection
from loraspan.collection.rebuild import rebuild
from loraspan.errors import ArgumentError, BackendError, LoraspanError, MismatchError, UnsupportedError
from loraspan.serve.export import pad

if TYPE_CHECKING:
    import peft

DEFAULT = "default"
# what PEFT tells an adapter's tensors by
_PARTS = ("weight", "bias", "base_layer", "original_module", "modules_to_save")


@cpu_by_default
def as_peft(
    collection: Collection, model: nn.Module, tasks: str | Sequence[str] | Mapping[str, str], *, rank: int | None = None
) -> peft.PeftModel:
    """Give a ``PeftModel`` with tasks of a collection as its adapters; no file is written.

    As with PEFT itself, the layers of ``model`` are wrapped in place (``unload()`` gives them back), and its parameters
    take no gradients from then on. The result is in ``eval`` mode.

    Args:
        collection: what holds the tasks.
        model: the base model, without adapters.
        tasks: a name, for an adapter called ``"default"``; several, for adapters of their names; or a dict from names
            of adapters to those of tasks, since PEFT cannot call an adapter everything that a task may be called. The
            first is active.
        rank: pad all factors with zeros to this rank, so that tasks with as many columns may be swapped in later
            (:func:`loraspan.serve.peft_swap.swap_peft`). None keeps what each slot has.

    Raises:
        UnknownTaskError: if there is no such task.
        ArgumentError: if an adapter cannot be called so, no task is named, or one has more columns than ``rank``.
        MismatchError: if the model lacks a module of a task, or PEFT does not load all of it. The model is as it was.
        UnsupportedError: if the model has adapters already, or several tasks cannot be in one model.
        BackendError: if PEFT is not installed.

    Example:
        >>> import loraspan, torch
        >>> from loraspan.adapters import Adapter, Slot
        >>> space = loraspan.compress([Adapter("sql", {"q": Slot(torch.eye(2, 8), torch.eye(6, 2), 0.5)})], rank=2)
        >>> model = as_peft(space.collection, torch.nn.ModuleDict({"q": torch.nn.Linear(8, 6)}), "sql")
        >>> round(model.base_model.model.q.get_delta_weight("default")[0, 0].item(), 3)
        0.5
    """
    library = library_of("as_peft")
    named = _named(tasks)
    if any(hasattr(module, "base_layer") or hasattr(module, "peft_config") for module in model.modules()):
        raise UnsupportedError("as_peft: the model has adapters already: give it the base model (PEFT: model.unload())")
    adapters = {name: _padded(rebuild(collection, task), rank) for name, task in named.items()}
    modules = {name for name, _ in model.named_modules()}
    for adapter in adapters.values():
        _check(adapter, modules, alone=len(adapters) == 1)
    made: Any = model
    with _as_it_was(model):
        for name, adapter in adapters.items():
            try:
                made = _add(library, made, name, adapter)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                if isinstance(error, LoraspanError):
                    raise
                raise MismatchError(f"as_peft: PEFT cannot load task {adapter.name!r}: {error}") from error
        made.set_adapter(next(iter(adapters)))
    made.requires_grad_(False)
    found: peft.PeftModel = made.eval()
    return found


def library_of(function: str) -> Any:
    """Give PEFT, imported when it is used.

    Raises:
        BackendError: if it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise BackendError(f"{function}: needs PEFT: pip install peft") from error
    return peft


def live_key(key: str, adapter_name: str) -> str:
    """Give the name that a tensor of a file has in a live model.

    Example:
        >>> live_key("base_model.model.q.lora_A.weight", "sql"), live_key("base_model.model.e.lora_embedding_A", "sql")
        ('base_model.model.q.lora_A.sql.weight', 'base_model.model.e.lora_embedding_A.sql')
    """
    path, _, rest = key.rpartition(".lora_")
    role, _, last = rest.partition(".")
    # a file has a vector where the model has a module
    last = "weight" if role == "magnitude_vector" else last
    return f"{path}.lora_{role}.{adapter_name}" + (f".{last}" if last else "")


def _named(tasks: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(tasks, str):
        return {DEFAULT: tasks}
    named = dict(tasks) if isinstance(tasks, Mapping) else {task: task for task in tasks}
    if not named:
        raise ArgumentError("as_peft: needs at least one task; got none")
    for name in named:
        # adapters are kept in a ModuleDict, whose own attributes are taken
        taken = not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name)
        if taken or "lora_" in name or name in _PARTS:
            raise ArgumentError(
                f"as_peft: PEFT cannot call an adapter {str(name)[:200]!r}: give a dict from a name to the task, such "
                "as {'one': task}"
            )
    return named


def _padded(adapter: Adapter, rank: int | None) -> Adapter:
    slots = {}
    for path, slot in adapter.slots.items():
        if rank is not None and slot.lora_rank > rank:
            raise ArgumentError(
                f"as_peft: rank has to be at least {slot.lora_rank}, the columns of slot {path!r} of task "
                f"{adapter.name!r}; got {rank}"
            )
        slots[path] = pad(slot, rank or max(slot.lora_rank, 1))
    return replace(adapter, slots=slots)


def _check(adapter: Adapter, modules: Iterable[str], *, alone: bool) -> None:
    """Every slot has a module, since PEFT leaves out what it does not find; and a task may be with others."""
    for path, slot in adapter.slots.items():
        if slot.kind != "expert" and path not in modules:
            raise MismatchError(f"as_peft: the model has no module {path!r}, which task {adapter.name!r} adapts")
    bias = adapter.config.get("bias")
    if not alone and bias not in (None, "none"):
        raise UnsupportedError(
            f"as_peft: task {adapter.name!r} has bias {bias!r}, which changes the biases of the base model itself: "
            "PEFT takes it alone"
        )


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Take a model apart again if the body fails: its modules in their places, and what of it takes gradients."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, had in children:
            module._modules.clear()
            module._modules.update(had)
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)
        raise


def _add(library: Any, model: nn.Module, name: str, adapter: Adapter) -> Any:
    """Add an adapter, load it, and see that it is there."""
    fields, tensors = contents(adapter, None)
    config = library.LoraConfig(**{key: value for key, value in fields.items() if key != "peft_type"})
    with warnings.catch_warnings():
        # advice on models whose ends are tied, and on how they are saved
        warnings.simplefilter("ignore")
        if isinstance(model, library.PeftModel):
            made: Any = model
            made.add_adapter(name, config)
        else:
            made = library.get_peft_model(model, config, adapter_name=name)
        result = library.set_peft_model_state_dict(made, tensors, adapter_name=name)
    live: dict[str, Tensor] = made.state_dict()
    for key, tensor in tensors.items():
        if ".lora_" not in key:
            continue
        found = live.get(live_key(key, name))
        if found is None or found.shape != tensor.shape or not torch.equal(found.cpu(), tensor.to(found.dtype)):
            raise MismatchError(f"as_peft: PEFT did not load {key!r} of task {adapter.name!r} as it is")
    # PEFT writes the biases of its own wrappers, and loads them under another name
    lost = [key for key in result.unexpected_keys if ".original_module." not in key and ".modules_to_save." not in key]
    if lost:
        raise MismatchError(f"as_peft: PEFT found no place for {lost[0]!r} of task {adapter.name!r} in the model")
    return made
