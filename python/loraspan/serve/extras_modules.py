"""What kinds of modules can have a task's own parameters, and what each kind makes of those that its rows need."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from loraspan.serve.extras_keys import LORA_BIAS

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# parameters by name, each with one row per row of the batch; the batch [N, T, ...]; what comes out of it
Gather = Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor]


def feature_axis(module: nn.Module) -> int | None:
    """Say on which axis of its output a module adds its bias, None where that is not known."""
    forward = type(module).forward
    if isinstance(module, nn.Linear):
        # a quantized layer has a forward of its own, but no other bias
        return -1 if forward is nn.Linear.forward or not module.weight.is_floating_point() else None
    if type(module).__name__ == "Conv1D" or forward is nn.LayerNorm.forward:
        return -1
    return 1 if forward in [kind.forward for kind in _CONVOLUTIONS] else None


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Give the parameters and buffers that a module itself has."""
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def same(value: Tensor, base: Tensor) -> bool:
    """Say whether a value is what the model has, in the model's dtype."""
    return value.shape == base.shape and torch.equal(value.to(base.device, base.dtype), base)


def refusal(module: nn.Module, parameter: str, brought: Mapping[str, Tensor]) -> str | None:
    """Say why a module cannot have a parameter of those that are brought for it, if so."""
    own, value = tensors_of(module).get(parameter), brought[parameter]
    if "down_proj" in module._parameters:
        return f"a {type(module).__name__} holds stacked experts, of which a task has factors and nothing of its own"
    is_head = type(module).forward is nn.Linear.forward and module.weight is not None
    # a head may have another number of labels
    head = brought if "weight" in brought and parameter == "bias" else tensors_of(module)
    labels = head["weight"].shape[0] if is_head else None
    if parameter in (LORA_BIAS, "bias") and feature_axis(module) is not None and (own is not None or "." in parameter):
        length = labels if labels is not None or own is None else own.shape[0]
        if value.ndim != 1 or not value.is_floating_point() or length not in (None, value.shape[0]):
            return f"{parameter!r} needs a vector of floats{f' [{length}]' if length else ''}; got {list(value.shape)}"
        return None
    if own is None:
        return f"a {type(module).__name__} here has no {parameter!r} that is known"
    if not (own.is_floating_point() and value.is_floating_point()):
        return f"{parameter!r} is {own.dtype} in the model and {value.dtype} in the file, and needs floats"
    more = is_head and own.shape[1:] == value.shape[1:] and ("bias" in brought or "bias" not in tensors_of(module))
    if own.shape != value.shape and not more:
        return f"{parameter!r} is {list(own.shape)} in the model and {list(value.shape)} in the file"
    return None


def twin(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Give a module that is another in all but some tensors.

    Nothing of the first is changed, not even for a moment, as `torch.func.functional_call` would: another thread may be
    running it.
    """
    other = type(module).__new__(type(module))
    other.__dict__.update(module.__dict__)
    for store in ("_parameters", "_buffers"):
        held = module.__dict__[store]
        other.__dict__[store] = {name: parameters.get(name, tensor) for name, tensor in held.items()}
    return other


def gather_of(module: nn.Module) -> Gather | None:
    """Give what runs a module with parameters for each row, None for one that is not known.

    Those known act on the last axis alone, take one tensor, and are linear in their parameters.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return _linear
    if forward is nn.LayerNorm.forward and len(module.normalized_shape) == 1:  # type: ignore[arg-type]
        return _layer_norm
    if forward is nn.Embedding.forward and module.max_norm is None:
        return _embedding
    return None


def _linear(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    assert isinstance(module, nn.Linear)
    weight, bias = parameters["weight"], parameters.get("bias", module.bias)
    y = torch.bmm(x.flatten(1, -2), weight.mT)
    if bias is not None:
        y = y + (bias[:, None] if "bias" in parameters else bias)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def _layer_norm(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    ones = (len(x), *[1] * (x.ndim - 2), x.shape[-1])
    own = {name: tensor.reshape(ones) for name, tensor in parameters.items()}
    y = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps) * own.get("weight", module.weight)
    bias = own.get("bias", module.bias)
    return y if bias is None else y + bias


def _embedding(_: nn.Module, parameters: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    rows = torch.arange(len(tokens), device=tokens.device).reshape(-1, *[1] * (tokens.ndim - 1))
    return parameters["weight"][rows, tokens]
