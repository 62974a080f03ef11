"""What takes the place of a module: the module itself, and what each row's task adds to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from loraspan.errors import ArgumentError, ShapeError, UnsupportedError
from loraspan.ops import shared_lora, shared_lora_
from loraspan.serve.rows import Board, Rows
from loraspan.serve.tables import Form, SlotTables, State

# what bases and ends may be kept in
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Served(nn.Module):
    """The base class of what takes a module's place.

    It answers for the module's attributes, and its state dict is the module's. It is neither copied nor pickled: a
    copy would go on serving tasks that have left.

    Attributes:
        base: the very module.
        path: of the module in the model.
        tables: of the slot that is served here, or of each by its path.
        board: says which tasks the rows have.
    """

    tables: SlotTables | Mapping[str, SlotTables]

    def __init__(
        self, base: nn.Module, path: str, tables: SlotTables | Mapping[str, SlotTables] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self.base, self.path, self.tables = base, path, tables
        self.board = Board()
        # of this alone: what is below has modes of its own
        self.training = base.training

    def follow(self, state: State) -> None:
        """Serve another state."""
        for tables in self.all_tables():
            tables.follow(state)

    def stop(self) -> None:
        """Refuse every task from now on, to whoever has the tables still, as a graph may: nobody follows the space."""
        for tables in self.all_tables():
            tables.stop()

    def all_tables(self) -> list[SlotTables]:
        """Give the tables of every slot that is served here."""
        return [self.tables] if isinstance(self.tables, SlotTables) else list(self.tables.values())

    def rows(self) -> Rows | None:
        """Give the tasks of the rows, None for the base model's own output.

        In a graph that is being compiled they are those of ``task_ids``. A model that was compiled without them is
        served in pieces, each layer between two graphs; a whole graph is refused.

        Raises:
            ArgumentError: where a checkpoint computes the layer again, and the tasks are forgotten.
        """
        if torch.compiler.is_dynamo_compiling():
            return self.board.traced or _read(self)
        rows = self.board.current()
        if rows is None and torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
            raise ArgumentError(
                f"{self.path}: is computed again during backward, as activation checkpointing does, where the tasks of "
                f"its rows are not known: call backward within the same served.tasks(...), or turn checkpointing off"
            )
        return rows

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Give that of the module."""
        return self.base.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}base.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base")
        while isinstance(base, Served):
            base = base.base
        if base is not None and (name in base._parameters or name in base._buffers):
            # the module's own, as where transformers ties weights
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            f"{self.path}: a served layer is not copied or pickled, as the copy would not learn of changed tasks: "
            f"detach first, and attach to the copy"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise UnsupportedError(
            f"{self.path}: torch.nn.DataParallel runs copies of a served layer in threads that know no tasks: attach "
            f"to one model per device"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for tables in self.all_tables():
            probe = torch.empty(0, dtype=tables.form.dtype, device=tables.form.device)
            moved = fn(probe)
            if tables.form.train and (moved.device, moved.dtype) != (probe.device, probe.dtype):
                raise UnsupportedError(
                    f"{self.path}: is attached with train=True, whose loadings an optimizer may hold: move the model, "
                    f"or change its dtype, before attach"
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tables in self.all_tables():
            form = form_of(self.base, self.path, tables.state, tables.form)
            if form != tables.form:
                tables.renew(tables.state, form)
        return self


class ServedLinear(Served):
    """``y = base(x)``, and each row's ``dW x`` added: anything that maps ``[..., d]`` to ``[..., n]``.

    Args:
        base: the module; its weight, if it has one, may have any form.
        path: of the module.
        tables: of its slot.
    """

    tables: SlotTables

    def __init__(self, base: nn.Module, path: str, tables: SlotTables) -> None:
        super().__init__(base, path, tables)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and add what the rows' tasks make of ``x``."""
        y = self.base(x, *args, **kwargs)
        if not torch.compiler.is_dynamo_compiling():
            return self._eager(y, x)
        rows = self.board.traced
        if rows is None:
            from loraspan.serve.outside import outside

            return outside(self._eager, y, x)
        ids, shares = rows.of(x.shape[:-1], y.device)
        v, u, cores = self.tables.now
        x = x if x.device == y.device else x.to(y.device)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        return shared_lora(flat_y, flat_x, v, u, cores, ids, shares=shares).reshape(y.shape)

    def _eager(self, y: Tensor, x: Tensor) -> Tensor:
        rows = self.rows()
        return y if rows is None else self._add(y, x, rows)

    def _add(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        ids, shares = rows.of(x.shape[:-1], y.device)
        if x.device != y.device:
            # a hook of the base took it there, as where layers are spread over devices
            x = x.to(y.device)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        now = self.tables.now
        try:
            if self._alone(y, x):
                shared_lora_(flat_y, flat_x, *now, ids, shares=shares)
                return y
            return shared_lora(flat_y, flat_x, *now, ids, shares=shares).reshape(y.shape)
        except ShapeError:
            raise
        except ArgumentError as error:
            if now is not self.tables.now:
                # a refit took the tables away between the two lines above
                return self._add(y, x, rows)
            raise ArgumentError(
                f"{self.path}: a task of the batch has left the space, or its number was never one of the space's: "
                f"take numbers from space.ids, and names from space.tasks"
            ) from error

    def _alone(self, y: Tensor, x: Tensor) -> bool:
        """Say whether nobody but us has ``y``, or wants a gradient: then it is added to in place."""
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or self.tables.form.train):
            return False
        # these two give new memory, unless a hook keeps it, or what stands in their forward's place
        base = self.base
        kind = type(base)
        if "forward" in base.__dict__ or not (kind is nn.Linear or kind.__name__ == "Conv1D") or not y.is_contiguous():
            return False
        return not (base._forward_hooks or torch_module._global_forward_hooks)


def _read(layer: Served) -> Rows | None:
    """Read the context between two graphs."""
    from loraspan.serve.outside import outside

    rows: Rows | None = outside(layer.rows)
    return rows


def form_of(base: nn.Module, path: str, state: State, like: Form | None = None, **given: Any) -> Form:
    """Give the form of tables beside a module.

    Args:
        base: the module: its first tensor says where, and in which dtype if that is one that products take. Quantized
            weights that torch keeps out of sight are the CPU's.
        path: of the module, for the error.
        state: says the dtype where the module does not.
        like: what was chosen before: a dtype that was given, and whether loadings are trained.
        given: ``dtype`` and ``train``, as :func:`loraspan.attach` takes them, where there is no ``like``.

    Raises:
        UnsupportedError: if its tensors have no memory.
    """
    tensor = next(itertools.chain(base.parameters(), base.buffers()), None)
    if tensor is not None and tensor.is_meta:
        raise UnsupportedError(
            f"{path}: lies on the meta device, so that where its tables belong is not known: load its weights first"
        )
    device = torch.device("cpu") if tensor is None else tensor.device
    dtype = like.dtype if like is not None and like.given else given.get("dtype")
    train = like.train if like is not None else bool(given.get("train"))
    chosen = dtype is not None
    if dtype is None:
        dtype = tensor.dtype if tensor is not None and tensor.dtype in DTYPES else state.collection.dtype
    return Form(device, dtype, packed=not (chosen or train) and device.type == "cpu", given=chosen, train=train)
