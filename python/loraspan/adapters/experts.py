"""LoRA on the stacked weights of experts (PEFT's ``target_parameters``): one slot per expert, and back.

PEFT keeps one A ``[experts * r, d]``, the experts under each other, and one B ``[n, r * experts]``, where the expert
changes fastest (``peft.tuners.lora.layer.ParamWrapper.get_delta_weight``). Where several parameters of one module are
adapted their wrappers are nested, in the order in which the module registered its parameters, which the file does not
tell: then the slots carry the path of the file, ``<path>.base_layer[e]`` for an inner one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from loraspan.adapters.base import Slot
from loraspan.errors import ArgumentError, FormatError

_NUMBERED = re.compile(r"(.+)\[(\d{1,6})\]")


def parameters_of(path: str, targets: Iterable[str]) -> list[str]:
    """Give the parameters that ``target_parameters`` may mean at a module path of the file.

    Example:
        >>> parameters_of("layers.0.experts", ["experts.down_proj", "router.weight"])
        ['layers.0.experts.down_proj']
    """
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    names = []
    for target in sorted(set(targets)):
        module, _, parameter = target.rpartition(".")
        if not module or path == module or path.endswith(f".{module}"):
            names.append(f"{path}.{parameter}")
    return names


def stem_of(path: str, candidates: Sequence[str]) -> str:
    """Give the name of the slots of one file path, without their numbers."""
    return candidates[0] if len(candidates) == 1 and not path.endswith(".base_layer") else path


def file_path_of(name: str, targets: Iterable[str]) -> str:
    """Give the module path in the file of the slots called ``name``, with a number at its end or without.

    Example:
        >>> file_path_of("layers.0.experts.down_proj[3]", ["experts.down_proj"])
        'layers.0.experts'
    """
    match = _NUMBERED.fullmatch(name)
    stem = name if match is None else match[1]
    path = stem.rpartition(".")[0]
    return path if path and stem_of(path, parameters_of(path, targets)) == stem else stem


def split(stem: str, down: Tensor, up: Tensor, lora_rank: int, scale: float) -> dict[str, Slot]:
    """Split stacked factors into one slot per expert, all of them views.

    Args:
        stem: the slots are ``stem[0]``, ``stem[1]``, ...
        down: ``[experts * r, d]``.
        up: ``[n, r * experts]``.
        lora_rank: ``r``.
        scale: of each.
    """
    experts = down.shape[0] // lora_rank
    # [n, r, experts]
    by_expert = up.view(up.shape[0], lora_rank, experts)
    return {
        f"{stem}[{e}]": Slot(down[e * lora_rank : (e + 1) * lora_rank], by_expert[:, :, e], scale, "expert")
        for e in range(experts)
    }


def gather(slots: Mapping[str, Slot]) -> dict[str, list[Slot]]:
    """Gather the slots of experts by their stem, in order.

    Raises:
        FormatError: if a name has no number.
        ArgumentError: if the numbers of one stem are not 0, 1, 2, ..., or shapes differ.
    """
    numbered: dict[str, dict[int, Slot]] = {}
    for name, slot in slots.items():
        match = _NUMBERED.fullmatch(name)
        if match is None:
            raise FormatError(f"slot {name!r} of kind expert needs a name with its number, such as 'experts[0]'")
        numbered.setdefault(match[1], {})[int(match[2])] = slot
    for stem, group in numbered.items():
        if sorted(group) != list(range(len(group))):
            raise ArgumentError(f"experts {stem!r}: needs slots 0 to {max(group)}, each once; got {sorted(group)}")
        if len({slot.shape for slot in group.values()}) > 1:
            raise ArgumentError(f"experts {stem!r}: needs one shape; got {sorted({s.shape for s in group.values()})}")
    return {stem: [group[e] for e in range(len(group))] for stem, group in numbered.items()}


def join(pairs: Sequence[tuple[Tensor, Tensor]], lora_rank: int) -> tuple[Tensor, Tensor]:
    """Stack the factors of all experts as PEFT does; a rank below ``lora_rank`` is filled up with zeros.

    Args:
        pairs: per expert ``down [r_e, d]`` and ``up [n, r_e]``.
        lora_rank: ``r``, at least every ``r_e``.

    Returns:
        ``down [experts * r, d]`` and ``up [n, r * experts]``.
    """
    downs, ups = zip(*pairs, strict=True)
    down = downs[0].new_zeros(len(pairs), lora_rank, downs[0].shape[1])
    up = ups[0].new_zeros(ups[0].shape[0], lora_rank, len(pairs))
    for e, (one_down, one_up) in enumerate(pairs):
        down[e, : one_down.shape[0]] = one_down
        up[:, : one_up.shape[1], e] = one_up
    return down.flatten(0, 1), up.flatten(1, 2)
