"""The layers that take modules' places in one model: found, built, put in, told of changes, and taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loraspan.collection.collection import SlotSpace
from loraspan.errors import MismatchError, ShapeError, UnsupportedError
from loraspan.serve import extras, kinds
from loraspan.serve.extras_layer import ServedExtras
from loraspan.serve.layer import Served, form_of
from loraspan.serve.match import Matched, Modules, match, refuse_unmatched
from loraspan.serve.rows import Board
from loraspan.serve.tables import SlotTables, State
from loraspan.serve.unserved import refuse_module, without_module

Paths = Callable[[str], str | None] | None
# makes what a layer is built with to see whether it can be
_WITHOUT_TABLES: Any = lambda _: None  # noqa: E731


class Layers:
    """All served layers of a model.

    Args:
        model: is changed once all layers are built.
        state: the tasks.
        board: says what the layers are to serve.
        paths: as :func:`loraspan.attach`.
        dtype: as :func:`loraspan.attach`.
        train: as :func:`loraspan.attach`.
    """

    def __init__(
        self, model: nn.Module, state: State, board: Board, paths: Paths, dtype: torch.dtype | None, train: bool
    ) -> None:
        self._board, self._paths, self._dtype, self._train = board, paths, dtype, train
        self._modules = Modules(model)
        matched = match(self._modules, state.collection.slots, paths)
        refuse_unmatched(self._modules, matched)
        # by path of a module its slots, and its path in the files of tasks that bring tensors for it
        self._slots: dict[str, dict[str, SlotSpace]] = matched.modules
        self._extras: dict[str, str] = {}
        self._plan(state, {})
        self._outer: dict[str, Served] = {}
        self._outer = self._built({**self._slots, **self._extras})
        self._put(self._outer)

    @property
    def state(self) -> State:
        """What is served: a space's state without the tasks that are refused."""
        return self._state

    @property
    def refused(self) -> Mapping[str, str]:
        """The tasks that are refused, each with the reason."""
        return self._refused

    def follow(self, state: State) -> None:
        """Serve another state: modules that only new tasks adapt are replaced now, around nobody yet."""
        known = {slot for slots in self._slots.values() for slot in slots}
        new = {path: space for path, space in state.collection.slots.items() if path not in known}
        matched = self._servable(match(self._modules, new, self._paths))
        before = dict(self._extras)
        self._plan(state, matched.wrong)
        for path, slots in matched.modules.items():
            self._slots[path] = {**self._slots.get(path, {}), **slots}
        added = self._built({**matched.modules, **{path: None for path in self._extras if path not in before}})
        self._outer.update(added)
        self._put(added)
        for layer in self:
            layer.follow(self._state)

    def undo(self) -> None:
        """Put the very modules back, wherever the layers are now."""
        bases = {id(layer): self._modules.by_path[path] for path, layer in self._outer.items()}
        # as they were, and as they are
        for parent in (*self._modules.by_path.values(), *self._modules.by_path[""].modules()):
            for name, child in parent._modules.items():
                if id(child) in bases:
                    parent._modules[name] = bases[id(child)]
        self.stop()
        self._outer = {}

    def stop(self) -> None:
        """Refuse every task from now on, in graphs too that were made before."""
        for layer in self:
            layer.stop()

    def tables(self) -> list[SlotTables]:
        """Give the tables of all slots."""
        return [tables for layer in self for tables in layer.all_tables()]

    def __iter__(self) -> Iterator[Served]:
        """Give all layers, those within others too."""
        for layer in self._outer.values():
            yield from _layers_of(layer)

    def _plan(self, state: State, wrong: Mapping[str, str]) -> None:
        """See which tasks are refused, and which modules tasks bring tensors for."""
        plan = extras.plan(state, self._modules, self._paths)
        self._refused = {**without_module(state.collection, wrong), **plan.refused}
        self._extras.update(plan.paths)
        numbers = {name: number for name, number in state.numbers.items() if name not in self._refused}
        self._state = replace(state, numbers=numbers)

    def _servable(self, matched: Matched) -> Matched:
        """Take out modules that no layer may take the place of: tasks that adapt those are refused, and no others."""
        for path, slots in list(matched.modules.items()):
            base = self._modules.by_path[path]
            try:
                refuse_module(self._modules, path)
                form_of(base, path, self._state)
                kinds.served(base, path, {**self._slots.get(path, {}), **slots}, _WITHOUT_TABLES)
            except (MismatchError, ShapeError, UnsupportedError) as error:
                why = str(error).removeprefix("attach: ").removesuffix("; the model was left as it was")
                matched.wrong.update(dict.fromkeys(slots, why))
                del matched.modules[path]
        return matched

    def _built(self, paths: Mapping[str, object]) -> dict[str, Served]:
        layers: dict[str, Served] = {}
        for path in paths:
            refuse_module(self._modules, path)
            base = self._modules.by_path[path]
            known = list(_layers_of(self._outer[path])) if path in self._outer else []
            make = self._maker(path, base, known)
            if path in self._extras:
                # innermost: factors add to what the task's own parameters give
                there = [layer for layer in known if isinstance(layer, ServedExtras)]
                base = there[0] if there else ServedExtras(base, path, self._extras[path], self._state)
                base.board = self._board
            if path in self._slots:
                base = kinds.served(base, path, self._slots[path], make)
                base.board = self._board
            assert isinstance(base, Served)
            layers[path] = base
        return layers

    def _maker(self, path: str, base: nn.Module, known: list[Served]) -> Callable[[str], SlotTables]:
        """Give what makes the tables of a module's slots, but for those that are there: graphs may have these."""
        there = {tables.path: tables for layer in known for tables in layer.all_tables()}

        def make(slot: str) -> SlotTables:
            if slot in there:
                return there[slot]
            return SlotTables(slot, self._state, form_of(base, path, self._state, dtype=self._dtype, train=self._train))

        return make

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            for parent, name in self._modules.places(path):
                parent._modules[name] = module


def _layers_of(layer: nn.Module) -> Iterator[Served]:
    """Give the layers that stand around one module."""
    while isinstance(layer, Served):
        yield layer
        layer = layer.base
