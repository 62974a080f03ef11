"""The columns of one slot as `shared_lora` reads them, changed while they are read."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from loraspan.collection.trained import Loadings
from loraspan.ops.cores import Cores
from loraspan.ops.packed import Packed, shape_of, unpack
from loraspan.serve.room import Form, Tables, refuse
from loraspan.serve.state import State

__all__ = ["Form", "SlotTables", "State", "Triple"]


class Triple(NamedTuple):
    """Bases ``v [d, k_in]``, ``u [n, k_out]`` and columns that belong together: read them once per call."""

    v: Tensor | Packed
    u: Tensor | Packed
    cores: Cores


class SlotTables:
    """One slot on one device: its bases and the columns of all tasks, whose numbers are rows of ``now.cores``.

    A number that no task has is refused: `shared_lora` raises an error on the CPU, and gives NaN on a GPU. A task that
    lacks the slot has no columns.

    Tasks that come are written into spare room. Where that is too small, tables of twice the size take the place of
    ``now``, in one step; the old ones go on giving what they gave, and learn of tasks that leave. After a refit the
    old ones refuse every task. Off the CPU they are kept, since a graph that was captured before may read them;
    on the CPU as long as someone holds them.

    Args:
        path: of the slot.
        state: what to serve; its collection has the slot.
        form: how.
    """

    def __init__(self, path: str, state: State, form: Form) -> None:
        self.path, self.form, self._state = path, form, state
        # indexes that someone may read still, and the rows that refuse in them; what has to stay where it is
        self._old: list[tuple[TensorWeakRef, Any]] = []
        self._kept: list[Any] = []
        with torch.inference_mode(False):
            self._tables, self.now = self._built(state, None)

    def follow(self, state: State) -> None:
        """Serve another state."""
        if self.form.train:
            # what was kept is what is trained here, and nothing else may change meanwhile
            self._state = state
            return
        with torch.inference_mode(False):
            vanished = self.path not in self._state.collection.slots
            if state.fitted != self._state.fitted or (vanished and self.path in state.collection.slots):
                self.renew(state, self.form)
                return
            before = np.zeros(state.rows, dtype=np.bool_)
            before[: len(self._state.alive)] = self._state.alive
            self._refuse(np.flatnonzero(before & ~state.alive))
            came = state.alive & ~before
            parts = list(state.columns_of(self.path, came))
            if self._tables.takes(parts, state.rows):
                old = self.now
                self._tables.widen(parts)
                self._tables.write(parts, np.flatnonzero(came))
                if self._tables.cores is not old.cores:
                    self.now = Triple(old.v, old.u, self._tables.cores)
                    self._retire(old, self._tables.refusal)
            else:
                old, refusal = self.now, self._tables.refusal
                self._tables, self.now = self._built(state, self._tables)
                self._retire(old, refusal)
            self._state = state
            _wait(self.form.device)

    def renew(self, state: State, form: Form) -> None:
        """Make all tables anew; the old ones refuse every task from then on."""
        with torch.inference_mode(False):
            tables, now = self._tables, self.now
            self.form = form
            self._tables, self.now = self._built(state, tables)
            self._state = state
            # what reads the old ones is through first
            _wait(now.cores.index.device)
            self._old.append((TensorWeakRef(now.cores.index), tables.refusal))
            self._refuse_all_in_old()
            if now.cores.index.device.type != "cpu":
                self._kept += [now.cores.index, now.v, now.u, now.cores.weights]
            _wait(now.cores.index.device)

    def stop(self) -> None:
        """Refuse every task from now on: what is served now, and before, is not told of changes any more."""
        with torch.inference_mode(False):
            index = self.now.cores.index
            refuse(index, self._tables.refusal, np.arange(index.shape[0]))
            self._refuse_all_in_old()
            _wait(index.device)

    @property
    def state(self) -> State:
        """What is served."""
        return self._state

    @property
    def nbytes(self) -> int:
        """Bytes of bases and tables, spare room included."""
        cores = self.now.cores
        return sum(tensor.nbytes for tensor in (self.now.v, self.now.u, cores.index, cores.weights, *cores.ends))

    @property
    def loadings(self) -> dict[str, Tensor]:
        """The leaves that are trained: weights, and shared loadings of both sides."""
        cores = self.now.cores
        return {"weights": cores.weights, "left": cores.left, "right": cores.right}

    def trained(self, number: int) -> Loadings:
        """Give a copy of what is trained of a task, by its number."""
        cores = self.now.cores
        weight, left, _, right, _, ss, sp, ps, pp, dense = cores.index[number].tolist()
        spans = (
            slice(weight, weight + ss + sp + ps + pp),
            slice(left, left + ss + sp),
            slice(right, right + (0 if dense else ss) + ps),
        )
        leaves = self.loadings.values()
        return Loadings(*(leaf.detach()[span].cpu().clone() for leaf, span in zip(leaves, spans, strict=True)))

    def _built(self, state: State, like: Tables | None) -> tuple[Tables, Triple]:
        """Build tables of a size that is no smaller."""
        space = state.collection.slots.get(self.path)
        # where nobody has the slot any more, its bases stay
        v, u = self.now[:2] if space is None else (self._basis(space.v), self._basis(space.u))
        parts = [] if space is None else list(state.columns_of(self.path, state.alive))
        (d, k_in), (n, k_out) = shape_of(v), shape_of(u)
        tables = Tables(self.form, (k_out, n, k_in, d), parts, state.rows, like)
        tables.write(parts, np.flatnonzero(state.alive))
        _wait(self.form.device)
        return tables, Triple(v, u, tables.cores)

    def _basis(self, basis: Tensor | Packed) -> Tensor | Packed:
        if not isinstance(basis, Packed):
            return basis.to(self.form.device, self.form.dtype)
        if self.form.packed:
            return basis.to(self.form.device)
        # rows in runs of 16 bytes, as the kernels of GPUs read them
        return unpack(basis).T.contiguous().to(self.form.device, self.form.dtype)

    def _retire(self, now: Triple, refusal: Any) -> None:
        self._old.append((TensorWeakRef(now.cores.index), refusal))
        if now.cores.index.device.type != "cpu":
            self._kept.append(now)

    def _refuse_all_in_old(self) -> None:
        for held, refusal in self._old:
            if (index := held()) is not None:
                refuse(index, refusal, np.arange(index.shape[0]))

    def _refuse(self, numbers: Any) -> None:
        """Let every index refuse tasks, old ones too."""
        refuse(self.now.cores.index, self._tables.refusal, numbers)
        self._old = [(held, refusal) for held, refusal in self._old if held() is not None]
        for held, refusal in self._old:
            if (index := held()) is not None:
                refuse(index, refusal, numbers)


def _wait(device: torch.device) -> None:
    """Wait until what was written is there for every stream."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
