"""The timed parts of ``benches/serve.py``: adapters alone, whole models, and how cost grows with tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import loraspan
from _bench import Timing
from _gpu_cases import ROUNDOFF, U32, Goal, excess_of, worst_of
from _gpu_device import DTYPES, Candidate, Clock, take_turns
from _gpu_report import Record
from _serve_peers import missing, peft_model, vlora_model
from _serve_space import SEED, Drawn, Layers, Llama, Sizes, draw, exact, names, slots_of, space_of, twin

PEERS = ("PEFT", "vlora")
OF_PEERS = (Goal("x PEFT", 8.0), Goal("x vlora", 50.0))
OF_BASE = (Goal("x base", 1.15, most=True),)
# vlora takes a batch task by task: some are timed and taken times all
FEW = 4
# what others may be off, in errors that the base model itself makes
SLACK = 4.0


@dataclass(frozen=True)
class Place:
    """Where and how a run measures; ``compiler`` is torch.compile's backend, None for no compiled runs."""

    clock: Clock
    dtype: str
    rounds: int
    sizes: Sizes
    compiler: str | None = None

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


def adapter_records(size: int, layers: int, batch: Batch, at: Place, *, goals: Sequence[Goal] = ()) -> list[Record]:
    """Time layers whose base products are there already; give a record for each contender."""
    base = Layers(size, layers, at.clock.device, at.kind)
    xs = at.normal(layers, batch.rows, size)
    drawn = draw(slots_of(base), batch.resident, at.sizes)
    found, records = _contenders(base, xs, 1, drawn, batch, at, peers=PEERS if goals else ("PEFT",))
    factors = [slot.factors(batch.ids, at.sizes.lora_rank) for slot in drawn.values()]
    if batch.resident == batch.distinct:
        found["gathered"] = _gathered(base, xs, factors, at)
    excess = {}
    for who, one in found.items():
        parts = zip(base.layers, xs, one.run(), factors, strict=True)
        excess[who] = worst_of(_excess(layer, x, out, a, b, at.dtype) for layer, x, out, (a, b) in parts)
    name: Record = {"case": f"{layers} x {size} x {size}, {batch}", "dtype": at.dtype, "layers": layers}
    name |= {"rows": batch.rows, "distinct": batch.distinct, "resident": batch.resident, "size": size}
    return records + _timed(name, found, excess, at, goals)


def model_records(
    width: int, hidden: int, layers: int, tokens: int, batch: Batch, at: Place, *, peers: Sequence[str] = PEERS
) -> list[Record]:
    """Time a whole model beside itself without adapters; give a record for each contender."""
    base = Llama(width, hidden, layers, at.clock.device, at.kind)
    x = at.normal(batch.rows, tokens, width)
    drawn = draw(slots_of(base), batch.resident, at.sizes)
    found, records = _contenders(base, x, 0, drawn, batch, at, peers=peers)
    found["base"] = Contender(lambda: base(x))
    checked = min(FEW, batch.rows)
    alone = base(x)[:checked].double()
    plain, ours = (exact(base, x[:checked], drawn, tasks, at.sizes) for tasks in (None, batch.ids[:checked]))
    allowed = SLACK * (alone - plain).abs().max().expand_as(plain)
    assert (ours - plain).abs().max() > 10 * allowed.max(), "the tasks change too little to tell a wrong answer"
    excess = {
        who: excess_of(one.run()[:checked], plain if who == "base" else ours, allowed) for who, one in found.items()
    }
    case = f"{layers} layers of {width}, {tokens} token{'s' * (tokens > 1)} each, {batch}"
    name: Record = {"case": case, "dtype": at.dtype, "tokens": tokens, "layers": layers, "size": width}
    return records + _timed(name, found, excess, at, OF_BASE)


def _contenders(
    base: nn.Module, x: Tensor, axis: int, drawn: Mapping[str, Drawn], batch: Batch, at: Place, peers: Sequence[str]
) -> tuple[dict[str, Contender], list[Record]]:
    """Give ours and the peers that are there, and a record of each that is not; rows lie along ``axis`` of ``x``."""
    tasks = [names(batch.resident)[i] for i in batch.ids]
    space = space_of(drawn, batch.resident, at.sizes)
    served = loraspan.attach(twin(base), space)
    ids = space.ids(tasks).to(x.device)

    def by_context() -> Any:
        with served.tasks(tasks):
            return served(x)

    found = {"loraspan": Contender(lambda: served(x, task_ids=ids))}
    found["loraspan, names"] = Contender(by_context, captured=False)
    left_out: list[Record] = []
    for peer in peers:
        if (reason := missing(peer)) is not None:
            left_out.append({"backend": peer, "status": "left out", "reason": reason})
        elif peer == "PEFT":
            mixed = peft_model(twin(base), drawn, batch.tasks, at.sizes)
            found[peer] = Contender(partial(mixed, x, adapter_names=tasks), captured=False)
        else:
            switched = vlora_model(twin(base), drawn, batch.tasks, at.sizes, x)
            few = tasks[:FEW]
            run = partial(_one_by_one, switched, few, x.narrow(axis, 0, len(few)), axis)
            found[peer] = Contender(run, part=len(few) / batch.rows, captured=False)
    return found, left_out


def _one_by_one(model: Any, tasks: Sequence[str], x: Tensor, axis: int) -> Any:
    """Do what vlora's users do with rows of a task each: set the task and run its row, and so on."""
    parts = []
    for i, task in enumerate(tasks):
        model.set_task(task)
        parts.append(model(x.narrow(axis, i, 1)))
    return torch.cat(parts) if axis == 0 else [torch.cat(rows) for rows in zip(*parts, strict=True)]


def _gathered(base: Layers, xs: Tensor, factors: Sequence[tuple[Tensor, Tensor]], at: Place) -> Contender:
    """Give two batched products over each row's factors, ready in one table: the most that plain torch does."""
    held = [[t.to(xs.device, at.kind).contiguous() for t in pair] for pair in factors]
    order = torch.arange(xs.shape[1], device=xs.device)

    def run() -> list[Tensor]:
        found = []
        for layer, x, (a, b) in zip(base.layers, xs.unbind(), held, strict=True):
            z = torch.bmm(a[order], x[:, :, None])
            found.append(layer(x).add_(torch.bmm(b[order], z)[:, :, 0]))
        return found

    return Contender(run)


def _excess(layer: nn.Module, x: Tensor, out: Tensor, a: Tensor, b: Tensor, dtype: str) -> float:
    """Say how far the first rows of a layer are off, as a multiple of the bound; see ``_gpu_shared_lora.excess``."""
    x, a, b = (t[: len(out)].to(x.device).double() for t in (x, a, b))
    change = torch.einsum("tnr,tr->tn", b, torch.einsum("trd,td->tr", a, x))
    exact = layer(x).double() + change
    size = 6 * change.square().mean(dim=1, keepdim=True).sqrt()
    # float32 sums over d, both bases and the columns; bases and ends, or factors and what lies between, and the scaled
    # sum each rounded to the dtype
    unit = ROUNDOFF[dtype]
    error = ((x.shape[1] + 256) * U32 + 6 * unit) * size
    return excess_of(out, exact, error + unit * (exact.abs() + error) + 2.0**-25)


def _timed(
    name: Record, found: Mapping[str, Contender], excess: Mapping[str, float], at: Place, goals: Sequence[Goal]
) -> list[Record]:
    """Time who is right, in turns; give their records, and those of who is not."""
    right = {who: one for who, one in found.items() if excess[who] <= 1}
    records: list[Record] = [
        name | {"backend": who, "status": "wrong", "reason": f"{excess[who]:.3g} times the error it may have"}
        for who in found
        if who not in right
    ]
    theirs: dict[str, float] = {}
    for way, runs in _ways(right, at) if "loraspan" in right else ():
        timings = {
            who: Timing(*(took / right[who].part for took in timing))
            for who, timing in take_turns(at.clock, runs, at.rounds).items()
        }
        # those that cannot be captured stay what they are
        theirs |= {peer: timings[peer].median for peer in PEERS if peer in timings}
        for who, timing in timings.items():
            record = name | {"backend": who, "way": way, "status": "timed", "error": excess[who]}
            record |= {"ms": timing.median, "low": timing.low, "high": timing.high}
            if "base" in timings:
                record["x base"] = timing.median / timings["base"].median
            if who == "loraspan":
                record |= {f"x {peer}": took / timing.median for peer, took in theirs.items()}
                judged = [goal.judge(float(str(record[goal.figure]))) for goal in goals if goal.figure in record]
                record["goals"] = "; ".join(judged) or None
            records.append(record)
    return records


def _ways(right: Mapping[str, Contender], at: Place) -> Iterator[tuple[str, dict[str, Candidate]]]:
    """Give who runs as it is; on a GPU inside CUDA graphs, as engines run; compiled; and both."""

    def turns(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Candidate]:
        return {who: lambda _, run=run: run() for who, run in runs.items()}

    def graphs(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Candidate]:
        found = {who: at.clock.captured(run) for who, run in runs.items()}
        return turns({who: replay for who, replay in found.items() if replay is not None})

    yield "eager", turns({who: one.run for who, one in right.items()})
    taken = {who: one.run for who, one in right.items() if one.captured}
    if replays := graphs(taken):
        yield "graph", replays
    if at.compiler is not None:
        compiled = {who: torch.compile(run, fullgraph=True, backend=at.compiler) for who, run in taken.items()}
        yield "compiled", turns(compiled)
        if replays := graphs(compiled):
            yield "compiled graph", replays


def resident_records(size: int, series: Sequence[Batch], at: Place) -> list[Record]:
    """Time one layer with more and more tasks resident, and more and more of them in the batch."""
    records: list[Record] = []
    for batch in series:
        records += adapter_records(size, 1, batch, replace(at, compiler=None))
    return records
