"""The layers that take modules' places in one model: found, built, put in, told of changes, and taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from loraspan.collection.collection import SlotSpace
from loraspan.serve import extras, kinds
from loraspan.serve.extras_layer import ServedExtras
from loraspan.serve.layer import Served, form_of
from loraspan.serve.match import Modules, match, refuse_unmatched
from loraspan.serve.rows import Board
from loraspan.serve.tables import SlotTables, State
from loraspan.serve.unserved import refuse_module, without_module

Paths = Callable[[str], str | None] | None


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
        matched = match(self._modules, new, self._paths)
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
        """Put the very modules back."""
        self._put({path: self._modules.by_path[path] for path in self._outer})
        self._outer = {}

    def tables(self) -> list[SlotTables]:
        """Give the tables of all slots."""
        return [tables for layer in self for tables in layer.all_tables()]

    def __iter__(self) -> Iterator[Served]:
        """Give all layers, those within others too."""
        for layer in self._outer.values():
            inner: nn.Module = layer
            while isinstance(inner, Served):
                yield inner
                inner = inner.base

    def _plan(self, state: State, wrong: Mapping[str, str]) -> None:
        """See which tasks are refused, and which modules tasks bring tensors for."""
        plan = extras.plan(state, self._modules, self._paths)
        self._refused = {**without_module(state.collection, wrong), **plan.refused}
        self._extras.update(plan.paths)
        numbers = {name: number for name, number in state.numbers.items() if name not in self._refused}
        self._state = replace(state, numbers=numbers)

    def _built(self, paths: Mapping[str, object]) -> dict[str, Served]:
        layers: dict[str, Served] = {}
        for path in paths:
            refuse_module(self._modules, path)
            base = self._modules.by_path[path]
            make = self._maker(path, base)
            if path in self._extras:
                # innermost: factors add to what the task's own parameters give
                base = ServedExtras(base, path, self._extras[path], self._state)
                base.board = self._board
            if path in self._slots:
                base = kinds.served(base, path, self._slots[path], make)
                base.board = self._board
            assert isinstance(base, Served)
            layers[path] = base
        return layers

    def _maker(self, path: str, base: nn.Module) -> Callable[[str], SlotTables]:
        """Give what makes the tables of a module's slots."""

        def make(slot: str) -> SlotTables:
            return SlotTables(slot, self._state, form_of(base, path, self._state, dtype=self._dtype, train=self._train))

        return make

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            for parent, name in self._modules.places(path):
                parent._modules[name] = module
