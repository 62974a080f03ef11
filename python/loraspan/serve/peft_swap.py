"""Another task in a live model of PEFT: weights written in place, nothing compiled again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loraspan._default_device import cpu_by_default
from loraspan.adapters.base import Adapter
from loraspan.adapters.keys import BIAS, PREFIX
from loraspan.adapters.peft_write import contents
from loraspan.collection.collection import Collection
from loraspan.collection.rebuild import rebuild
from loraspan.errors import ArgumentError, MismatchError, ShapeError, UnsupportedError
from loraspan.serve.export import pad
from loraspan.serve.peft import DEFAULT, library_of, live_key


@cpu_by_default
def swap_peft(collection: Collection, model: nn.Module, task: str, *, adapter_name: str = DEFAULT) -> None:
    """Put a task in the place of an adapter of a live PEFT model, through PEFT's own hot swap.

    Weights are written in place, so a compiled model goes on without compiling again: factors are padded with zeros to
    the ranks that the model has, and the scale that its layers have stays (what it would change goes into the factors).
    Modules that the task does not adapt get zeros. The adapter keeps its name, its dropout and its configuration. Not
    for use while another thread runs the model: it would see a part of each task.

    Args:
        collection: what holds the task.
        model: a ``PeftModel``, compiled or not, with LoRA of linear layers and convolutions, best from
            :func:`loraspan.serve.peft.as_peft` with a ``rank``.
        task: its name.
        adapter_name: of the adapter that it replaces.

    Raises:
        UnknownTaskError: if there is no such task.
        ArgumentError: if the model has no such adapter, or its name is a part of other names in the model.
        MismatchError: if the task adapts modules that the adapter does not.
        ShapeError: if the task has more columns somewhere than the model has room for, or the base model is another.
        UnsupportedError: if either has what PEFT does not swap (embeddings, experts, DoRA, heads and other whole
            tensors), layers have different scales, or the adapter is merged. Nothing is changed then.
        BackendError: if PEFT is not installed.

    Example:
        >>> import loraspan, torch
        >>> from loraspan.adapters import Slot
        >>> from loraspan.serve.peft import as_peft
        >>> down, up = torch.eye(2, 8), torch.eye(6, 2)
        >>> adapters = [Adapter(name, {"q": Slot(down, up, scale)}) for name, scale in [("a", 1), ("b", 2)]]
        >>> space = loraspan.compress(adapters, rank=2)
        >>> model = as_peft(space.collection, torch.nn.ModuleDict({"q": torch.nn.Linear(8, 6)}), "a", rank=4)
        >>> swap_peft(space.collection, model, "b")
        >>> round(model.base_model.model.q.get_delta_weight("default")[0, 0].item(), 3)
        2.0
    """
    library = library_of("swap_peft")
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    adapter = rebuild(collection, task)
    plain = getattr(model, "_orig_mod", model)
    layers = _layers(plain, adapter_name)
    scale = _scale(layers, adapter_name)
    _check_name(plain, adapter_name, layers)
    _check_swappable(adapter)
    state = _state(plain, layers, adapter, adapter_name, scale)
    # the scale that the layers have, as one number: patterns are not looked up by the names that have them
    like = library.LoraConfig(r=1, lora_alpha=scale)
    hotswap_adapter_from_state_dict(model, state, adapter_name, like)


def _layers(model: Any, adapter_name: str) -> dict[str, Any]:
    """Give the layers of an adapter that may be swapped, by their names in the live model, or refuse."""
    from peft.tuners.lora import LoraLayer

    known = getattr(model, "peft_config", {})
    if adapter_name not in known:
        raise ArgumentError(
            f"swap_peft: the model needs an adapter {adapter_name!r}; it has {', '.join(map(repr, known)) or 'none'}"
        )
    config = known[adapter_name]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    extra = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    if kind != "LORA" or extra or config.bias != "none":
        what = kind if kind != "LORA" else (extra[0] if extra else f"bias {config.bias!r}")
        raise UnsupportedError(f"swap_peft: adapter {adapter_name!r} of the model has {what}, which PEFT does not swap")
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.scaling
    }
    for path, layer in layers.items():
        if adapter_name not in layer.lora_A or hasattr(layer, "parameter_name"):
            raise UnsupportedError(f"swap_peft: PEFT swaps linear layers and convolutions; {path!r} is neither")
        if adapter_name in layer.merged_adapters:
            raise UnsupportedError(
                f"swap_peft: adapter {adapter_name!r} is merged into {path!r}: call model.unmerge_adapter() first"
            )
    return layers


def _scale(layers: dict[str, Any], adapter_name: str) -> float:
    """Give the scale of all layers."""
    scales: dict[float, str] = {}
    for path, layer in layers.items():
        scales.setdefault(float(layer.scaling[adapter_name]), path)
    if len(scales) != 1 or not all(scales):
        shown = " and ".join(f"{scale:g} at {path!r}" for scale, path in list(scales.items())[:2])
        raise UnsupportedError(
            f"swap_peft: needs layers with one scale that is not 0; got {shown or 'no layers'}: make the model with "
            "as_peft"
        )
    return next(iter(scales))


def _check_name(model: nn.Module, adapter_name: str, layers: Iterable[str]) -> None:
    """PEFT finds an adapter's tensors by its name anywhere in theirs, and sets those to zero that are not swapped."""
    stems = tuple(f"{path}.lora_" for path in layers)
    for key in model.state_dict():
        if "lora_" in key and adapter_name in key and not _is_of(key, stems, adapter_name):
            raise ArgumentError(
                f"swap_peft: the adapter's name {adapter_name!r} is a part of {key!r}, which PEFT would set to zero: "
                "give the adapters names of which none is a part of another"
            )


def _is_of(key: str, stems: tuple[str, ...], adapter_name: str) -> bool:
    return key.startswith(stems) and key.rpartition(".lora_")[2].split(".")[1:2] == [adapter_name]


def _check_swappable(adapter: Adapter) -> None:
    for key in adapter.extras:
        if not key.endswith(BIAS):
            raise UnsupportedError(
                f"swap_peft: task {adapter.name!r} has a tensor {key!r}, which PEFT does not swap: serve it with "
                "loraspan.attach"
            )
    for path, slot in adapter.slots.items():
        if slot.kind not in ("linear", "conv2d"):
            raise UnsupportedError(
                f"swap_peft: PEFT swaps linear layers and convolutions; slot {path!r} of task {adapter.name!r} is of "
                f"kind {slot.kind!r}"
            )


def _state(
    model: nn.Module, layers: Iterable[str], adapter: Adapter, adapter_name: str, scale: float
) -> dict[str, Tensor]:
    """Give all tensors of the adapter in a live model as the task wants them, of the shapes that they have."""
    stems = tuple(f"{path}.lora_" for path in layers)
    live = {key: held for key, held in model.named_parameters() if _is_of(key, stems, adapter_name)}
    slots = {}
    for path, slot in adapter.slots.items():
        down = live.get(f"{PREFIX}{path}.lora_A.{adapter_name}.weight")
        if down is None:
            raise MismatchError(
                f"swap_peft: task {adapter.name!r} adapts {path!r}, and adapter {adapter_name!r} of the model does "
                "not: make the model with a task that adapts all that the others do"
            )
        if slot.lora_rank > down.shape[0]:
            raise ShapeError(
                f"swap_peft: slot {path!r} of task {adapter.name!r} has {slot.lora_rank} columns, and the model room "
                f"for {down.shape[0]}: make the model with as_peft(..., rank={slot.lora_rank}) or more"
            )
        slots[path] = replace(pad(slot, int(down.shape[0])), scale=slot.scale / scale)
    _, tensors = contents(replace(adapter, slots=slots), None)
    state = {key: torch.zeros_like(held) for key, held in live.items()}
    for key, tensor in tensors.items():
        place = live_key(key, adapter_name)
        if place not in live or live[place].shape != tensor.shape:
            found = list(live[place].shape) if place in live else "none"
            raise ShapeError(
                f"swap_peft: task {adapter.name!r} has {key!r} of shape {list(tensor.shape)}, and the model {found}: "
                "is this the task's base model, and the adapter one with the same options?"
            )
        # PEFT scales a bias as it does the factors
        state[place] = tensor / scale if key.endswith(BIAS) else tensor
    return state
