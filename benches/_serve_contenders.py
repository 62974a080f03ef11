"""Who takes turns in ``benches/serve.py``: ours, PEFT and vlora on one model, and what plain torch has."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import loraspan
from _gpu_device import DTYPES, Clock
from _gpu_report import Record
from _serve_peers import missing, peft_model, told, vlora_model
from _serve_space import SEED, Drawn, Layers, Llama, Sizes, draw, names, slots_of, space_of, twin

PEERS = ("PEFT", "vlora")
# vlora takes a batch task by task: some are timed and taken times all
FEW = 4


@dataclass(frozen=True)
class Place:
    """Where and how a run measures."""

    clock: Clock
    dtype: str
    rounds: int
    sizes: Sizes

    @property
    def kind(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]

    def normal(self, *shape: int) -> Tensor:
        """Draw a tensor there, the same on every device."""
        made = torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))
        return made.to(self.clock.device, self.kind)


@dataclass(frozen=True)
class Batch:
    """``rows`` rows of ``distinct`` tasks, of ``resident`` in the space."""

    rows: int
    distinct: int
    resident: int

    @property
    def ids(self) -> list[int]:
        """The task of each row: spread over the table, mixed over the rows."""
        return [i % self.distinct * (self.resident // self.distinct) for i in range(self.rows)]

    @property
    def tasks(self) -> list[int]:
        """Those that occur."""
        return sorted(set(self.ids))

    def __str__(self) -> str:
        more = f" of {self.resident}" if self.resident != self.distinct else ""
        return f"{self.rows} rows of {self.distinct} task{'s' * (self.distinct > 1)}{more}"


@dataclass(frozen=True)
class Contender:
    """Who takes turns.

    Attributes:
        run: the batch, or the first rows of it.
        part: which share of the batch that is: its time is divided by it.
        captured: whether a CUDA graph and a compiler can take it.
    """

    run: Callable[[], Any]
    part: float = 1.0
    captured: bool = True


@dataclass(frozen=True, eq=False)
class Built:
    """A model, and what each contender made of its own modules around the same weights."""

    base: nn.Module
    drawn: Mapping[str, Drawn]
    space: loraspan.Subspace
    served: Any
    peers: Mapping[str, Any]
    left_out: tuple[Record, ...]


def build(base: nn.Module, batch: Batch, at: Place, peers: Sequence[str]) -> Built:
    """Draw the tasks and give them to everyone who is there."""
    drawn = draw(slots_of(base), batch.resident, at.sizes)
    space = space_of(drawn, batch.resident, at.sizes)
    made: dict[str, Any] = {}
    left_out: list[Record] = []
    for peer in peers:
        reason = missing(peer)
        if reason is None:
            make = peft_model if peer == "PEFT" else partial(vlora_model, like=next(base.parameters()))
            try:
                made[peer] = make(twin(base), drawn, batch.tasks, at.sizes)
            except Exception as error:
                # another version than these were written for
                traceback.print_exc()
                reason = told(error)
        if reason is not None:
            left_out.append({"backend": peer, "status": "left out", "reason": reason})
    return Built(base, drawn, space, loraspan.attach(twin(base), space), made, tuple(left_out))


@lru_cache(maxsize=2)
def whole(width: int, hidden: int, layers: int, batch: Batch, at: Place, peers: Sequence[str] = PEERS) -> Built:
    """Give a whole model and everyone around it, built once: PEFT takes seconds for 64 adapters."""
    return build(Llama(width, hidden, layers, at.clock.device, at.kind), batch, at, peers)


def contenders(built: Built, x: Tensor, axis: int, batch: Batch) -> dict[str, Contender]:
    """Give what each runs on a batch whose rows lie along ``axis`` of ``x``."""
    tasks = [names(batch.resident)[i] for i in batch.ids]
    served = built.served
    ids = built.space.ids(tasks).to(x.device)

    def by_context() -> Any:
        with served.tasks(tasks):
            return served(x)

    found = {"loraspan": Contender(lambda: served(x, task_ids=ids))}
    found["loraspan, names"] = Contender(by_context, captured=False)
    if "PEFT" in built.peers:
        found["PEFT"] = Contender(partial(built.peers["PEFT"], x, adapter_names=tasks), captured=False)
    if "vlora" in built.peers:
        few = tasks[:FEW]
        run = partial(_one_by_one, built.peers["vlora"], few, x.narrow(axis, 0, len(few)), axis)
        found["vlora"] = Contender(run, part=len(few) / batch.rows, captured=False)
    return found


def _one_by_one(model: Any, tasks: Sequence[str], x: Tensor, axis: int) -> Any:
    """Do what vlora's users do with rows of a task each: set the task and run its row, and so on."""
    parts = []
    for i, task in enumerate(tasks):
        model.set_task(task)
        parts.append(model(x.narrow(axis, i, 1)))
    return torch.cat(parts) if axis == 0 else [torch.cat(rows) for rows in zip(*parts, strict=True)]


def gathered(base: Layers, xs: Tensor, factors: Sequence[tuple[Tensor, Tensor]], at: Place) -> Contender:
    """Give two batched products over factors that lie stacked, row by row: what plain torch can do."""
    held = [[t.to(xs.device, at.kind).contiguous() for t in pair] for pair in factors]
    order = torch.arange(xs.shape[1], device=xs.device)

    def run() -> list[Tensor]:
        found = []
        for layer, x, (a, b) in zip(base.layers, xs.unbind(), held, strict=True):
            z = torch.bmm(a[order], x[:, :, None])
            found.append(layer(x).add_(torch.bmm(b[order], z)[:, :, 0]))
        return found

    return Contender(run)
