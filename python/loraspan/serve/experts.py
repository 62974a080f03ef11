"""Stacked experts with tasks: a routed token keeps the task of its row."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraspan.collection.collection import SlotSpace
from loraspan.errors import ShapeError, UnsupportedError
from loraspan.serve.experts_loop import Between, Form, form_of, implementation_of, loop, run
from loraspan.serve.layer import Served
from loraspan.serve.steady import added
from loraspan.serve.tables import SlotTables

_NUMBERED = re.compile(r"(.+)\[(\d{1,6})\]")
# a stand-in with as many experts, hidden entries and entries between is what a module's forward is known by
_SMALL = (3, 4, 5)
_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


class _Routed(NamedTuple):
    """Rows of one product: which expert each is for, and its task.

    Attributes:
        experts: ``[S]``.
        ids: ``[S]`` or ``[S, m]``.
        shares: like ``ids``, or None.
    """

    experts: Tensor
    ids: Tensor
    shares: Tensor | None

    def at(self, rows: Tensor) -> _Routed:
        """Give some rows."""
        return _Routed(self.experts[rows], self.ids[rows], None if self.shares is None else self.shares[rows])


class ServedExperts(Served):
    r"""Experts held as 3-D parameters, with the task of each token that is routed to them.

    The loop over experts is done here as the module itself does it; of the implementations that transformers may put in
    its place, ``grouped_mm`` and ``batched_mm`` run as they are, and tasks enter between their products. That a module
    works this way is not taken from its name: when it is attached, a small stand-in of its class has to give the bits
    of the loop here. Tokens without a task have the bits that the module gives for the same routing. (In a whole model
    the rows of a batch meet here: a task may route its row's tokens elsewhere, and a product over another number of
    tokens may be rounded otherwise.) Each product has the sums and the error of :func:`loraspan.ops.shared_lora`.

    Compiled whole, or captured in a CUDA graph, shapes cannot follow the routing: ``grouped_mm`` and ``batched_mm``
    then ask every expert's tables about every row, whose task is none where it is another's.

    Args:
        base: the module.
        path: of it in the model.
        tables: by name of each slot, ``<path>.<parameter>[e]``; or ``<path>[e]`` and ``<path>.base_layer[e]``, where
            PEFT wrapped several parameters and does not say which: shapes do.
        spaces: the slots.

    Raises:
        UnsupportedError: if the module does something else with its parameters, or has a part of its experts.
        ShapeError: if a slot fits no parameter.
    """

    tables: Mapping[str, SlotTables]

    def __init__(
        self, base: nn.Module, path: str, tables: Mapping[str, SlotTables], spaces: Mapping[str, SlotSpace]
    ) -> None:
        super().__init__(base, path)
        self.tables = tables
        self._form = form_of(base, path)
        self._names = list(inspect.signature(type(base).forward).parameters)[1:4]
        # by parameter and expert: the slots that change it
        self._slots: dict[str, dict[int, list[str]]] = {name: {} for name in self._form.parameters}
        for name, space in spaces.items():
            parameter, expert = _place(base, path, self._form, name, space)
            self._slots[parameter].setdefault(expert, []).append(name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Route ``hidden_states [tokens, hidden]``."""
        rows = self.rows()
        if rows is None:
            found: Tensor = self.base(hidden_states, *args, **kwargs)
            return found
        index, weights = [*args, *(kwargs[name] for name in self._names[1 + len(args) :])]
        if hidden_states.ndim != 2:
            raise ShapeError(f"{self.path}: needs tokens [N, hidden]; got {list(hidden_states.shape)}")
        if getattr(self.base, "_is_expert_parallel", False):
            raise UnsupportedError(f"{self.path}: it has a part of its experts here, and their numbers are others")
        ids, shares = rows.of(hidden_states.shape[:1], hidden_states.device)
        implementation = implementation_of(self.base)
        if implementation == "eager":
            return loop(self.base, self._form, hidden_states, index, weights, self._between(ids, shares))
        if implementation not in self._form.implementations:
            raise UnsupportedError(
                f"{self.path}: experts run as {implementation!r} are not known here; it takes "
                f"{', '.join(('eager', *self._form.implementations))}: use model.set_experts_implementation"
            )
        return run(self.base, self._form, implementation, (hidden_states, index, weights), self._between(ids, shares))

    def _between(self, ids: Tensor, shares: Tensor | None) -> Between:
        """Give what adds to ``y [S, n]`` of a parameter, from ``x [S, d]``, for experts and tokens ``[S]``."""

        def add(parameter: str, y: Tensor, x: Tensor, experts: Tensor, tokens: Tensor) -> Tensor:
            if not self._slots[parameter]:
                return y
            routed = _Routed(experts, ids[tokens], None if shares is None else shares[tokens])
            if torch.compiler.is_compiling() or (y.is_cuda and torch.cuda.is_current_stream_capturing()):
                return self._add_everywhere(parameter, y, x, routed)
            return self._add_where_routed(parameter, y, x, routed)

        return add

    def _add_where_routed(self, parameter: str, y: Tensor, x: Tensor, routed: _Routed) -> Tensor:
        present = (routed.ids != -1).reshape(len(y), -1).any(1)
        hit = set(routed.experts[present].tolist())
        out = y
        for expert in sorted(hit & self._slots[parameter].keys()):
            rows = (present & (routed.experts == expert)).nonzero()[:, 0]
            part = self._added(parameter, expert, y[rows], x[rows], routed.at(rows))
            out = y.clone() if out is y else out
            out[rows] = part
        return out

    def _add_everywhere(self, parameter: str, y: Tensor, x: Tensor, routed: _Routed) -> Tensor:
        for expert in self._slots[parameter]:
            here = (routed.experts == expert).reshape(-1, *[1] * (routed.ids.ndim - 1))
            y = self._added(parameter, expert, y, x, routed._replace(ids=torch.where(here, routed.ids, -1)))
        return y

    def _added(self, parameter: str, expert: int, y: Tensor, x: Tensor, routed: _Routed) -> Tensor:
        for name in self._slots[parameter][expert]:
            y = added(self.path, self.tables[name], y, x, routed.ids, routed.shares)
        return y


def _split(name: str) -> tuple[str, int]:
    match = _NUMBERED.fullmatch(name)
    if match is None:
        raise UnsupportedError(f"attach: slot {name!r} of kind expert needs a number at its end, such as [0]")
    return match[1], int(match[2])


def _place(base: nn.Module, path: str, form: Form, name: str, space: SlotSpace) -> tuple[str, int]:
    """Give the parameter of a slot, and its expert."""
    stem, expert = _split(name)
    shapes = {}
    for parameter in form.parameters:
        experts, n, d = getattr(base, parameter).shape
        shapes[parameter] = (experts, (d, n) if form.is_transposed else (n, d))
    named = stem.rpartition(".")[2]
    fitting = [
        parameter
        for parameter, (experts, shape) in shapes.items()
        if expert < experts and space.shape == shape and (named == parameter or named not in shapes)
    ]
    if len(fitting) == 1:
        return fitting[0], expert
    told = ", ".join(f"{parameter} {experts} of {list(shape)}" for parameter, (experts, shape) in shapes.items())
    raise ShapeError(
        f"attach: slot {name!r} has shape {list(space.shape)} and fits {'more than one' if fitting else 'none'} of the "
        f"parameters of {path!r}: {told}. Is it the adapters' base model?"
    )
