"""What a task changes in the parameters of a model: where each change goes, and what the parameter becomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loraspan.adapters import experts
from loraspan.adapters.base import Adapter, Slot
from loraspan.adapters.keys import BIAS, MAGNITUDE, PREFIX
from loraspan.adapters.peft_write import original_scale
from loraspan.errors import MismatchError, NotFiniteError, ShapeError, UnsupportedError
from loraspan.serve.match import Modules

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_NUMBERED = re.compile(r"(.+)\[(\d+)\]")
# entries that are widened at once
_CHUNK = 2**22

Place = tuple[str, str]
View = Callable[[Tensor], Tensor]


@dataclass
class Edit:
    """What one parameter becomes: ``value`` in its place or its own, some rows of that replaced, and sums added.

    Attributes:
        value: in place of the parameter.
        rows: indices, and the rows that stand there instead.
        added: slots whose ``dW`` is added, each with the view of the parameter that has its shape ``[n, d]`` and, of a
            DoRA, the norms ``[n]`` that its rows get then.
        bias: a vector that is added.
        tied: whether the change is meant for all modules that share the parameter; None if it cannot be told.
    """

    value: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None
    added: list[tuple[Slot, View, Tensor | None]] = field(default_factory=list)
    bias: Tensor | None = None
    tied: bool | None = False


def plan(model: nn.Module, adapter: Adapter, at: Callable[[str], str]) -> dict[Place, Edit]:
    """Give what each parameter becomes, by module path and name; nothing of the model is touched.

    Args:
        model: whose parameters they are.
        adapter: the task, with factors of scale 1.
        at: gives the module path in the model for one of the adapter's.

    Raises:
        MismatchError: if the model has no such module or parameter.
        ShapeError: if shapes differ.
        UnsupportedError: if a base weight is quantized or computed.
    """
    edits: dict[Place, Edit] = {}
    magnitudes: dict[str, Tensor] = {}
    for key, value in adapter.extras.items():
        if key.endswith(MAGNITUDE):
            magnitudes[key.removeprefix(PREFIX).removesuffix(MAGNITUDE)] = value.flatten()
        else:
            _put_extra(edits, model, adapter, key, value, at)
    targets = adapter.config.get("target_parameters") or []
    for path, slot in adapter.slots.items():
        place, view = _expert(model, path, targets, at) if slot.kind == "expert" else _whole(model, path, slot, at)
        weight = _plain(model, place, path)
        seen = view(weight)
        if tuple(seen.shape) != slot.shape:
            raise ShapeError(
                f"bake: slot {path!r} of task {adapter.name!r} has shape {list(slot.shape)}, and {'.'.join(place)} in "
                f"the model {list(seen.shape)}: is this the task's base model?"
            )
        magnitude = magnitudes.pop(path, None)
        if magnitude is not None and len(magnitude) != slot.shape[0]:
            raise ShapeError(
                f"bake: the magnitude of {path!r} has {len(magnitude)} entries for {slot.shape[0]} outputs"
            )
        edit = edits.setdefault(place, Edit())
        if edit.added and slot.kind != "expert":
            raise MismatchError(f"bake: {path!r} and another slot of task {adapter.name!r} are both {'.'.join(place)}")
        edit.added.append((slot, view, magnitude))
    if magnitudes or (adapter.config.get("use_dora") and not adapter.extras):
        raise MismatchError(f"bake: task {adapter.name!r} is a DoRA, with magnitudes that are not those of its slots")
    return edits


def edited(edit: Edit, weight: Tensor, what: str) -> Tensor:
    """Give what a parameter becomes: sums in float64 (float32 on MPS), each entry rounded once.

    Raises:
        NotFiniteError: if an entry leaves the range of the parameter's dtype.
    """
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    start = weight if edit.value is None else edit.value.to(weight.device)
    out = start.detach().to(weight.dtype, copy=True)
    if edit.rows is not None:
        out[edit.rows[0].to(weight.device)] = edit.rows[1].to(weight.device, weight.dtype)
    for slot, view, magnitude in edit.added:
        _add(view(out), view(start.detach() if edit.rows is None else out), slot, magnitude, wide)
    if edit.bias is not None:
        out = (start.detach().to(wide) + edit.bias.to(weight.device, wide)).to(weight.dtype)
    if not bool(torch.isfinite(out).all()):
        raise NotFiniteError(f"bake: {what} would hold an infinity or a NaN in {weight.dtype}")
    return out


def _add(out: Tensor, base: Tensor, slot: Slot, magnitude: Tensor | None, wide: torch.dtype) -> None:
    """Write ``base + dW`` to ``out``, all ``[n, d]``, some rows at a time; with the norms of a DoRA, if it is one."""
    down = slot.scale * slot.down.to(out.device, wide)
    rows = max(1, _CHUNK // max(out.shape[1], 1))
    for first in range(0, out.shape[0], rows):
        part = slice(first, first + rows)
        total = base[part].to(wide) + slot.up[part].to(out.device, wide) @ down
        if magnitude is not None:
            total *= (magnitude[part].to(out.device, wide) / torch.linalg.vector_norm(total, dim=1))[:, None]
        out[part] = total.to(out.dtype)


def _whole(model: nn.Module, path: str, slot: Slot, at: Callable[[str], str]) -> tuple[Place, View]:
    """The weight of a module, and how to see it as ``[n, d]``."""
    module = _module(model, at(path), path)
    kind = slot.kind
    if kind == "linear" and isinstance(module, nn.Linear):
        return (at(path), "weight"), lambda weight: weight
    if (kind == "linear" and is_conv1d(module)) or (kind == "embedding" and isinstance(module, nn.Embedding)):
        return (at(path), "weight"), lambda weight: weight.T
    if kind == "conv2d" and isinstance(module, nn.Conv2d):
        return (at(path), "weight"), lambda weight: weight.view(weight.shape[0], -1)
    found = f"{type(module).__module__}.{type(module).__name__}"
    raise UnsupportedError(
        f"bake: slot {path!r} is of kind {kind!r}, and {at(path)!r} in the model is a {found}; "
        "it takes torch's Linear, Embedding and Conv2d and transformers' Conv1D. Load the base model without "
        "quantization, and without the layers of PEFT or of an attached space around it"
    )


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' ``Conv1D``, whose weight is ``[d, n]``; transformers is not imported."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).mro()
    )


def _expert(model: nn.Module, path: str, targets: list[str], at: Callable[[str], str]) -> tuple[Place, View]:
    """One expert of a stacked parameter, and how to see it as ``[n, d]``."""
    match = _NUMBERED.fullmatch(path)
    assert match is not None
    file_path, number = experts.file_path_of(match[1], targets), int(match[2])
    outer = file_path
    while outer.endswith(".base_layer"):
        outer = outer.removesuffix(".base_layer")
    where = at(outer)
    module = _module(model, where, path)
    wrapped = {name.rpartition(".")[2] for name in experts.parameters_of(file_path, targets)}
    # the first that the module registered is the innermost
    names = [name for name in module._parameters if name in wrapped]
    depth = file_path.count(".base_layer") - outer.count(".base_layer")
    if depth >= len(names):
        raise MismatchError(
            f"bake: slot {path!r} needs a parameter {' or '.join(sorted(wrapped)) or 'of its target_parameters'} in "
            f"{where!r}; it has {', '.join(module._parameters) or 'none'}"
        )
    name = names[len(names) - 1 - depth]
    parameter = module._parameters[name]
    assert parameter is not None
    if parameter.ndim != 3 or number >= parameter.shape[0]:
        raise ShapeError(f"bake: slot {path!r} needs a parameter of experts; {where}.{name} is {list(parameter.shape)}")
    # [experts, d, n] where the module says so, else [experts, n, d]
    turned = bool(getattr(module, "is_transposed", False))
    return (where, name), lambda weight: weight[number].T if turned else weight[number]


def _put_extra(
    edits: dict[Place, Edit], model: nn.Module, adapter: Adapter, key: str, value: Tensor, at: Callable[[str], str]
) -> None:
    """Put a tensor that lies beside the factors where PEFT would load it."""
    path = key.removeprefix(PREFIX)
    if path.endswith(BIAS):
        module = path.removesuffix(BIAS)
        edit, had = _edit(edits, model, adapter, key, (at(module), "bias"))
        edit.bias = value.double() * original_scale(adapter, module)
        _check_shape(key, value.shape, had.shape)
        return
    if path.endswith(_TOKENS):
        _put_tokens(edits, model, adapter, key, value, at)
        return
    # with bias="all" PEFT writes the biases of its wrapper too, and loads neither
    plain = key.replace(".modules_to_save.", ".")
    if ".original_module." in key or (plain != key and plain in adapter.extras):
        return
    module, _, name = plain.removeprefix(PREFIX).rpartition(".")
    edit, had = _edit(edits, model, adapter, key, (at(module.replace(".base_layer", "")), name))
    _check_shape(key, value.shape, had.shape)
    if ".base_layer." not in plain:
        edit.value = value
    elif not torch.equal(value.to(had.device, had.dtype), had):
        # PEFT loads it into the base model itself, and so into what shares it
        edit.value, edit.tied = value, None


def _put_tokens(
    edits: dict[Place, Edit], model: nn.Module, adapter: Adapter, key: str, value: Tensor, at: Callable[[str], str]
) -> None:
    path = key.removeprefix(PREFIX).removesuffix(_TOKENS)
    tokens = adapter.config.get("trainable_token_indices")
    if isinstance(tokens, Mapping):
        fitting = [given for name, given in tokens.items() if path == name or path.endswith(f".{name}")]
        tokens = fitting[0] if len(fitting) == 1 else None
    edit, had = _edit(edits, model, adapter, key, (at(path), "weight"))
    whole = isinstance(tokens, list) and all(type(token) is int and 0 <= token < had.shape[0] for token in tokens)
    if not whole or value.shape != (len(tokens or []), *had.shape[1:]):
        raise ShapeError(
            f"bake: {key!r} of task {adapter.name!r} needs one row for each of trainable_token_indices, of {path!r} "
            f"with shape {list(had.shape)}; got {list(value.shape)} and {str(tokens)[:80]}"
        )
    # PEFT trains the tokens of a shared embedding in all of its places
    edit.rows, edit.tied = (torch.tensor(tokens, device="cpu"), value), True


def _edit(edits: dict[Place, Edit], model: nn.Module, adapter: Adapter, key: str, place: Place) -> tuple[Edit, Tensor]:
    module = _module(model, place[0], key)
    parameter = module._parameters.get(place[1])
    had = module._buffers.get(place[1]) if parameter is None else parameter
    if had is None:
        raise MismatchError(
            f"bake: task {adapter.name!r} has a tensor {key!r}, and {place[0]!r} in the model has no {place[1]!r}"
        )
    if isinstance(had, nn.Parameter):
        _plain(model, place, key)
    return edits.setdefault(place, Edit()), had


def _check_shape(key: str, got: torch.Size, needed: torch.Size) -> None:
    if got != needed:
        raise ShapeError(f"bake: tensor {key!r} has shape {list(got)}, and its place in the model {list(needed)}")


def finder(model: nn.Module, paths: Callable[[str], str | None] | None) -> Callable[[str], str]:
    """Give the function that finds a module of an adapter in a model, as :func:`loraspan.attach` finds it."""
    modules = Modules(model)

    def at(path: str) -> str:
        given = None if paths is None else paths(path)
        if given is not None:
            return given
        found = modules.candidates(path)
        if len(found) != 1:
            known = f"it may mean {', '.join(map(repr, found[:3]))}" if found else "the model has no such module"
            raise MismatchError(
                f"bake: the task adapts {path!r}, and {known}: give paths=, a function from one to the other"
            )
        return found[0]

    return at


def _module(model: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise MismatchError(f"bake: the model has no module {path!r}, where {what!r} belongs") from None


def _plain(model: nn.Module, place: Place, path: str) -> Tensor:
    """Give a parameter to which a sum can be added, or refuse."""
    module = model.get_submodule(place[0])
    weight = module._parameters.get(place[1])
    if weight is None or type(weight) is not nn.Parameter or weight.dtype not in _FLOATS or weight.is_meta:
        found = "computed" if weight is None else f"{type(weight).__name__}, {weight.dtype}, on {weight.device}"
        raise UnsupportedError(
            f"bake: {path!r} needs a weight of floats in memory; {'.'.join(place)} is quantized or not there "
            f"({type(module).__name__}: {found}). Load the base model in float32, bfloat16 or float16"
        )
    return weight
