"""The tasks of a space that a model does not serve, and the modules that no layer may take the place of."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from loraspan.collection.collection import Collection
from loraspan.errors import UnsupportedError
from loraspan.serve.match import Modules

# an expert of a list or dict of them
_ROUTED = re.compile(r"(^|\.)experts\.[^.]+")


def without_module(collection: Collection, wrong: Mapping[str, str]) -> dict[str, str]:
    """Give the tasks that adapt what the model does not have, by name, each with the reason.

    Args:
        collection: with all tasks.
        wrong: by path of a slot why the model has no module for it.
    """
    found: dict[str, str] = {}
    for path, why in wrong.items():
        for segment, columns in collection.columns_of(path):
            for i in columns.tasks.tolist():
                if (of := segment.tasks[i]) is not None:
                    found.setdefault(of.name, f"it adapts {path!r}, and {why}")
    return found


def _adds(layer: nn.Module) -> bool:
    """Say whether a layer of PEFT's gives what its base gives and something more: a LoRA without variants does."""
    lora = type(layer).__module__.startswith("peft.tuners.lora.") and type(layer).__name__ != "ParamWrapper"
    return lora and not getattr(layer, "lora_variant", None)


def refuse_module(modules: Modules, path: str) -> None:
    """Refuse a module whose output its parent does not ask for, or whose input has lost its rows.

    Raises:
        UnsupportedError: names it and says why.
    """
    parent = modules.parent(path) if path else None
    why = None
    if parent is None:
        why = "is the whole model: wrap it, as in torch.nn.Sequential(model)"
    elif isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        why = f"is read by {type(parent).__name__}, which takes its weight and does not call it"
    elif type(parent).__module__.startswith("peft.") and not _adds(parent):
        why = f"belongs to a {type(parent).__name__} of PEFT, which may do more than add: merge and unload it first"
    elif _ROUTED.search(path):
        why = "is an expert of a list, which sees the tokens that were routed to it and not which row each is of"
    if why is not None:
        raise UnsupportedError(f"attach: module {path!r} {why}; the model was left as it was")
