"""A module of which each row of a batch has its own task's parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loraspan.collection.collection import Task
from loraspan.errors import ArgumentError
from loraspan.serve.extras_keys import LORA_BIAS, lora_path, parts_of
from loraspan.serve.extras_modules import feature_axis, same, tensors_of
from loraspan.serve.extras_run import Call, all_at_once, task_by_task, wide_of
from loraspan.serve.extras_tables import GONE, NONE, Held, Shelf
from loraspan.serve.layer import Served
from loraspan.serve.rows import Rows
from loraspan.serve.state import State


class ServedExtras(Served):
    r"""A module of which each row has its own task's parameters, where the task brings them.

    A bias (and PEFT's ``lora_B.bias``, times its scale) is added as its difference from the module's own: within
    ``4 u (|y| + |b| + |b'|)`` of the exact one, summed in float32 or wider. Any other parameter takes the place of
    the module's: in eager code the module runs once for each task of the batch, on its rows; in compiled and captured
    graphs linear layers, norms and embeddings gather what each row needs, so that no shape follows the tasks, and other
    modules are refused. Parameters are rounded to the dtype of those they replace. Rows without a task, and tasks that
    bring nothing for this module, have the bits of the module itself. In a mixture each share counts what its task
    makes of the module's output less what the module itself does, which is defined where the output is linear in the
    parameters.

    Args:
        base: the module.
        path: of it in the model.
        file_path: of it in the adapters' files.
        state: the tasks.
    """

    def __init__(self, base: nn.Module, path: str, file_path: str, state: State) -> None:
        super().__init__(base, path)
        self._file_path = file_path
        self._restart(state)

    def _restart(self, state: State) -> None:
        device = next(iter(tensors_of(self.base).values())).device
        self._known: set[int] = set()
        with torch.inference_mode(False):
            self._values, self._added = Shelf(device), Shelf(device)
        self.follow(state)

    @torch.inference_mode(False)
    def follow(self, state: State) -> None:
        """Serve another state: what new tasks bring appears, and tasks that left are refused."""
        living = set(state.numbers.values())
        gone = self._known - living
        values: dict[int, dict[str, Tensor]] = {}
        added: dict[int, dict[str, Tensor]] = {}
        for name, number in state.numbers.items():
            if number not in self._known:
                values[number], added[number] = self._read(state.collection.task(name))
        self._added.write(state.rows, added, gone)
        self._values.write(state.rows, values, gone)
        self._state, self._known = state, living

    @torch.inference_mode(False)
    def stop(self) -> None:
        """Refuse every task from now on."""
        self._values.stop()
        self._added.stop()

    def _read(self, task: Task) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Give what a task puts in place of parameters, and what it adds to the output."""
        brought = parts_of(tuple(task.extras)).modules.get(self._file_path, {})
        own = {name: tensor.detach() for name, tensor in tensors_of(self.base).items()}
        device = self._added.now.rows.device
        values: dict[str, Tensor] = {}
        # what is added to the output, and how much of the module's own bias is taken away for that
        bias, less = torch.zeros((), dtype=torch.float64, device="cpu"), 0.0
        for parameter, keys in brought.items():
            value = task.extras[keys[0].name]
            if parameter == LORA_BIAS:
                bias = bias + task.scales[lora_path(keys[0])] * value.to("cpu", torch.float64)
            elif not (keys[0].in_base and same(value, own[parameter])):
                values[parameter] = value.to(device, own[parameter].dtype)
        if list(values) == ["bias"] and feature_axis(self.base) is not None:
            bias, less = bias + values.pop("bias").to("cpu", torch.float64), 1.0
        wide = torch.float64 if torch.float64 in [tensor.dtype for tensor in own.values()] else torch.float32
        if not bias.ndim:
            return values, {}
        return values, {"bias": bias.to(device, wide), "less": torch.tensor(less, dtype=wide, device=device)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if not torch.compiler.is_dynamo_compiling():
            return self._run(args, kwargs)
        rows = self.board.traced
        if rows is not None:
            return self._in_graph(Call(args, kwargs, rows))
        from loraspan.serve.outside import outside

        return outside(self._run, args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = self.rows()
        if rows is None:
            return self.base(*args, **kwargs)
        call, device = Call(args, kwargs, rows), self._values.now.rows.device
        # torch.export traces without dynamo
        if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return self._in_graph(call)
        held = self._values.now
        return self._plus(task_by_task(self, held, call) if held.stacks else self.base(*args, **kwargs), rows)

    def _in_graph(self, call: Call) -> Any:
        held, y = self._values.now, self.base(*call.args, **call.kwargs)
        return self._plus(all_at_once(self, held, call, y) if held.stacks else y, call.rows)

    def _plus(self, y: Any, rows: Rows) -> Any:
        """Add biases."""
        held = self._added.now
        if not held.stacks:
            return y
        last = feature_axis(self.base) == -1
        lead = y.shape[:1] if rows.per == "row" or not last else y.shape[:-1]
        ids, shares = rows.of(lead, y.device)
        places = held.places(ids)
        self.refuse_gone(places, ids)
        (stack,) = held.stacks
        wide, there = wide_of(y), places >= 0
        # [N, (m,) n]
        bias, own = stack["bias"][places.clamp(min=0)].to(wide), tensors_of(self.base).get("bias")
        if own is not None:
            bias = bias - stack["less"][places.clamp(min=0)].to(wide)[..., None] * own.to(wide)
        bias = bias * (there if shares is None else there * shares)[..., None]
        gone = places == GONE
        if ids.ndim == 2:
            bias, there, gone = bias.sum(1), there.any(1), gone.any(1)
        flat = y.reshape(places.shape[0], *y.shape[len(lead) :])
        ones = [1] * (flat.ndim - 2)
        bias = bias.reshape(-1, *ones, bias.shape[-1]) if last else bias.reshape(*bias.shape, *ones)
        there, gone = there.reshape(-1, 1, *ones), gone.reshape(-1, 1, *ones)
        out = torch.where(there, (flat.to(wide) + bias).to(y.dtype), flat)
        return torch.where(gone, torch.nan, out).reshape(y.shape)

    def refuse_gone(self, places: Tensor, ids: Tensor) -> None:
        """Refuse numbers without a task, where asking does not mean waiting for a GPU."""
        if places.device.type == "cpu" and not torch.compiler.is_compiling() and bool((places == GONE).any()):
            wrong = sorted(set(ids[places == GONE].tolist()))
            raise ArgumentError(
                f"{self.path}: a task of the batch has left the space, or its number was never one of the space's: "
                f"take numbers from space.ids, and names from space.tasks; got {wrong[:5]}"
            )

    @contextlib.contextmanager
    def for_rows(self, ids: Tensor, shares: Tensor | None) -> Iterator[None]:
        """Let modules within this one serve some rows of the batch alone."""
        token = self.board.context.set(Rows(ids, shares))
        try:
            yield
        finally:
            self.board.context.reset(token)

    def names_at(self, held: Held, places: list[int]) -> str:
        """Name a task for each place, for an error."""
        numbers = {int(held.rows[number]): name for name, number in self._state.numbers.items()}
        return ", ".join("the model's own" if place == NONE else repr(numbers.get(place, place)) for place in places)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: (held.device, held.dtype) for name, held in tensors_of(self.base).items()}
        super()._apply(fn, recurse)
        if before != {name: (held.device, held.dtype) for name, held in tensors_of(self.base).items()}:
            self._restart(self._state)
        return self
