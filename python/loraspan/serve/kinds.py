"""Which layer serves a module, by the kind of its slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from loraspan.collection.collection import SlotSpace
from loraspan.errors import MismatchError, UnsupportedError
from loraspan.serve.conv import ServedConv2d
from loraspan.serve.embedding import ServedEmbedding
from loraspan.serve.experts import ServedExperts
from loraspan.serve.known import plain
from loraspan.serve.layer import Served, ServedLinear
from loraspan.serve.tables import SlotTables


def served(base: nn.Module, path: str, slots: Mapping[str, SlotSpace], make: Callable[[str], SlotTables]) -> Served:
    """Give the layer that takes a module's place.

    Args:
        base: the module.
        path: of it in the model.
        slots: those that adapt it, by name.
        make: makes the tables of one.

    Raises:
        UnsupportedError: if the module is none that its kind of slots is known for; names it.
        ShapeError: if shapes differ.
        MismatchError: if slots of several kinds, or several that are not experts, mean this module.
    """
    kinds = {space.kind for space in slots.values()}
    if kinds == {"expert"} and isinstance(plain(base), nn.Linear):
        # PEFT's target_parameters may name the weight of a linear layer, which it sees as one expert
        kinds = {"linear"}
    if kinds == {"expert"}:
        return ServedExperts(base, path, {slot: make(slot) for slot in slots}, slots)
    if len(slots) != 1:
        raise MismatchError(f"attach: module {path!r} has one slot, or those of its experts; got {sorted(slots)}")
    ((slot, space),) = slots.items()
    if space.kind == "embedding":
        return ServedEmbedding(base, path, make(slot))
    if space.kind == "conv2d":
        return ServedConv2d(base, path, make(slot), space)
    if space.kind == "linear" or slot.endswith(".weight[0]"):
        return ServedLinear(base, path, make(slot))
    raise UnsupportedError(f"attach: slot {slot!r} of module {path!r} is of kind {space.kind!r}, which is not served")
