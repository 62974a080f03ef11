"""Find the modules of a model that a space's slots mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from loraspan.collection.collection import SlotSpace
from loraspan.errors import MismatchError

# of the slots of experts: how the stem, and which of them, are written
_NUMBERED = re.compile(r"(.+)\[\d{1,6}\]")
# what each list of an error shows
_SHOWN = 5


class Modules:
    """The modules of a model as they were before any was replaced.

    Args:
        model: whose they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_path: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._suffixes: dict[str, list[str]] = {}
        # by id of a module: every parent that has it, and under which name
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for path, module in self.by_path.items():
            parts = path.split(".")
            for i in range(1, len(parts)):
                self._suffixes.setdefault(".".join(parts[i:]), []).append(path)
            for name, child in module._modules.items():
                places = self._places.setdefault(id(child), [])
                if not any(parent is module and known == name for parent, known in places):
                    places.append((module, name))

    def places(self, path: str) -> list[tuple[nn.Module, str]]:
        """Give the parents of a module, and its name in each."""
        return self._places.get(id(self.by_path[path]), [])

    def parent(self, path: str) -> nn.Module:
        """Give the module that has it."""
        return self.by_path[path.rpartition(".")[0]]

    def candidates(self, path: str) -> list[str]:
        """Give the paths that one may mean: itself; those that end in it; or the longest that it ends in."""
        if path in self.by_path:
            return [path]
        if longer := self._suffixes.get(path):
            # names of one and the same module are one
            return list({id(self.by_path[name]): name for name in reversed(longer)}.values())[::-1]
        while "." in path:
            path = path.partition(".")[2]
            if path in self.by_path:
                return [path]
        return []

    def below_peft(self, path: str) -> str:
        """Give the path of what a layer of PEFT's calls its base, where there is one.

        That is what is replaced: PEFT finds its own layers by their paths when it saves or merges.
        """
        while _is_peft(self.by_path[path]) and f"{path}.base_layer" in self.by_path:
            path = f"{path}.base_layer"
        return path


def _is_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


@dataclass
class Matched:
    """What was found.

    Attributes:
        modules: by path of a module the slots that it has.
        wrong: by path of a slot why it has no module.
    """

    modules: dict[str, dict[str, SlotSpace]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


def match(
    modules: Modules, slots: Mapping[str, SlotSpace], paths: Callable[[str], str | None] | None = None
) -> Matched:
    """Find the module of each slot.

    Args:
        modules: of the model.
        slots: by path, as the adapters name them.
        paths: gives the model's path of a module for an adapter's. None, or where it gives None: a module of that path;
            one whose path ends in it, if there is only one, as in a model that something wraps; or the longest that it
            ends in, as in a model without its head.
    """
    found = Matched()
    taken: dict[int, str] = {}
    for path, space in slots.items():
        names = _candidates(modules, path, space, paths)
        if not names:
            found.wrong[path] = "the model has no such module"
        elif len(names) > 1:
            found.wrong[path] = f"may mean {_listed(names)}"
        else:
            name = modules.below_peft(names[0])
            module = modules.by_path[name]
            if wrong := _clash(module, space):
                found.wrong[path] = f"{wrong} at {name!r}"
            elif space.kind != "expert" and id(module) in taken:
                found.wrong[path] = f"is module {name!r}, as is slot {taken[id(module)]!r}"
            else:
                taken[id(module)] = path
                found.modules.setdefault(name, {})[path] = space
    return found


def refuse_unmatched(modules: Modules, matched: Matched) -> None:
    """Raise if a slot has no module, with a list of them.

    Raises:
        MismatchError: says what did not match, what was ambiguous, what clashed in shape; and what the model has.
    """
    if not matched.wrong:
        return
    lines = [f"  {path!r}: {why}" for path, why in list(matched.wrong.items())[:_SHOWN]]
    more = len(matched.wrong) - len(lines)
    lines += [f"  and {more} more"] if more else []
    leaves = [path for path, module in modules.by_path.items() if path and not list(module.children())]
    raise MismatchError(
        "\n".join(
            [
                f"attach: {len(matched.wrong)} of the space's slots have no module of their own in this "
                f"{type(modules.by_path['']).__name__}; the model was left as it was:",
                *lines,
                f"The model has {_listed(leaves)}. Give the model that the adapters were made for, or paths=, a "
                f"function from a path above to one of the model.",
            ]
        )
    )


def _candidates(modules: Modules, path: str, space: SlotSpace, paths: Callable[[str], str | None] | None) -> list[str]:
    for name in _module_names(path, space):
        given = None if paths is None else paths(name)
        if given is not None:
            return [given] if given in modules.by_path else []
        if found := modules.candidates(name):
            return found
    return []


def _module_names(path: str, space: SlotSpace) -> Iterable[str]:
    """Give the paths of modules that a slot's may mean: of an expert it names a parameter too, or a layer of PEFT's."""
    if space.kind != "expert":
        return [path]
    numbered = _NUMBERED.fullmatch(path)
    stem = path if numbered is None else numbered[1]
    while stem.endswith(".base_layer"):
        stem = stem.removesuffix(".base_layer")
    return [stem, stem.rpartition(".")[0]]


def _clash(module: nn.Module, space: SlotSpace) -> str | None:
    """Say how a module and a linear slot differ in shape, if they do; other kinds are checked by their layers."""
    if space.kind != "linear":
        return None
    shape = linear_shape(module)
    if shape is None:
        return f"is a linear map {list(space.shape)} and meets a {type(module).__name__}, which is none that is known,"
    if shape != space.shape:
        return f"has shape {list(space.shape)} and meets {list(shape)}"
    return None


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Give ``(n, d)`` of a module that maps ``[..., d]`` to ``[..., n]``, None if it is not known to.

    Example:
        >>> linear_shape(nn.Linear(3, 5)), linear_shape(nn.LayerNorm(3))
        ((5, 3), None)
    """
    for names in (("out_features", "in_features"), ("nf", "nx"), ("outfeatures", "infeatures")):
        n, d = (getattr(module, name, None) for name in names)
        if isinstance(n, int) and isinstance(d, int) and not isinstance(module, nn.Bilinear):
            return n, d
    return None


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
